"""Texts -> tokens, and back: the one place where tokens are made."""

import functools
import re
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor
from transformers import GPT2Tokenizer

from emoft.data.template import TextFormat
from emoft.errors import UserError


def encode(tokenizer: GPT2Tokenizer, texts: list[str], text_format: TextFormat) -> list[list[int]]:
    """Return the token ids of filled templates: end-of-text appended if the format says so, then cut."""
    most = most_characters(tokenizer, text_format.max_length)
    whole = encode_whole(tokenizer, [text[:most] for text in texts], text_format)
    return [row[: text_format.max_length] for row in whole]


def encode_whole(tokenizer: GPT2Tokenizer, texts: list[str], text_format: TextFormat) -> list[list[int]]:
    """Return the token ids of filled templates before they are cut, end-of-text appended if the format says so."""
    end = [tokenizer.eos_token_id] if text_format.append_eos else []
    return [ids + end for ids in make_ids(tokenizer, texts)]


def make_tokens(tokenizer: GPT2Tokenizer, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
    """Return for each text its token ids, and where in the text each of them ends, in characters.

    All tokens are made here: of training, prompts, classification and checks, so that they are the same. An
    "<|endoftext|>" that stands in a text is text, since only the end of an example is taught to be an end; other
    special tokens, which somebody has added for a template, are tokens. Nothing is put before or behind a text.
    """
    pattern = _added_tokens(tokenizer, texts)
    if pattern is None:
        return _make_plain_tokens(tokenizer, texts)
    return [_make_tokens_around(tokenizer, pattern, text) for text in texts]


def make_ids(tokenizer: GPT2Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Return for each text the token ids of `make_tokens`, in less than half its time."""
    if _added_tokens(tokenizer, texts):
        return [ids for ids, _ in make_tokens(tokenizer, texts)]
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = True  # as text
    return [encoding.ids for encoding in backend.encode_batch_fast(list(texts), add_special_tokens=False)]


def _added_tokens(tokenizer: GPT2Tokenizer, texts: Sequence[str]) -> re.Pattern[str] | None:
    """Return what finds the special tokens that somebody has added; None if they stand in none of the texts."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    added = [token for token in added if token not in (tokenizer.eos_token, tokenizer.pad_token, tokenizer.bos_token)]
    pattern = re.compile("|".join(map(re.escape, sorted(added, key=len, reverse=True)))) if added else None
    return pattern if pattern and any(map(pattern.search, texts)) else None


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
