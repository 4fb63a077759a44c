"""Prompts -> texts, a batch at a time, from a model in memory."""

import codecs
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    GPT2LMHeadModel,
    GPT2Tokenizer,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from emoft.data.tokens import decode, make_tokens, token_bytes
from emoft.device import random_state, set_random_state
from emoft.distributed.parallel import is_sharded
from emoft.errors import UserError, is_out_of_memory
from emoft.model.loading import TextModel
from emoft.model.steering import FirstRow, Steered, Steering, evidence_of
from emoft.training.precision import Precision

MANY = 16  # texts at once from which a CPU is faster in half precision: fewer rows do not fill its matrix units
SAMPLING = ("temperature", "top_k", "top_p")  # what only random draws have a use for
WINDOW = 16  # batches whose prompts are sorted together


@dataclass(frozen=True)
class Generated:
    """One result: its prompt, the whole text, its tokens after the prompt, and whether the model itself ended it."""

    prompt: str
    text: str
    new_tokens: int
    finished: bool


def encode_prompt(tokenizer: GPT2Tokenizer, prompt: str) -> list[int]:
    """Return the token ids of a prompt; an empty one becomes end-of-text, after which GPT-2's texts begin."""
    return make_tokens(tokenizer, [prompt])[0][0] or [tokenizer.eos_token_id]


def check_prompts(
    model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, prompts: Sequence[str], max_length: int, max_new_tokens: int = 0
) -> None:
    """See that each prompt leaves room for at least one token.

    Raises:
        UserError: one does not; it is named by its number, from 1.
    """
    positions = model.config.n_positions
    for number, prompt in enumerate(prompts, start=1):
        length = len(encode_prompt(tokenizer, prompt))
        limit = length + max_new_tokens if max_new_tokens else max_length
        flag = f"--max_new_tokens {max_new_tokens}" if max_new_tokens else f"--max_length {max_length}"
        if length >= positions:
            raise UserError(
                f"prompt {number} has {length} tokens, too many for {flag} and for the model, which has {positions}"
                " positions: shorten it"
            )
        if limit > positions:
            raise UserError(
                f"prompt {number} has {length} tokens, and {flag} asks for {limit} in all, more than the model's"
                f" {positions} positions: lower it"
            )
        if length >= limit:
            raise UserError(f"prompt {number} has {length} tokens, no less than {flag}: raise it")


@torch.no_grad()  # not inference_mode: the weights that FSDP gathers in it could not be trained any more
def generate_batch(
    model: GPT2LMHeadModel,
    tokenizer: GPT2Tokenizer,
    prompts: Sequence[str],
    max_length: int = 100,
    max_new_tokens: int = 0,
    no_repeat_ngram_size: int = 0,
    streamer: BaseStreamer | None = None,
    steering: Steering | None = None,
    **options: Any,
) -> list[Generated]:
    """Continue prompts together, padded on the left so that each goes on at its last token.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompts: texts to continue, all past `check_prompts`.
        max_length: longest result in tokens, prompt included; counted for each prompt by itself.
        max_new_tokens: if not 0, most tokens after the prompt instead.
        no_repeat_ngram_size: if not 0, no sequence of so many tokens occurs twice in a result, its prompt included.
        streamer: receives the tokens as they come, of a single prompt.
        steering: weighs the emotion of each prompt against the others; none: the prompt alone speaks for it.
        options: of `GenerationConfig`, such as `do_sample`; steered, temperature, top_k and top_p besides that.

    Returns:
        For each prompt its result. Prompts that do not fit in memory together are continued in halves.
    """
    rows = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    room = [max_new_tokens or max_length - len(row) for row in rows]
    end = tokenizer.eos_token_id
    continued = _continue_in_memory(model, end, rows, room, no_repeat_ngram_size, options, steering, streamer)
    results = []
    for prompt, new in zip(prompts, continued, strict=True):
        finished = end in new
        new = new[: new.index(end)] if finished else new
        results.append(Generated(prompt, prompt + decode(tokenizer, new), len(new), finished))
    return results


