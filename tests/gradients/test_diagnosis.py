"""Planted faults, each in a run of the real train.py, and what `python -m emoft.gradients` says of them."""

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Result, WarmScripts
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.gradients.curves import Curve
from emoft.gradients.diagnosis import depth_trend, diagnose

LEARNING_RATE = 3e-3


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of four blocks as it starts, with a tokenizer of the bundled sentences."""
    from emoft.model.loading import fresh_model, train_tokenizer

    folder = tmp_path_factory.mktemp("fresh")
    texts = (ROOT / "emoft/sample/train.csv").read_text(encoding="utf-8").splitlines()[1:]
    tokenizer = train_tokenizer([text.rpartition(",")[0] for text in texts], 500)
    torch.manual_seed(0)
    fresh_model("n_layer=4,n_embd=64,n_head=4,n_positions=64", tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def diagnosis_of(scripts: WarmScripts, fresh: Path, tmp_path: Path) -> Callable[..., dict]:
    """Train for 100 steps with a fault planted; return the findings by name, and check what is printed of them."""

    def run(model: Path = fresh, plant: str = "", **settings: object) -> dict[str, dict]:
        script = tmp_path / "planted.py"
        script.write_text(
            f"import sys, runpy\nsys.path.insert(0, {str(ROOT)!r})\n{plant}\n"
            f"runpy.run_path({str(ROOT / 'train.py')!r}, run_name='__main__')\n"
        )
        values = {
            "model_name_or_path": model,
            "train_file": ROOT / "emoft/sample/train.csv",
            "validation_file": ROOT / "emoft/sample/validation.csv",
            "max_steps": 100,
            "max_eval_samples": 60,
            "per_device_train_batch_size": 8,
            "learning_rate": LEARNING_RATE,
            "warmup_steps": 0.1,
            "logging_steps": 5,
            "log_gradients_every": 20,
            "eval_steps": 50,
            "save_steps": 0,
            "load_best_model_at_end": False,
            "mixed_precision": "no",
            "max_length": 40,
            **settings,
        }
        trained: Result = scripts(str(script), *(f"--{name}={value}" for name, value in values.items()), cwd=tmp_path)
        assert trained.code in (0, 2), trained.err
        found = scripts("-m", "emoft.gradients", tmp_path / "gpt2-emotion-finetuned", "--json", cwd=tmp_path)
        assert found.code == 0, found.err
        findings = json.loads(found.out)["findings"]
        printed = scripts("-m", "emoft.gradients", tmp_path / "gpt2-emotion-finetuned", cwd=tmp_path)
        assert printed.code == 0
        assert all(finding["text"] in printed.out and finding["tag"] in printed.out for finding in findings)
        assert ("nothing is wrong" in printed.out) == (not findings)
        return {finding["name"]: finding for finding in findings}

    return run


def diagnose_run(folder: Path, *flags: str) -> Result:
    done = subprocess.run(
        [sys.executable, "-m", "emoft.gradients", str(folder), *flags],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120"},
    )
    return Result(done.returncode, done.stdout, done.stderr)


def changed(fresh: Path, folder: Path, change: Callable[[GPT2LMHeadModel], object]) -> Path:
    model = GPT2LMHeadModel.from_pretrained(fresh)
    with torch.no_grad():
        change(model)
    model.save_pretrained(folder)
    GPT2Tokenizer.from_pretrained(fresh).save_pretrained(folder)
    return folder


class TestPlantedFaults:
    def test_a_healthy_run(self, diagnosis_of) -> None:
        assert diagnosis_of() == {}

    def test_a_learning_rate_1000_times_too_high(self, diagnosis_of) -> None:
        found = diagnosis_of(learning_rate=1000 * LEARNING_RATE)
        assert {"diverged", "clipped_too_often"} <= set(found)
        assert "Lower --learning_rate" in found["diverged"]["text"]

    def test_a_layer_100_times_too_large(self, diagnosis_of, fresh, tmp_path) -> None:
        model = changed(fresh, tmp_path / "m", lambda m: m.transformer.h[2].mlp.c_fc.weight.mul_(100))
        found = diagnosis_of(model)
        assert found["layer_scale"]["tag"] == "weight_norm/h02.mlp.c_fc"
        assert re.search(r"the weights of h02\.mlp\.c_fc are (9\d|10\d) times as large", found["layer_scale"]["text"])

    def test_a_frozen_block(self, diagnosis_of) -> None:
        plant = (
            "import emoft.model.loading\nload = emoft.model.loading.load_model_and_tokenizer\n"
            "def frozen(*args):\n"
            "    model, tokenizer = load(*args)\n"
            "    model.transformer.h[1].requires_grad_(False)\n"
            "    return model, tokenizer\n"
            "emoft.model.loading.load_model_and_tokenizer = frozen"
        )
        found = diagnosis_of(plant=plant)
        assert set(found) == {"frozen"}
        assert found["frozen"]["tag"] == "update_ratio/h01"
        assert found["frozen"]["text"].startswith("h01 does not learn")

    def test_a_nan_weight(self, diagnosis_of, fresh, tmp_path) -> None:
        def plant(model: GPT2LMHeadModel) -> None:
            model.transformer.h[3].attn.c_proj.weight[1, 1] = math.nan

        found = diagnosis_of(changed(fresh, tmp_path / "m", plant))
        assert found["not_finite"]["steps"] == [1]
        report = json.loads((tmp_path / "gpt2-emotion-finetuned/nonfinite-1.json").read_text())
        assert report["parameters_not_finite"] == ["transformer.h.3.attn.c_proj.weight"]

    def test_an_infinite_value_in_one_examples_path(self, diagnosis_of, fresh, tmp_path) -> None:
        model = changed(fresh, tmp_path / "m", lambda m: m.transformer.wpe.weight[34].fill_(math.inf))
        found = diagnosis_of(model, on_nonfinite="skip")
        assert found["not_finite"]["steps"]
        for step in found["not_finite"]["steps"]:
            report = json.loads((tmp_path / f"gpt2-emotion-finetuned/nonfinite-{step}.json").read_text())
            long = [place for place, ids in enumerate(report["token_ids"]) if len(ids) > 34]
            assert report["examples_at_fault"] == long

    def test_labels_shifted_by_one_too_many(self, diagnosis_of) -> None:
        plant = (
            "import emoft.training.loss\nonce = emoft.training.loss.shift_labels\n"
            "emoft.training.loss.shift_labels = lambda labels: once(once(labels))"
        )
        found = diagnosis_of(plant=plant)
        assert set(found) == {"labels_misaligned"}
        assert found["labels_misaligned"]["tag"] == "train/label_alignment"


# ---- The rules by themselves, on curves made by hand ---------------------------------------------------------------


def falling(entries: int = 60, first: float = 6.0, last: float = 3.0) -> Curve:
    return {step + 1: first + (last - first) * step / (entries - 1) for step in range(entries)}


def names(curves: dict[str, Curve]) -> set[str]:
    return {finding.name for finding in diagnose(curves)}


def test_nothing_is_said_of_what_is_not_there() -> None:
    assert names({}) == set()
    assert names({"train/loss": {1: 5.0}}) == set()


def test_loss_spikes_are_named_by_step() -> None:
    curve = falling()
    curve[30], curve[45] = 9.0, 8.0
    (finding,) = diagnose({"train/loss": curve})
    assert (finding.name, finding.steps) == ("loss_spikes", [30, 45])
    assert names({"train/loss": falling()}) == set()


def test_a_loss_that_does_not_fall() -> None:
    assert names({"train/loss": falling(last=5.95)}) == {"loss_does_not_fall"}
    assert names({"train/loss": falling(), "train/unigram_entropy": {1: 3.5}}) == set()
    assert names({"train/loss": falling(last=4.0), "train/unigram_entropy": {1: 3.5}}) == {"context_not_used"}


def test_a_loss_that_rises() -> None:
    curve = {step: 6.0 + min(step, 60 - step) / 10 for step in range(1, 61)}
    (finding,) = diagnose({"train/loss": curve})
    assert (finding.name, finding.steps) == ("diverged", [29])  # of three equally high in the middle the first


def test_overfitting() -> None:
    curves = {"train/loss": falling(), "eval/loss": {20: 5.0, 40: 4.0, 60: 4.5}}
    (finding,) = diagnose(curves)
    assert (finding.name, finding.steps) == ("overfitting", [40, 60])
    assert names({**curves, "eval/loss": {20: 5.0, 40: 4.0, 60: 4.01}}) == set()


@pytest.mark.parametrize(("ratio", "expected"), [(1e-3, {"vanishing"}), (0.1, set()), (1e3, {"exploding"}), (5, set())])
def test_the_trend_by_depth(ratio: float, expected: set[str]) -> None:
    curves = {
        f"gradient_norm/h{block:02}": dict.fromkeys((10, 20, 30), ratio ** (1 - block / 11)) for block in range(12)
    }
    assert names(curves) == expected
    assert depth_trend(curves) == pytest.approx(ratio)


@pytest.mark.parametrize(
    ("level", "expected"), [(-3.0, set()), (-6.0, {"update_too_small"}), (-0.5, {"update_too_large"})]
)
def test_the_size_of_updates(level: float, expected: set[str]) -> None:
    curves = {f"gradient_norm/h{block:02}": {10: 1.0} for block in range(3)}
    curves |= {f"update_ratio/h{block:02}": {10: level, 20: -12.0} for block in range(3)}
    assert names(curves) == expected


def test_clipping_saturation_and_skipping() -> None:
    clipped = {"train/clipped_share": {5: 1.0, 10: 0.95}, "train/grad_norm": {5: 4.0}, "train/max_grad_norm": {5: 1.0}}
    assert names(clipped) == {"clipped_too_often"}
    assert names({**clipped, "train/grad_norm": {5: 2.0}}) == set()
    assert names({**clipped, "train/clipped_share": {5: 1.0, 10: 0.5}}) == set()
    curves = {"gradient_norm/h00": {5: 1.0}, "activation_saturation/h00": {5: 0.97}}
    assert names(curves) == {"dead_units"}
    assert names({"train/skipped_steps": {50: 2.0, 100: 9.0}}) == {"skipped_too_often"}
    assert names({"train/skipped_steps": {50: 2.0, 100: 2.0}}) == set()


@pytest.mark.parametrize("content", [None, b"", b"not an event file at all" * 50])
def test_a_folder_without_a_run(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "events.out.tfevents.1.x").write_bytes(content)
    result = diagnose_run(tmp_path)
    if content is None:
        assert result.code == 2
        assert len(result.error_lines) == 1
        assert str(tmp_path) in result.err
    else:
        assert "Traceback" not in result.err
        assert result.code in (0, 2)
