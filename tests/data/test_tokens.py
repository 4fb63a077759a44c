import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT, Result
from datasets import Dataset
from transformers import GPT2Tokenizer

from emoft.config import TrainConfig
from emoft.data.reading import read_splits
from emoft.data.template import TextFormat
from emoft.data.tokenized import checksum, cut_share, describe_cut, tokenize, unigram_entropy
from emoft.data.tokens import check_room, encode, make_ids, make_tokens
from emoft.errors import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


class TestTokens:
    @pytest.fixture(scope="class")
    @classmethod
    def tokenizer(cls, tiny_model: Path) -> GPT2Tokenizer:
        return GPT2Tokenizer.from_pretrained(tiny_model)

    def test_one_end_of_text_then_cut(self, tokenizer: GPT2Tokenizer) -> None:
        eos = tokenizer.eos_token_id
        short, long = encode(tokenizer, ["i feel", "i feel sad " * 20], TextFormat("{text}", max_length=16))
        assert short[-1] == eos and short.count(eos) == 1
        assert len(long) == 16 and eos not in long  # a text that was cut is not taught to end there
        assert encode(tokenizer, ["i feel"], TextFormat("{text}", append_eos=False)) == [short[:-1]]

    def test_an_end_of_text_written_in_a_text_is_text(self, tokenizer: GPT2Tokenizer) -> None:
        (row,) = encode(tokenizer, ["a <|endoftext|> b"], TextFormat("{text}"))
        assert row.count(tokenizer.eos_token_id) == 1
        assert tokenizer.decode(row[:-1]) == "a <|endoftext|> b"

    def test_are_cached_and_memory_mapped(self, tokenizer: GPT2Tokenizer, tmp_path: Path) -> None:
        (tmp_path / "train.csv").write_text("text\ni feel fine\nand so it goes on without any end to this day\n")
        files = []
        for max_length in (64, 64, 8):
            splits, text_format = read_splits(
                TrainConfig(train_file=str(tmp_path / "train.csv"), max_length=max_length)
            )
            rows = tokenize(splits["train"], tokenizer, text_format, "train")
            tokenizer(["another use changes the tokenizer's state"], padding=True, truncation=True, max_length=4)
            (file,) = {entry["filename"] for entry in rows.cache_files}
            files.append((file, os.stat(file).st_mtime_ns))
            assert max(map(len, rows["input_ids"])) <= max_length
        assert files[0] == files[1] != files[2]


# The script as it is, but telling of each batch of texts that it tokenizes.
TELLING = f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import emoft.data.tokenized
encode = emoft.data.tokenized.encode_whole
def told(tokenizer, texts, text_format):
    print("tokenizing", len(texts))
    return encode(tokenizer, texts, text_format)
emoft.data.tokenized.encode_whole = told
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
"""


def test_a_second_run_does_not_tokenize_again(run: Callable[..., Result], tiny_model, train_file, tmp_path) -> None:
    (tmp_path / "telling.py").write_text(TELLING)
    words = ["--model_name_or_path", tiny_model, "--train_file", train_file, "--max_steps", 1, "--delimiter", ";"]
    home = {"HF_DATASETS_CACHE": str(tmp_path / "cache")}
    for output_dir, tokenizes in (("one", True), ("two", False)):
        more = ["--template", "{text} " + str(tmp_path), "--output_dir", output_dir]
        result = run(str(tmp_path / "telling.py"), *words, *more, **home)
        assert result.code == 0, result.err
        assert ("tokenizing 48" in result.out) == ("tokenizing" in result.out) == tokenizes


def test_unigram_entropy_is_of_all_tokens_but_the_first_of_each_text() -> None:
    rows = Dataset.from_dict({"input_ids": [[7, 1, 2], [7], [9, 1, 1, 3]]})
    shares = [3 / 5, 1 / 5, 1 / 5]  # of the tokens 1, 2 and 3
    assert unigram_entropy(rows) == pytest.approx(-sum(share * math.log(share) for share in shares))


def test_the_checksum_is_of_tokens_and_ends() -> None:
    def of(*texts: list[int]) -> str:
        return checksum(Dataset.from_dict({"input_ids": list(texts)}))

    assert of([1, 2], [3]) == of([1, 2], [3])
    assert len({of([1, 2], [3]), of([1], [2, 3]), of([1, 2], [4]), of([1, 2, 3])}) == 4


def test_a_text_as_long_as_a_book_is_cut_like_any_other(tiny_model: Path) -> None:
    tokenizer, text_format = GPT2Tokenizer.from_pretrained(tiny_model), TextFormat("{text}", max_length=20)
    book = "i feel happy because my friends came to visit and " * 300
    whole = tokenizer(book)["input_ids"]
    assert encode(tokenizer, [book], text_format) == [whole[:20]]
    assert encode(tokenizer, [book * 500], text_format) == [whole[:20]]


def test_what_stands_before_a_text_must_leave_room(tiny_model: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    labels = ["joy", "an emotion of many tokens"]
    longest = len(tokenizer(f"{labels[1]}:")["input_ids"])
    check_room(tokenizer, TextFormat("{label}: {text}", True, longest + 1, labels))
    with pytest.raises(UserError, match=f"--max_length {longest} leaves no room.*'an emotion of many tokens:'"):
        check_room(tokenizer, TextFormat("{label}: {text}", True, longest, labels))


@pytest.fixture
def split(tiny_model: Path) -> Callable[..., Dataset]:
    def tokenized(texts: list[str], text_format: TextFormat) -> Dataset:
        rows = Dataset.from_dict({"text": texts})
        return tokenize(rows, GPT2Tokenizer.from_pretrained(tiny_model), text_format, "train")

    return tokenized


def test_cut_texts_are_told(split: Callable[..., Dataset], tiny_model: Path) -> None:
    texts = ["i feel fine", "i feel sad " * 5, "i feel " * 9]
    longest = max(map(len, GPT2Tokenizer.from_pretrained(tiny_model)(texts)["input_ids"])) + 1
    roomy, narrow, tight = (TextFormat("{text}", max_length=length) for length in (100, 12, 3))
    assert describe_cut(split(texts, roomy), roomy, "train") == ""
    assert describe_cut(split(texts, narrow), narrow, "train") == (
        f"train: 2 of 3 texts (66.7%) are cut by --max_length 12; the longest has {longest} tokens"
    )
    shares = [cut_share(split(texts, each), each.max_length) for each in (roomy, narrow, tight)]
    assert shares == pytest.approx([0, 2 / 3, 1])
    assert "3 of 3 texts (100.0%) are cut by --max_length 3, so that no text teaches where to end" in describe_cut(
        split(texts, tight), tight, "train"
    )


@pytest.mark.parametrize("text_format", [TextFormat("{text}", append_eos=False), TextFormat("{text}", max_length=1)])
def test_texts_without_a_target_are_refused(split: Callable[..., Dataset], text_format: TextFormat) -> None:
    with pytest.raises(UserError, match="no text of train has a second token"):
        split(["a", "b", "c"], text_format)
    if not text_format.append_eos:
        assert len(split(["a", "i feel fine"], text_format)) == 2


def test_ids_alone_are_those_of_tokens(tiny_model: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    texts = ["i feel fine", " a  <|endoftext|> b\t", "ខ្ញុំ 😀 é", "", "<mark>happy"]
    for _ in range(2):
        assert make_ids(tokenizer, texts) == [ids for ids, _ in make_tokens(tokenizer, texts)]
        tokenizer.add_special_tokens({"additional_special_tokens": ["<mark>"]})
        tokenizer(texts, padding=True, truncation=True, max_length=2)  # another use changes the tokenizer's state