def _continue_in_memory(
    model: GPT2LMHeadModel, end: int, rows: list[list[int]], room: list[int], *others: Any
) -> list[list[int]]:
    """Return the new tokens of each row; what does not fit in memory is computed in halves."""
    try:
        return _continue(model, end, rows, room, *others)
    except (MemoryError, RuntimeError) as error:
        # Each forward pass of a sharded model is a collective: all ranks make as many.
        if not is_out_of_memory(error) or len(rows) < 2 or is_sharded(model):
            raise
    # Behind the handler, so that the error and all that it holds of the whole are gone.
    middle = len(rows) // 2
    return _continue_in_memory(model, end, rows[:middle], room[:middle], *others) + _continue_in_memory(
        model, end, rows[middle:], room[middle:], *others
    )


def _continue(
    model: GPT2LMHeadModel,
    end: int,
    rows: list[list[int]],
    room: list[int],
    no_repeat_ngram_size: int,
    options: dict[str, Any],
    steering: Steering | None = None,
    streamer: BaseStreamer | None = None,
) -> list[list[int]]:
    """Return the new tokens of each row, as many as it has room for or up to its end-of-text."""
    every = [each for row in rows for each in (steering.rows(row) if steering else [row])]
    width = max(map(len, every))
    # The library lets all rows grow by the same count: by no more than the longest has positions left.
    most = min(max(room), model.config.n_positions - width)
    input_ids = torch.tensor([[end] * (width - len(row)) + row for row in every], device=model.device)
    attention_mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in every], device=model.device)
    rules = LogitsProcessorList()
    if no_repeat_ngram_size:
        rules.append(NoRepeatNGram(no_repeat_ngram_size, [width - len(row) for row in rows]))
    if steering:
        rules, options = _steered(model, end, rows, steering, rules, options)
        streamer = FirstRow(streamer) if streamer else None
    config = GenerationConfig(
        max_new_tokens=most,
        eos_token_id=end,
        pad_token_id=end,
        bos_token_id=end,
        remove_invalid_values=True,  # a model with NaN in it writes nonsense, but ends no training
        **options,
    )
    output: Any = model.generate(  # type: ignore[misc]  # a fault of the library's types
        input_ids,
        attention_mask=attention_mask,
        generation_config=config,
        streamer=streamer,
        logits_processor=rules,
        # Each forward pass of a sharded model is a collective: none may end before the others, whatever it has drawn.
        synced_gpus=is_sharded(model),
    )
    output = output[:: steering.count] if steering else output  # all rows of a prompt go on alike
    new = [sequence[:limit] for sequence, limit in zip(output[:, width:].tolist(), room, strict=True)]
    # Shorter rows may have room left, which they get without the longest.
    unfinished = [number for number, tokens in enumerate(new) if end not in tokens and len(tokens) < room[number]]
    if unfinished:
        longer = [rows[number] + new[number] for number in unfinished]
        left = [room[number] - len(new[number]) for number in unfinished]
        rest = _continue(model, end, longer, left, no_repeat_ngram_size, options, steering)
        for number, tokens in zip(unfinished, rest, strict=True):
            new[number] += tokens
    return new


def _steered(
    model: GPT2LMHeadModel,
    end: int,
    rows: list[list[int]],
    steering: Steering,
    rules: LogitsProcessorList,
    options: dict[str, Any],
) -> tuple[LogitsProcessorList, dict[str, Any]]:
    """Return the rules of a steered generation, which draws by itself, and the options that are left for the library.

    It could not draw the same token for all rows of a prompt.
    """
    draws = options.get("do_sample", False)
    if draws:
        temperature, top_k, top_p = (options.get(name) for name in ("temperature", "top_k", "top_p"))
        if temperature not in (None, 1.0):
            rules.append(TemperatureLogitsWarper(temperature))
        if top_k:
            rules.append(TopKLogitsWarper(min(top_k, model.config.vocab_size)))
        if top_p not in (None, 1.0):
            rules.append(TopPLogitsWarper(top_p))
    evidence = evidence_of(model, end, steering, rows)
    left = {name: value for name, value in options.items() if name not in ("do_sample", *SAMPLING)}
    return LogitsProcessorList([Steered(steering, rows, evidence, rules, draws)]), left


def choose_generation_precision(name: str, device: torch.device, texts: int) -> Precision:
    """Return the precision for so many texts at once; on a CPU "auto" is float32 for a few."""
    return Precision("no" if name == "auto" and device.type == "cpu" and texts < MANY else name, device)


