"""Prompts -> texts, a batch at a time, from a model in memory."""

import codecs
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel, GPT2Tokenizer, LogitsProcessor

from emoft.data.tokens import decode, make_tokens, token_bytes
from emoft.device import random_state, set_random_state
from emoft.distributed.parallel import is_sharded
from emoft.errors import UserError, is_out_of_memory
from emoft.model.decoding import Decoder, build_decoder
from emoft.model.loading import TextModel
from emoft.model.sampling import Sampling, ban_repeats
from emoft.model.steering import Steered, Steering
from emoft.training.precision import Precision

MANY = 16  # texts at once from which a CPU is faster in half precision: fewer rows do not fill its matrix units
KEPT = 0.75  # once no more of the texts go on, the others are computed no further: to leave them costs a copy
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
    decoder: Decoder,
    tokenizer: GPT2Tokenizer,
    prompts: Sequence[str],
    max_length: int = 100,
    max_new_tokens: int = 0,
    no_repeat_ngram_size: int = 0,
    stream: Callable[[int], None] | None = None,
    steering: Steering | None = None,
    rules: Sequence[LogitsProcessor] = (),
    **options: Any,
) -> list[Generated]:
    """Continue prompts together, each from its last token on.

    Args:
        decoder: of the model.
        tokenizer: the model's.
        prompts: texts to continue, all past `check_prompts`.
        max_length: longest result in tokens, prompt included; counted for each prompt by itself.
        max_new_tokens: if not 0, most tokens after the prompt instead.
        no_repeat_ngram_size: if not 0, no sequence of so many tokens occurs twice in a result, its prompt included.
        stream: is called with each new token of a single prompt.
        steering: weighs the emotion of each prompt against the others; none: the prompt alone speaks for it.
        rules: of transformers, which change the scores of each step, in this order.
        options: of `Sampling`, such as `do_sample`.

    Returns:
        For each prompt its result. Prompts that do not fit in memory together are continued in halves.
    """
    texts = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    room = [max_new_tokens or max_length - len(text) for text in texts]
    end = tokenizer.eos_token_id
    choose = Choice(end, no_repeat_ngram_size, steering, rules, Sampling(**options))
    results = []
    for prompt, new in zip(prompts, _continue_in_memory(decoder, texts, room, choose, stream), strict=True):
        finished = end in new
        new = new[: new.index(end)] if finished else new
        results.append(Generated(prompt, prompt + decode(tokenizer, new), len(new), finished))
    return results


@dataclass(frozen=True)
class Choice:
    """All that says which token comes next."""

    end: int  # the id of end-of-text
    no_repeat_ngram_size: int
    steering: Steering | None
    rules: Sequence[LogitsProcessor]
    sampling: Sampling

    def __call__(self, scores: Tensor, ids: Tensor, padding: Tensor) -> Tensor:
        """Return the next token of each text, (B,).

        Args:
            scores: (B, V).
            ids: (B, T), the texts so far.
            padding: (B,), tokens in front of each that are not its own.
        """
        if self.no_repeat_ngram_size:
            scores = ban_repeats(ids, padding, self.no_repeat_ngram_size, scores)
        for rule in self.rules:
            scores = rule(ids, scores)
        return self.sampling.choose(scores)


def _continue_in_memory(
    decoder: Decoder, texts: list[list[int]], room: list[int], choose: Choice, stream: Callable[[int], None] | None
) -> list[list[int]]:
    """Return the new tokens of each text; what does not fit in memory is computed in halves."""
    try:
        return _continue(decoder, texts, room, choose, stream)
    except (MemoryError, RuntimeError) as error:
        # Each forward pass of a sharded model is a collective: all ranks make as many.
        if not is_out_of_memory(error) or len(texts) < 2 or is_sharded(decoder.model):
            raise
    # Behind the handler, so that the error and all that it holds of the whole are gone.
    middle = len(texts) // 2
    return _continue_in_memory(decoder, texts[:middle], room[:middle], choose, stream) + _continue_in_memory(
        decoder, texts[middle:], room[middle:], choose, stream
    )


