"""The texts of a step, of real runs of train.py."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result
from test_train import flags, history

RATES = {"save_steps": 1, "save_total_limit": 0, "template": "{label}: {text}"}


@pytest.mark.parametrize(("step", "batch_size"), [(14, 4), (3, 1)])  # the first is of the second epoch
def test_they_are_those_that_the_step_was_computed_on(
    run: Callable[..., Result], still_model: Path, train_file: Path, tmp_path: Path, step: int, batch_size: int
) -> None:
    """Measured at the checkpoint before it, and without dropout, they give the loss that was logged."""
    words = flags(still_model, train_file, max_steps=step, per_device_train_batch_size=batch_size, **RATES)
    assert run("train.py", *words).code == 0
    shown = run("-m", "emoft.gradients", "run", f"--step={step}", "--gradient_norms", "--json")
    assert shown.code == 0, shown.err
    found = json.loads(shown.out)
    (logged,) = [entry for entry in history(tmp_path / "run") if entry["step"] == step and "loss" in entry]
    assert found["measured_at"] == f"run/checkpoint-{step - 1}"
    assert found["epoch"] == (step - 1) * batch_size // 48
    losses = [text["loss"] for text in found["texts"]]
    assert losses == sorted(losses, reverse=True), "the hardest one first"
    targets = [text["tokens"] - 1 for text in found["texts"]]
    mean = sum(loss * count for loss, count in zip(losses, targets, strict=True)) / sum(targets)
    assert mean == pytest.approx(logged["loss"], rel=1e-5)
    lines = [line.rpartition(";") for line in train_file.read_text(encoding="utf-8").splitlines()]
    for text in found["texts"]:
        words_of_row, _, label = lines[text["row"]]
        assert text["text"] == f"{label}: {words_of_row}"
    if batch_size == 1:
        assert found["texts"][0]["gradient_norm"] == pytest.approx(logged["grad_norm"], rel=1e-4)
    printed = run("-m", "emoft.gradients", "run", f"--step={step}")
    assert all(text["text"] in line for text, line in zip(found["texts"], printed.out.splitlines()[2:], strict=True))


def test_what_cannot_be_shown_is_one_line(
    run: Callable[..., Result], tiny_model: Path, train_file: Path, tmp_path: Path
) -> None:
    assert run("train.py", *flags(tiny_model, train_file, max_steps=3)).code == 0
    (tmp_path / "run/train_config.yaml").rename(tmp_path / "kept.yaml")
    for words, said in (
        (["--step=2"], "train_config.yaml"),
        (["--gradient_norms"], "add --step"),
    ):
        result = run("-m", "emoft.gradients", "run", *words)
        assert result.code == 2
        assert said in result.error_lines[-1]
    (tmp_path / "kept.yaml").rename(tmp_path / "run/train_config.yaml")
    beyond = run("-m", "emoft.gradients", "run", "--step=4")
    assert beyond.code == 2
    assert "has come to step 3" in beyond.error_lines[-1]
    (tmp_path / "run/model.safetensors").unlink()
    without = run("-m", "emoft.gradients", "run", "--step=2")
    assert without.code == 2
    assert "no model yet" in without.error_lines[-1]
