"""What is saved of a tokenizer: the same tokens again, here and in programs that know only vocab.json and merges.txt.

`python tests/transformers4.py` checks the same with transformers 4 itself.
"""

import json
import shutil
from pathlib import Path

import pytest
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from emoft.files import VOCABULARY_FILES
from emoft.model.tokenizer import load_tokenizer, save_tokenizer, train_tokenizer

TEXTS = ["i feel fine, it's 12 o'clock", "ខ្ញុំសប្បាយចិត្តណាស់ថ្ងៃនេះ", "un café 😀\n  and <|joy|> so on <|endoftext|>"]


@pytest.fixture(scope="module")
def tokenizer() -> GPT2Tokenizer:
    return train_tokenizer(TEXTS, 320)


@pytest.fixture
def saved(tokenizer: GPT2Tokenizer, tmp_path: Path) -> Path:
    folder = tmp_path / "saved"
    folder.mkdir()
    save_tokenizer(tokenizer, folder)
    return folder


def ids(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return tokenizer(TEXTS)["input_ids"]


def test_the_two_files_alone_give_the_same_tokens(tokenizer: GPT2Tokenizer, saved: Path, tmp_path: Path) -> None:
    for name in VOCABULARY_FILES:
        shutil.copy(saved / name, tmp_path)
    assert ids(GPT2Tokenizer.from_pretrained(tmp_path)) == ids(load_tokenizer(str(tmp_path))) == ids(tokenizer)


def test_they_are_not_read_where_tokenizer_json_is(tokenizer: GPT2Tokenizer, saved: Path) -> None:
    """Whatever they hold, as in the folder of another program."""
    vocabulary = json.loads((saved / "vocab.json").read_text(encoding="utf-8"))
    turned = dict(zip(vocabulary, reversed(vocabulary.values()), strict=True))
    (saved / "vocab.json").write_text(json.dumps(turned), encoding="utf-8")
    (saved / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    for found in (load_tokenizer(str(saved)), AutoTokenizer.from_pretrained(saved)):
        assert ids(found) == ids(tokenizer)


def test_added_words_come_again(saved: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.add_tokens(["café", "សប្បាយ"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|joy|>", "<|sadness|>"]})
    before = tokenizer.added_tokens_decoder
    for name in ("once", "twice"):
        (tmp_path / name).mkdir()
        save_tokenizer(tokenizer, tmp_path / name)
        found = load_tokenizer(str(tmp_path / name))
        assert ids(found) == ids(tokenizer)
        assert {key: str(value) for key, value in found.added_tokens_decoder.items()} == {
            key: str(value) for key, value in before.items()
        }
        assert {"<|joy|>", "<|sadness|>"} <= set(found.all_special_tokens)
        settings = json.loads((tmp_path / name / "tokenizer_config.json").read_text(encoding="utf-8"))
        assert settings["additional_special_tokens"] == ["<|joy|>", "<|sadness|>"], "transformers 4 reads it by this"
        assert "extra_special_tokens" not in settings, "and stops at this"
        tokenizer = found


def test_of_another_kind_they_would_lie_and_are_not_written(saved: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.save_pretrained(tmp_path / "other")
    exact = load_tokenizer(str(tmp_path / "other"))
    (tmp_path / "again").mkdir()
    save_tokenizer(exact, tmp_path / "again")
    assert not any((tmp_path / "again" / name).exists() for name in VOCABULARY_FILES)
    assert ids(load_tokenizer(str(tmp_path / "again"))) == ids(exact) == ids(tokenizer) != ids(load_tokenizer(saved))
    settings = json.loads((tmp_path / "again" / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast", "a class that transformers 4 has too"
    assert ids(AutoTokenizer.from_pretrained(tmp_path / "again")) == ids(exact)