def generate_all(
    model: GPT2LMHeadModel,
    tokenizer: GPT2Tokenizer,
    prompts: Sequence[str],
    batch_size: int,
    precision: Precision,
    num_return_sequences: int = 1,
    **options: Any,
) -> Iterator[list[Generated]]:
    """Continue any number of prompts, a batch of similar lengths at a time.

    Prompts are sorted by length, so that little is computed for padding, a window of some batches at a time, so that
    the first results need not wait for the last.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        prompts: texts to continue, all past `check_prompts`.
        batch_size: sequences computed at once, which bounds the memory.
        precision: of the matrix products.
        num_return_sequences: results for each prompt.
        options: of `generate_batch`.

    Yields:
        For each prompt, in the order given, its results.
    """
    lengths = [len(encode_prompt(tokenizer, prompt)) for prompt in prompts]
    wanted = [number for number in range(len(prompts)) for _ in range(num_return_sequences)]
    results: dict[int, list[Generated]] = {}
    following = 0  # the prompt whose results come next
    for start in range(0, len(wanted), WINDOW * batch_size):
        window = wanted[start : start + WINDOW * batch_size]
        window.sort(key=lengths.__getitem__)
        for place in range(0, len(window), batch_size):
            part = window[place : place + batch_size]
            with precision.autocast():
                generated = generate_batch(model, tokenizer, [prompts[number] for number in part], **options)
            for number, result in zip(part, generated, strict=True):
                results.setdefault(number, []).append(result)
            while len(results.get(following, ())) == num_return_sequences:
                yield results.pop(following)
                following += 1


class NoRepeatNGram(LogitsProcessor):
    """Lets no sequence of `size` tokens occur twice in a row, all rows at once.

    The rule of `NoRepeatNGramLogitsProcessor`, which works row by row in Python, and takes the end-of-text that fills
    the rows up for a token of the prompt: a prompt would be continued differently beside a longer one than alone.
    """

    def __init__(self, size: int, padding: list[int]) -> None:
        self.size = size
        self.padding = torch.tensor(padding)  # (B,) tokens in front of each prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Return the scores (B, V) with minus infinity for each token that would repeat a sequence."""
        if input_ids.shape[1] < self.size:
            return scores
        windows = input_ids.unfold(1, self.size, 1)  # (B, W, size)
        latest = input_ids[:, input_ids.shape[1] - self.size + 1 :]  # (B, size - 1), what a token would complete
        starts = torch.arange(windows.shape[1], device=input_ids.device)
        in_text = starts >= self.padding.to(input_ids.device)[:, None]
        repeats = (windows[..., :-1] == latest[:, None]).all(-1) & in_text  # (B, W)
        banned = torch.where(repeats, -torch.inf, torch.inf).to(scores.dtype)
        return scores.scatter_reduce(1, windows[..., -1], banned, "amin")


def sample_texts(text_model: TextModel, seed: int) -> dict[str, str]:
    """Return a sampled text for each emotion, or a single one, of the name "text", where the template cannot steer.

    Model mode and random generators are left as they were, so that a training may call this between two steps.
    """
    model, text_format = text_model.model, text_model.text_format
    prompts = text_format.prompts()
    was_training = model.training
    model.eval()
    before = random_state(model.device)
    torch.manual_seed(seed)
    results = generate_batch(
        model, text_model.tokenizer, list(prompts.values()), text_format.max_length, do_sample=True, top_k=50
    )
    set_random_state(before, model.device)
    model.train(was_training)
    return {name: result.text for name, result in zip(prompts, results, strict=True)}


class TerminalStreamer(BaseStreamer):
    """Prints the continuation of a prompt as its tokens come, each character as soon as its last byte is there."""

    def __init__(self, tokenizer: GPT2Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")
        self.prompt_seen = False

    def put(self, value: Tensor) -> None:
        """Take the prompt, then a token at a time."""
        if self.prompt_seen:
            sys.stdout.write(self.decoder.decode(token_bytes(self.tokenizer, value.flatten().tolist())))
            sys.stdout.flush()
        self.prompt_seen = True

    def end(self) -> None:
        """End the line."""
        sys.stdout.write("\n")
        sys.stdout.flush()
        self.prompt_seen = False
        self.decoder.reset()
