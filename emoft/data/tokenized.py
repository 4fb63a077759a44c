"""Splits as tokens: tokenized once and cached, and what can be told of them before training."""

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from transformers import GPT2Tokenizer

from emoft.data.cache import cache_in_use, fingerprint
from emoft.data.template import TextFormat
from emoft.data.tokens import encode_whole, most_characters
from emoft.errors import UserError
from emoft.private import fingerprint_of
from emoft.terminal import Bar

datasets.disable_progress_bars()  # `terminal.Bar` stands for them: theirs stay on the screen, and in log files
PART = 10_000  # texts that are looked at together


def tokenize(rows: Dataset, tokenizer: GPT2Tokenizer, text_format: TextFormat, split: str) -> Dataset:
    """Return a memory-mapped data set, the rows with "input_ids" beside them; made once, then read from the cache.

    A further column, "whole_tokens", says how many tokens each text has before it is cut.

    Raises:
        UserError: no text has a token that could be predicted.
    """
    columns = ["text", "label"] if text_format.has_label else ["text"]
    most = most_characters(tokenizer, text_format.max_length)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the last use, without effect on `encode`
        vocabulary.pop(state)

    def encode_batch(*values: list[str]) -> dict[str, list[Any]]:
        texts = [text_format.fill(*row)[:most] for row in zip(*values, strict=True)]
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
    if min(text_format.max_length, int(_whole_lengths(tokenized).max())) < 2:
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
    counts = np.zeros(0, dtype=np.int64)
    for ids, lengths in _parts(rows):
        is_target = np.ones(len(ids), dtype=bool)
        is_target[(np.cumsum(lengths) - lengths)[lengths > 0]] = False  # the first token of a text is no target
        found = np.bincount(ids[is_target], minlength=len(counts))
        found[: len(counts)] += counts
        counts = found
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * np.log(shares)).sum())


def checksum(rows: Dataset) -> str:
    """Return the SHA-256 of all tokens of a tokenized split and of where its texts end."""
    digest = hashlib.sha256(pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy().tobytes())
    for ids, _ in _parts(rows):
        digest.update(ids)
    return digest.hexdigest()


def distinct_share(rows: Dataset) -> float:
    """Return the share of tokenized examples that are not the same, token by token, as one before them."""
    seen = set()  # 16 bytes of a hash stand for each, which are never the same for two
    for ids, lengths in _parts(rows):
        for end, length in zip(np.cumsum(lengths), lengths, strict=True):
            seen.add(hashlib.blake2b(ids[end - length : end], digest_size=16).digest())
    return len(seen) / max(1, len(rows))


def _parts(rows: Dataset) -> Iterator[tuple[Any, Any]]:
    """Yield the token ids of many texts at a time, one text after another, and how many each of them has."""
    for part in rows.select_columns("input_ids").with_format("arrow").iter(PART):
        texts = part["input_ids"].combine_chunks()
        yield pc.list_flatten(texts).to_numpy(), pc.list_value_length(texts).to_numpy()
