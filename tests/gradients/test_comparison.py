"""Two runs told apart: the same, other flags, other data, other weights, another order of the same sums."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result
from test_train import flags

from emoft.gradients.comparison import compare
from emoft.gradients.record import Record

Run = Callable[..., Result]
MEASURED = {"max_steps": 8, "logging_steps": 1, "log_gradients_every": 2, "mixed_precision": "no"}


@pytest.fixture
def compared(run: Run, still_model: Path, train_file: Path, validation_file: Path) -> Callable[..., dict]:
    """Train twice, with some flags of the second changed, and compare."""

    def train_and_compare(**changed: object) -> dict:
        for name, more in (("a", {}), ("b", changed)):
            settings = {**MEASURED, "validation_file": validation_file, **more, "output_dir": name}
            words = flags(still_model, settings.pop("train_file", train_file), **settings)
            assert run("train.py", *words).code == 0
        told = run("-m", "emoft.gradients", "a", "b", "--json")
        assert told.code == 0, told.err
        shown = run("-m", "emoft.gradients", "a", "b")
        assert shown.code == 0
        return {**json.loads(told.out), "told": shown.out}

    return train_and_compare


def test_the_same_run_twice(compared: Callable[..., dict]) -> None:
    found = compared()
    assert (found["flags"], found["first"], found["data"]) == ({}, [], {"train": True, "validation": True})
    assert found["compared"] > 200 and found["last_common_step"] == 8
    assert "are the same, up to step 8" in found["told"]


def test_another_learning_rate(compared: Callable[..., dict]) -> None:
    found = compared(learning_rate=2e-3)
    assert set(found["flags"]) == {"learning_rate"}
    assert not found["is_rounding"]
    assert found["first"][0]["step"] == 1, "where the rate is logged"
    assert "--learning_rate: 0.001 and 0.002" in found["told"]


def test_other_texts(compared: Callable[..., dict], validation_file: Path) -> None:
    found = compared(train_file=validation_file)
    assert found["data"] == {"train": False, "validation": True}
    assert "data of train: other texts, or tokens" in found["told"]


def test_another_order_of_the_sums(compared: Callable[..., dict]) -> None:
    """4 x 1 and 1 x 4 examples give the same step but for rounding."""
    found = compared(per_device_train_batch_size=1, gradient_accumulation_steps=4)
    assert set(found["flags"]) == {"per_device_train_batch_size", "gradient_accumulation_steps"}
    assert found["is_rounding"], found["first"]
    assert "by rounding" in found["told"]


def test_one_layer_begins_otherwise(compared: Callable[..., dict], still_model: Path, tmp_path: Path) -> None:
    from transformers import GPT2LMHeadModel, GPT2Tokenizer

    model = GPT2LMHeadModel.from_pretrained(still_model)
    model.transformer.h[1].mlp.c_fc.weight.data *= 1.5
    model.save_pretrained(tmp_path / "other")
    GPT2Tokenizer.from_pretrained(still_model).save_pretrained(tmp_path / "other")
    found = compared(model_name_or_path=tmp_path / "other")
    names = [each["tag"] for each in found["first"] if each["tag"].startswith("weight")]
    assert found["first"][0]["step"] == 0 and names[0] == found["first"][0]["tag"]
    assert set(names) == {"weight_norm/h01", "weights_at_start/mlp.c_fc/h01"}


def test_the_first_block_that_differs_is_named() -> None:
    """In the order of a step: what a later block makes of it, and the gradients, follow from that."""
    curves = {f"activation_norm/h{n:02}": {2: 1.0 + n, 4: 1.0 + n} for n in range(4)} | {
        f"gradient_norm/h{n:02}": {2: 1.0, 4: 1.0} for n in range(4)
    }
    other = {tag: dict(curve) for tag, curve in curves.items()}
    for tag in ("activation_norm/h02", "activation_norm/h03", *(f"gradient_norm/h{n:02}" for n in range(4))):
        other[tag][4] *= 1.5
    found = compare(Record(curves, {"mixed_precision": "no"}), Record(other, {"mixed_precision": "no"}), ["a", "b"])
    assert (found.first[0].step, found.first[0].tag) == (4, "activation_norm/h02")
    assert "the same before step 4, where activation_norm/h02 is 3 and 4.5" in "\n".join(found.describe())


def test_runs_without_a_step_in_common() -> None:
    found = compare(Record({"train/loss": {1: 1.0}}), Record({"train/loss": {2: 1.0}}), ["a", "b"])
    assert "no step in common" in found.describe()[-1]


def test_mistakes_take_a_line(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words in (["empty", "empty"], ["empty", "nowhere"]):
        refused = run("-m", "emoft.gradients", *words)
        assert refused.code == 2 and "holds no run" in refused.error_lines[-1]
