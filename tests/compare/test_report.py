"""`python -m emoft.compare`: which of two models is better on the same texts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Result
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.data.template import TextFormat
from emoft.model.tokenizer import train_tokenizer

TEXTS = [(f"i feel {word} today number {n}", word) for n in range(12) for word in ("joy", "fear")]


def make(folder: Path, noise: float, vocabulary: int = 300, template: str = "{label}: {text}") -> Path:
    """A small model whose weights are further from those of a common one by `noise`."""
    tokenizer = train_tokenizer([text for text, _ in TEXTS] * 3, vocabulary)
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    model = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=len(tokenizer),
            n_positions=64,
            n_embd=16,
            n_layer=1,
            n_head=2,
            bos_token_id=end,
            eos_token_id=end,
        )
    )
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=noise)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    TextFormat(template, labels=["fear", "joy"] if "label" in template else []).save(folder)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, noise, vocabulary in (("good", 0.0, 300), ("bad", 0.4, 300), ("other", 0.0, 280)):
        make(folder / name, noise, vocabulary)
    make(folder / "plain", 0.0, template="{text}")
    (folder / "texts.csv").write_text("text,label\n" + "\n".join(",".join(each) for each in TEXTS))
    return folder


def test_the_better_one_is_named(run: Callable[..., Result], models: Path) -> None:
    words = [models / "bad", models / "good", "--test_file", models / "texts.csv"]
    result = run("-m", "emoft.compare", *words, "--texts=2")
    assert result.code == 0, result.err
    last = result.out.strip().splitlines()[-1]
    assert last.startswith("B is better by ") and "loss (nats a token)" in last
    assert "McNemar's test" in result.out and "what another seed would change is in no interval" in result.out
    found = json.loads(run("-m", "emoft.compare", *words, "--json").out)
    loss = found["differences"]["loss (nats a token)"]
    assert loss["a"] > loss["b"] and loss["interval"][1] < 0
    # Each figure is that of the evaluation of its model alone.
    for side, name in (("a", "bad"), ("b", "good")):
        alone = json.loads(run("-m", "emoft.evaluate", "--model_name_or_path", models / name, *words[2:], "--json").out)
        assert loss[side] == pytest.approx(alone["loss"])
        assert found["differences"]["bits per byte"][side] == pytest.approx(alone["bits_per_byte"])
        assert found["differences"]["emotion accuracy"][side] == pytest.approx(alone["emotion_accuracy"])
        assert found["differences"]["macro F1"][side] == pytest.approx(alone["macro_f1"])


def test_a_model_does_not_differ_from_itself(run: Callable[..., Result], models: Path) -> None:
    result = run("-m", "emoft.compare", models / "good", models / "good", "--test_file", models / "texts.csv")
    assert result.code == 0, result.err
    assert "no difference in loss (nats a token) that 24 texts could show" in result.out
    assert "is better by most" not in result.out, "there is no text on which it is"


def test_other_tokens_are_compared_by_bytes(run: Callable[..., Result], models: Path) -> None:
    result = run("-m", "emoft.compare", models / "good", models / "other", "--test_file", models / "texts.csv")
    assert result.code == 0, result.err
    assert "nats a token" not in result.out and "bits per byte" in result.out.strip().splitlines()[-1]


def test_groups_of_seeds(run: Callable[..., Result], models: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(models / "good", tmp_path / "good-2")
    words = [f"{models / 'bad'},{models / 'bad'}", f"{models / 'good'},{copy}", "--test_file", models / "texts.csv"]
    result = run("-m", "emoft.compare", *words)
    assert result.code == 0, result.err
    assert "B is better" in result.out and "McNemar" not in result.out and "another seed" not in result.out


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "name two models"),
        (["good"], "name two models"),
        (["good", "missing"], "missing"),
        (["good", "plain", "--test_file=texts.csv"], "different forms of a text"),
        (["good,other", "bad", "--test_file=texts.csv"], "have different tokenizers"),
        (["good", "bad", "--test_file=none.csv"], "none.csv"),
    ],
)
def test_what_cannot_be_compared_is_told(
    run: Callable[..., Result], models: Path, tmp_path: Path, words: list[str], told: str
) -> None:
    for path in models.iterdir():
        (tmp_path / path.name).symlink_to(path)
    result = run("-m", "emoft.compare", *words)
    (line,) = [line for line in result.error_lines if "error" in line]
    assert result.code == 2 and told in line
    assert "--models" not in line and "Traceback" not in result.err