def _continue(
    decoder: Decoder, texts: list[list[int]], room: list[int], choose: Choice, stream: Callable[[int], None] | None
) -> list[list[int]]:
    """Return the new tokens of each text, as many as it has room for or up to its end-of-text."""
    device, steering = decoder.precision.device, choose.steering
    width = max(map(len, texts))
    ids = torch.tensor([[choose.end] * (width - len(text)) + text for text in texts], device=device)  # (B, T)
    padding = torch.tensor([width - len(text) for text in texts], device=device)
    steered = Steered(decoder, choose.end, steering, texts) if steering else None
    copies = steering.count if steering else 1  # rows of each text, which go on with the same tokens
    rows, scores = decoder.begin(
        [row for text in texts for row in (steering.rows(text) if steering else [text])], choose.end
    )
    new: list[list[int]] = [[] for _ in texts]
    owners = list(range(len(texts)))  # the text of each row that is still computed
    going = set(owners)
    while True:
        chosen = choose(steered.scores(scores) if steered else scores, ids, padding)  # (B,)
        for owner, token in zip(owners, chosen.tolist(), strict=True):
            if owner in going:
                new[owner].append(token)
                if stream:
                    stream(token)
                if token == choose.end or len(new[owner]) == room[owner]:
                    going.remove(owner)
        if not decoder.goes_on(bool(going)):
            return new
        ids = torch.cat([ids, chosen[:, None]], 1)
        if steered:
            steered.accept(chosen)
        if going and len(going) <= KEPT * len(owners):
            places = [place for place, owner in enumerate(owners) if owner in going]
            owners = [owners[place] for place in places]
            kept = torch.tensor(places, device=device)
            ids, padding, chosen = ids[kept], padding[kept], chosen[kept]
            rows.keep((kept[:, None] * copies + torch.arange(copies, device=device)).flatten())
            if steered:
                steered.keep(kept)
        scores = decoder.read(chosen.repeat_interleave(copies)[:, None], rows)


def choose_generation_precision(name: str, device: torch.device, texts: int) -> Precision:
    """Return the precision for so many texts at once; on a CPU "auto" is float32 for a few."""
    return Precision("no" if name == "auto" and device.type == "cpu" and texts < MANY else name, device)


def generate_all(
    decoder: Decoder,
    tokenizer: GPT2Tokenizer,
    prompts: Sequence[str],
    batch_size: int,
    num_return_sequences: int = 1,
    **options: Any,
) -> Iterator[list[Generated]]:
    """Continue any number of prompts, a batch of similar lengths at a time.

    Prompts are sorted by length, so that little is computed for padding, a window of some batches at a time, so that
    the first results need not wait for the last.

    Args:
        decoder: of the model.
        tokenizer: the model's.
        prompts: texts to continue, all past `check_prompts`.
        batch_size: sequences computed at once, which bounds the memory.
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
            generated = generate_batch(decoder, tokenizer, [prompts[number] for number in part], **options)
            for number, result in zip(part, generated, strict=True):
                results.setdefault(number, []).append(result)
            while len(results.get(following, ())) == num_return_sequences:
                yield results.pop(following)
                following += 1


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
    decoder = build_decoder(model, Precision("no", model.device))
    results = generate_batch(
        decoder, text_model.tokenizer, list(prompts.values()), text_format.max_length, do_sample=True
    )
    set_random_state(before, model.device)
    model.train(was_training)
    return {name: result.text for name, result in zip(prompts, results, strict=True)}


class TerminalStream:
    """Prints the continuation of a prompt as its tokens come, each character as soon as its last byte is there."""

    def __init__(self, tokenizer: GPT2Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="ignore")

    def __call__(self, token: int) -> None:
        """Take the next token."""
        sys.stdout.write(self.decoder.decode(token_bytes(self.tokenizer, [token])))
        sys.stdout.flush()

    def end(self) -> None:
        """End the line."""
        sys.stdout.write("\n")
        sys.stdout.flush()
