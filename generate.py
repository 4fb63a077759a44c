"""Generate texts from a model that train.py saved: `python generate.py --help` lists the flags."""

import sys

from emoft import start
from emoft.config import GenerateConfig
from emoft.errors import UserError, guarded, run, warn
from emoft.model.prompts import read_prompts, read_text_format

if __name__ == "__main__":
    # Here, before the imports below, which take seconds: a mistake in the flags is told at once.
    config = start.read_flags(GenerateConfig)
    prompts = guarded(lambda: read_prompts(config))
    start.loading(sys.stderr, start.TO_GENERATE)

import json
from collections.abc import Iterable
from typing import Any

import torch
from transformers import GPT2Tokenizer

from emoft.device import choose_device
from emoft.model.decoding import Decoder, build_decoder
from emoft.model.generation import (
    Generated,
    TerminalStream,
    check_prompts,
    choose_generation_precision,
    encode_prompt,
    generate_all,
    generate_batch,
)
from emoft.model.loading import check_fit, load_model
from emoft.model.steering import Steering, build_steering
from emoft.model.tokenizer import load_tokenizer
from emoft.terminal import progress

SAMPLING = ("temperature", "top_k", "top_p")  # what only random draws have a use for


def show(results: Iterable[Generated], as_json: bool) -> None:
    """Print the results of a prompt: each text, or a line of JSON for each."""
    for number, result in enumerate(results, start=1):
        if as_json:
            line = {
                "prompt": result.prompt,
                "text": result.text,
                "sequence": number,
                "new_tokens": result.new_tokens,
                "finished": result.finished,
            }
            print(json.dumps(line, ensure_ascii=False))
        else:
            print(result.text)
    sys.stdout.flush()


def main(config: GenerateConfig, prompts: list[str]) -> int:
    """Load the model and print what it writes."""
    start.libraries_are_loaded()
    if not config.do_sample:
        changed = [name for name in SAMPLING if getattr(config, name) != getattr(GenerateConfig, name)]
        if changed:
            warn(f"--{changed[0]} shapes random draws, and there are none: add --do_sample")
    tokenizer = load_tokenizer(config.model_name_or_path, revision=config.model_revision)
    model = load_model(config.model_name_or_path, config.model_revision)
    check_fit(model, tokenizer)
    texts = 1 if config.interactive else min(config.batch_size, len(prompts) * config.num_return_sequences)
    device = choose_device(config.use_cpu)
    if config.quantize != "no" and device.type != "cpu":
        raise UserError(f"--quantize {config.quantize} is for CPUs, and this would run on {device.type}: add --use_cpu")
    precision = choose_generation_precision(config.mixed_precision, device, texts)
    model.to(precision.device)  # type: ignore[arg-type]  # a fault of the library's types
    decoder = build_decoder(model.eval(), precision, config.quantize == "int8")
    max_length = config.max_length
    if max_length == GenerateConfig.max_length:
        max_length = min(max_length, model.config.n_positions)  # nobody asked a small model for more
    check_prompts(model, tokenizer, prompts, max_length, config.max_new_tokens)

    options: dict[str, Any] = {
        "max_length": max_length,
        "max_new_tokens": config.max_new_tokens,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "do_sample": config.do_sample,
        **{name: getattr(config, name) for name in SAMPLING},
        "steering": read_steering(config, tokenizer, prompts),
    }
    torch.manual_seed(config.seed)
    if config.interactive:
        return converse(decoder, tokenizer, options)

    repeats = config.num_return_sequences
    results = generate_all(decoder, tokenizer, prompts, config.batch_size, repeats, **options)
    for result in progress(results, "Generating", "prompt", len(prompts)):
        show(result, config.json)
    return 0


def read_steering(config: GenerateConfig, tokenizer: GPT2Tokenizer, prompts: list[str]) -> Steering | None:
    """Return how the emotions of the prompts are weighed against the others; None if the prompts alone speak for them.

    Raises:
        UserError: the model cannot be steered, or a prompt names no emotion.
    """
    mixture = read_text_format(config).mixture(config.emotion) if config.emotion else {}
    if not config.strength and len(mixture) < 2:
        return None
    steering = build_steering(tokenizer, read_text_format(config), config.strength, mixture or None)
    for prompt in [] if config.interactive else prompts:
        steering.own(encode_prompt(tokenizer, prompt))
    return steering


def converse(decoder: Decoder, tokenizer: GPT2Tokenizer, options: dict[str, Any]) -> int:
    """Continue one prompt after another from the terminal, printed token by token; an empty line or Ctrl-D ends."""
    limits = options["max_length"], options["max_new_tokens"]
    if sys.stdin.isatty():
        print("write a prompt and press Enter; an empty line or Ctrl-D leaves")
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not prompt.strip():
            return 0
        try:
            check_prompts(decoder.model, tokenizer, [prompt], *limits)
            if steering := options["steering"]:
                steering.own(encode_prompt(tokenizer, prompt))
        except UserError as error:  # a prompt that is too long must not end the conversation
            print(error)
            continue
        print(prompt, end="", flush=True)
        stream = TerminalStream(tokenizer)
        generate_batch(decoder, tokenizer, [prompt], stream=stream, **options)
        stream.end()


if __name__ == "__main__":
    run(lambda: main(config, prompts))
