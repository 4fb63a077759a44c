"""Texts -> tokens: filled templates, tokenized once and cached, and what can be told of them before training."""

import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset, Features, Value
from torch import Tensor
from transformers import GPT2Tokenizer

from emoft.data.cache import cache_in_use
from emoft.data.template import TextFormat
from emoft.errors import UserError
from emoft.private import fingerprint_of
from emoft.terminal import Bar

datasets.disable_progress_bars()  # `terminal.Bar` stands for them: theirs stay on the screen, and in log files


def fingerprint(*parts: str) -> str:
    """Return the name under which `datasets` caches a result: a hash of all that it depends on.

    Left alone, the library hashes the function, and that hash changes with any state the function refers to.
    """
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def encode(tokenizer: GPT2Tokenizer, texts: list[str], text_format: TextFormat) -> list[list[int]]:
    """Return the token ids of filled templates: end-of-text appended if the format says so, then cut."""
    return [row[: text_format.max_length] for row in encode_whole(tokenizer, texts, text_format)]


def encode_whole(tokenizer: GPT2Tokenizer, texts: list[str], text_format: TextFormat) -> list[list[int]]:
    """Return the token ids of filled templates before they are cut; of very long ones only more than is kept."""
    end = [tokenizer.eos_token_id] if text_format.append_eos else []
    most = most_characters(tokenizer, text_format.max_length)
    return [ids + end for ids, _ in make_tokens(tokenizer, [text[:most] for text in texts])]


