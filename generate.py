"""Generate texts from a model that train.py saved: `python generate.py --help` lists the flags."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import transformers
from tqdm import tqdm
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft import errors
from emoft.config import GenerateConfig, parse_config
from emoft.data.template import TextFormat
from emoft.errors import UserError, warn
from emoft.model.generation import (
    Generated,
    TerminalStreamer,
    check_prompts,
    choose_generation_precision,
    generate_all,
    generate_batch,
)
from emoft.model.kernels import use_fast_kernels
from emoft.model.loading import load_model, load_tokenizer
from emoft.training.precision import Precision, choose_device

TUTORIAL_PROMPT = "Emotion: i didnt feel well"
SAMPLING = ("temperature", "top_k", "top_p")  # flags that only --do_sample has a use for


def read_prompts(config: GenerateConfig) -> list[str]:
    """Return the prompts that the flags ask for; without any, the tutorial's.

    Raises:
        UserError: flags that contradict each other, a file that cannot be read, an emotion the model does not know.
    """
    sources = {
        "--prompt": config.prompt,
        "--emotion": config.emotion,
        "--prompts_file": config.prompts_file,
        "--interactive": config.interactive,
    }
    given = [flag for flag, value in sources.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} each say what to continue: give one of them")
    if config.interactive and (config.json or config.num_return_sequences > 1):
        raise UserError("--interactive prints one text at a time: drop --json and --num_return_sequences")
    if config.text and not config.emotion:
        raise UserError("--text goes with --emotion: add one, or give the whole prompt by --prompt")
    if config.emotion:
        return [TextFormat.load(Path(config.model_name_or_path)).prompt(config.emotion, config.text)]
    if config.prompts_file:
        return _lines(config.prompts_file)
    return config.prompt or [TUTORIAL_PROMPT]


def _lines(name: str) -> list[str]:
    """Return the lines of a file, or of standard input, that are not blank."""
    try:
        content = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
        # Not splitlines, which takes some characters of a text for ends of lines too.
        lines = content.decode("utf-8-sig").replace("\r\n", "\n").split("\n")
        prompts = [line for line in lines if line.strip()]
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise UserError(
            f"--prompts_file {name} line {line} is not UTF-8: save the file in the encoding UTF-8"
        ) from None
    except OSError as error:
        raise UserError(f"--prompts_file {name}: {error.strerror}, check the path") from None
    if not prompts:
        raise UserError(f"--prompts_file {name} holds no prompt: write one a line")
    return prompts


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
            tqdm.write(json.dumps(line, ensure_ascii=False))
        else:
            tqdm.write(result.text)
    sys.stdout.flush()


def main() -> int:
    """Read the flags, load the model, print what it writes."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and saving, which take a moment
    config = parse_config(GenerateConfig)
    name = config.model_name_or_path
    if name == GenerateConfig.model_name_or_path and not Path(name).is_dir():
        raise UserError(
            f"no folder {name} here: train first with python train.py, or name a model by --model_name_or_path"
        )
    prompts = read_prompts(config)
    if not config.do_sample:
        changed = [name for name in SAMPLING if getattr(config, name) != getattr(GenerateConfig, name)]
        if changed:
            warn(f"--{changed[0]} shapes random draws, and there are none: add --do_sample")
    tokenizer = load_tokenizer(name)
    model = load_model(name)
    texts = 1 if config.interactive else min(config.batch_size, len(prompts) * config.num_return_sequences)
    precision = choose_generation_precision(config.mixed_precision, choose_device(config.use_cpu), texts)
    model.to(precision.device)  # type: ignore[arg-type]  # a fault of the library's types
    use_fast_kernels(model)
    model.eval()
    max_length = config.max_length
    if max_length == GenerateConfig.max_length:
        max_length = min(max_length, model.config.n_positions)  # nobody asked a small model for more
    check_prompts(model, tokenizer, prompts, max_length, config.max_new_tokens)

    options: dict[str, Any] = {
        "max_length": max_length,
        "max_new_tokens": config.max_new_tokens,
        "no_repeat_ngram_size": config.no_repeat_ngram_size,
        "do_sample": config.do_sample,
        **({name: getattr(config, name) for name in SAMPLING} if config.do_sample else {}),
    }
    torch.manual_seed(config.seed)
    if config.interactive:
        return converse(model, tokenizer, precision, options)

    if config.num_return_sequences > 1 and not config.do_sample:
        raise UserError(f"--num_return_sequences {config.num_return_sequences} would be the same text: add --do_sample")
    repeats = config.num_return_sequences
    results = generate_all(model, tokenizer, prompts, config.batch_size, precision, repeats, **options)
    for result in tqdm(
        results, total=len(prompts), desc="Generating", unit="prompt", disable=None, leave=False, delay=1
    ):
        show(result, config.json)
    return 0


def converse(model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, precision: Precision, options: dict[str, Any]) -> int:
    """Continue one prompt after another from the terminal, printed token by token; an empty line or Ctrl-D ends."""
    limits = options["max_length"], options["max_new_tokens"]
    while True:
        try:
            prompt = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return 0
        if not prompt.strip():
            return 0
        try:
            check_prompts(model, tokenizer, [prompt], *limits)
        except UserError as error:  # a prompt that is too long must not end the conversation
            print(error)
            continue
        print(prompt, end="", flush=True)
        with precision.autocast():
            generate_batch(model, tokenizer, [prompt], streamer=TerminalStreamer(tokenizer), **options)


if __name__ == "__main__":
    errors.run(main)
