"""Texts -> tokens: filled templates, tokenized once and cached, and what can be told of them before training."""

import hashlib
import json

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets import Dataset, Features, Value
from transformers import GPT2Tokenizer

from emoft.errors import UserError
from emoft.template import TextFormat


def fingerprint(*parts: str) -> str:
    """Return the name under which `datasets` caches a result: a hash of all that it depends on.

    Left alone, the library hashes the function, and that hash changes with any state the function refers to.
    """
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


def encode(tokenizer: GPT2Tokenizer, texts: list[str], text_format: TextFormat) -> list[list[int]]:
    """Return the token ids of filled templates: end-of-text appended if the format says so, then cut.

    An "<|endoftext|>" that stands in a text is text: only the end of an example is taught to be an end.
    """
    end = [tokenizer.eos_token_id] if text_format.append_eos else []
    most = most_characters(tokenizer, text_format.max_length)
    rows = tokenizer(
        [text[:most] for text in texts],
        add_special_tokens=False,
        split_special_tokens=True,
        return_attention_mask=False,
        verbose=False,
    )["input_ids"]
    return [(row + end)[: text_format.max_length] for row in rows]


def most_characters(tokenizer: GPT2Tokenizer, max_length: int) -> int:
    """Return a number of characters beyond which nothing of a text is kept: a line may be a whole book."""
    return (max_length + 1) * max(map(len, tokenizer.get_vocab()))


def check_room(tokenizer: GPT2Tokenizer, text_format: TextFormat) -> None:
    """See that what stands before a text leaves room for it.

    Raises:
        UserError: it does not.
    """
    for prompt in text_format.prompts().values():
        length = len(tokenizer(prompt, verbose=False)["input_ids"])
        if length >= text_format.max_length:
            raise UserError(
                f"--max_length {text_format.max_length} leaves no room for a text: what stands before it, {prompt!r},"
                f" has {length} tokens, raise it"
            )


def tokenize(
    rows: Dataset, tokenizer: GPT2Tokenizer, text_format: TextFormat, split: str, keep_columns: bool = False
) -> Dataset:
    """Return a memory-mapped data set of one column, "input_ids"; made once, then read from the cache.

    With `keep_columns` the columns of the rows stand beside it.
    """
    columns = ["text", "label"] if text_format.has_label else ["text"]
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())
    for state in ("truncation", "padding"):  # of the last use, without effect on `encode`
        vocabulary.pop(state)

    def encode_batch(*values: list[str]) -> dict[str, list[list[int]]]:
        return {
            "input_ids": encode(tokenizer, [text_format.fill(*row) for row in zip(*values, strict=True)], text_format)
        }

    return rows.map(
        encode_batch,
        batched=True,
        input_columns=columns,
        remove_columns=None if keep_columns else rows.column_names,
        features=Features((rows.features if keep_columns else {}) | {"input_ids": datasets.List(Value("int32"))}),
        new_fingerprint=fingerprint(
            rows._fingerprint, json.dumps(vocabulary), repr(text_format), "kept" if keep_columns else ""
        ),
        desc=f"Tokenizing {split}",
    )


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