def make_tokens(tokenizer: GPT2Tokenizer, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Return for each text its token ids, and where in the text each of them ends, in characters.

    All tokens are made here: of training, prompts, classification and checks, so that they are the same. An
    "<|endoftext|>" that stands in a text is text, since only the end of an example is taught to be an end; other
    special tokens, which somebody has added for a template, are tokens. Nothing is put before or behind a text.
    """
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    added = [token for token in added if token not in (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token)]
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None
    if pattern is None or not any(map(pattern.search, texts)):
        return _make_plain_tokens(tokenizer, texts)
    return [_make_tokens_around(tokenizer, pattern, text) for text in texts]


def _make_plain_tokens(tokenizer: GPT2Tokenizer, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    encoded = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        return_offsets_mapping=True,
        verbose=False,
    )
    return [
        (ids, [end for _, end in offsets])
        for ids, offsets in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    ]


def _make_tokens_around(tokenizer: GPT2Tokenizer, pattern: re.Pattern[str], text: str) -> tuple[list[int], list[int]]:
    """Split a text that holds special tokens."""
    ids: list[int] = []
    ends: list[int] = []
    start = 0
    for match in [*pattern.finditer(text), None]:
        ((found, places),) = _make_plain_tokens(tokenizer, [text[start : match.start() if match else None]])
        ids += found
        ends += [start + place for place in places]
        if match:
            ids.append(int(tokenizer.get_vocab()[match[0]]))
            ends.append(match.end())
            start = match.end()
    return ids, ends


def most_characters(tokenizer: GPT2Tokenizer, max_length: int) -> int:
    """Return a number of characters beyond which nothing of a text is kept: a line may be a whole book."""
    return (max_length + 1) * max(map(len, tokenizer.get_vocab()))


def check_room(tokenizer: GPT2Tokenizer, text_format: TextFormat) -> None:
    """See that what stands before a text leaves room for it.

    Raises:
        UserError: it does not.
    """
    for prompt in text_format.prompts().values():
        length = len(make_tokens(tokenizer, [prompt])[0][0])
        if length >= text_format.max_length:
            raise UserError(
                f"--max_length {text_format.max_length} leaves no room for a text: what stands before it, {prompt!r},"
                f" has {length} tokens, raise it"
            )


def tokenize(rows: Dataset, tokenizer: GPT2Tokenizer, text_format: TextFormat, split: str) -> Dataset:
    """Return a memory-mapped data set, the rows with "input_ids" beside them; made once, then read from the cache.

    A further column, "whole_tokens", says how many tokens each text has before it is cut.

    Raises:
        UserError: no text has a token that could be predicted.
    """
    columns = ["text", "label"] if text_format.has_label else ["text"]
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the last use, without effect on `encode`
        vocabulary.pop(state)

    def encode_batch(*values: list[str]) -> dict[str, list[Any]]:
        texts = [text_format.fill(*row) for row in zip(*values, strict=True)]
        whole = encode_whole(tokenizer, texts, text_format)
        bar.advance(len(texts))
        ids = [row[: text_format.max_length] for row in whole]
        return {"input_ids": ids, "whole_tokens": [len(row) for row in whole]}

    columns_added = {"input_ids": datasets.List(Value("int32")), "whole_tokens": Value("int32")}
    with cache_in_use(), Bar(f"Tokenizing {split}", "examples", len(rows)) as bar:
        tokenized = rows.map(
            encode_batch,
            batched=True,
            input_columns=columns,
            features=Features(rows.features | columns_added),
            new_fingerprint=fingerprint(fingerprint_of(rows), json.dumps(vocabulary), repr(text_format), "whole"),
        )
    if min(text_format.max_length, max(tokenized["whole_tokens"])) < 2:
        raise UserError(
            f"no text of {split} has a second token, and the first is never predicted: there is nothing to learn. Leave"
            " --append_eos on, raise --max_length, or give longer texts"
        )
    return tokenized


def describe_cut(rows: Dataset, text_format: TextFormat, split: str) -> str:
    """Return in a line how many texts of a tokenized split are cut by --max_length; "" if none is."""
    lengths = _whole_lengths(rows)
    cut = int((lengths > text_format.max_length).sum())
    if not cut:
        return ""
    none_ends = ", so that no text teaches where to end" if cut == len(lengths) and split == "train" else ""
    return (
        f"{split}: {cut:,} of {len(lengths):,} texts ({cut / len(lengths):.1%}) are cut by --max_length"
        f" {text_format.max_length}{none_ends}; the longest has {lengths.max():,} tokens"
    )


def cut_share(rows: Dataset, max_length: int) -> float:
    """Return the share of the texts of a tokenized split that are cut."""
    return float((_whole_lengths(rows) > max_length).mean())


def _whole_lengths(rows: Dataset) -> Any:
    return np.asarray(rows.with_format("arrow")[:]["whole_tokens"].to_numpy())


def unigram_entropy(rows: Dataset) -> float:
    """Return the entropy of the frequencies of the target tokens in a tokenized split, in nats.

    It is the loss of a model that knows how frequent each token is and nothing else, the least that context must beat
    (Shannon, 1951).
    """
    texts = rows.with_format("arrow")[:]["input_ids"].combine_chunks()
    ids, lengths = pc.list_flatten(texts).to_numpy(), pc.list_value_length(texts).to_numpy()
    starts = np.cumsum(lengths) - lengths  # the first token of a text is no target
    counts = np.bincount(np.delete(ids, starts))
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def checksum(rows: Dataset) -> str:
    """Return the SHA-256 of all tokens of a tokenized split and of where its texts end."""
    texts = rows.with_format("arrow")[:]["input_ids"].combine_chunks()
    digest = hashlib.sha256(pc.list_value_length(texts).to_numpy().tobytes())
    digest.update(pc.list_flatten(texts).to_numpy().tobytes())
    return digest.hexdigest()


@functools.cache
def byte_of_character() -> dict[str, int]:
    """Return which byte a character of a token stands for, as in GPT-2's `bytes_to_unicode` (Radford et al., 2019).

    A byte that prints is the character of that number. The others, such as space and line feed, would make a vocabulary
    hard to read and to store as text: in their order they are the characters from 256 on, so that space is "Ġ".
    """
    printing = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printing]
    return {chr(byte): byte for byte in printing} | {chr(256 + place): byte for place, byte in enumerate(others)}


def token_bytes(tokenizer: GPT2Tokenizer, ids: Iterable[int]) -> bytes:
    """Return the bytes that tokens stand for; special tokens stand for none.

    A token of byte-level BPE may hold a part of a character only, so that text has to be put together from bytes.
    """
    special, added, byte_of = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder, byte_of_character()
    found = bytearray()
    for number in ids:
        if number in added:  # it stands for itself, not for the bytes that its characters would be
            found += b"" if number in special or added[number].special else added[number].content.encode()
        elif number not in special:
            found += bytes(byte_of[character] for character in tokenizer.convert_ids_to_tokens(number) or "")
    return bytes(found)


def byte_lengths(tokenizer: GPT2Tokenizer, rows: int) -> Tensor:
    """Return how many bytes each token stands for, none for special ones.

    Args:
        tokenizer: a byte-level BPE, of which each character of a token stands for a byte.
        rows: of the model's vocabulary, some of which may be spare.

    Returns:
        (rows,) int64.
    """
    lengths = torch.zeros(rows, dtype=torch.int64)
    special, added = set(tokenizer.all_special_ids), tokenizer.added_tokens_decoder
    for token, number in tokenizer.get_vocab().items():
        is_special = number in special or (number in added and added[number].special)
        lengths[number] = 0 if is_special else len(token.encode()) if number in added else len(token)
    return lengths


def decode(tokenizer: GPT2Tokenizer, ids: Iterable[int]) -> str:
    """Return the text of tokens. Bytes that make no character, as of one cut in two, are left out."""
    return token_bytes(tokenizer, ids).decode("utf-8", errors="ignore")
