"""The ladder: each rung computes the same step, and the command tells what each brings."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from transformers import GPT2LMHeadModel

from emoft.benchmark.contenders import Contender
from emoft.benchmark.ladder import HALF, MEMORY, PLAIN, RUNGS, Row, Rung, add_rows, windows
from emoft.config import TrainConfig
from emoft.training.precision import Precision

TEXTS = [[5, 9, 2, 7, 0], [11, 4, 0], [3, 3, 8, 1, 6, 2, 0], [12, 0]]


def train(name: str, model_dir: Path, precision: str) -> tuple[list[float], torch.Tensor]:
    """The losses of three steps on one rung, and the weights afterwards.

    AdamW divides by the size of a gradient, and would show the rounding of the smallest ones as large as a step: its
    term against division by zero is above that.
    """
    model = GPT2LMHeadModel.from_pretrained(model_dir).train()
    config = TrainConfig(learning_rate=1e-2, weight_decay=0.1, max_grad_norm=0.5, adam_epsilon=1e-5)
    rung = Rung(name, model, config, Precision(precision, torch.device("cpu")))
    losses = [float(rung.step(rung.collate(TEXTS[start : start + 3]))) for start in (0, 1, 0)]
    return losses, torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("name", [name for name in RUNGS[1:] if name != MEMORY])  # which is of the whole process
def test_each_rung_is_the_same_step(still_model: Path, name: str) -> None:
    losses, weights = train(PLAIN, still_model, "no")
    assert losses[0] > losses[2] > 0
    for precision, tolerance in (("no", 1e-5), ("bf16", 0.02)):
        other_losses, other = train(name, still_model, precision)
        assert other_losses == pytest.approx(losses, rel=tolerance)
        if precision == "no":
            torch.testing.assert_close(other, weights, rtol=1e-3, atol=2e-6)


def test_each_rung_adds_one_thing() -> None:
    assert len(set(RUNGS)) == len(RUNGS) == 10
    rows: list[Row] = []
    add_rows(rows, 4, {RUNGS[0]: measured(4.0, 6.0), RUNGS[1]: measured(2.0, 3.0)})
    # In the turns of the next window all is slower, but not by the rung.
    add_rows(rows, 4, {RUNGS[0]: measured(8.0, 9.0), RUNGS[1]: measured(4.0, 6.0), RUNGS[2]: measured(1.0, 2.0)})
    plain, second, last = rows
    assert (plain.seconds_per_step, plain.to_rung_before, plain.to_plain) == (5.0, 1.0, 1.0)
    assert (second.seconds_per_step, second.to_rung_before, second.to_plain) == (2.5, 2.0, 2.0)
    assert (last.seconds_per_step, last.to_rung_before, last.to_plain) == (1.5, 3.5, 6.25)
    assert last.peak_memory_gib == 1.0
    for rungs in (list(RUNGS), list(RUNGS[:9])):
        found = windows(rungs)
        assert list(dict.fromkeys(name for window in found for name in window)) == rungs
        for window in found:
            assert window[0] == rungs[0]
            new = rungs.index(window[-1])
            assert rungs[new - 1] in window, "each is compared with the one before"


def measured(*seconds: float) -> Contender:
    """A contender that has taken its turns."""
    contender = Contender.__new__(Contender)
    contender.seconds, contender.peak = list(seconds), 2**30
    return contender


def test_the_command_climbs_it(tiny_model: Path, tmp_path: Path) -> None:
    words = ["--compare", "ladder", "--model_name_or_path", tiny_model, "--batch_sizes", 2, "--turns", 1]
    words += ["--steps", 1, "--warmup_steps", 1, "--mixed_precision", "no", "--output_dir", tmp_path / "out"]
    result = subprocess.run(
        [sys.executable, "-m", "emoft.benchmark", *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out/benchmark.json").read_text())["rows"]
    assert [row["rung"] for row in rows] == [name for name in RUNGS if name != HALF]
    assert "no rung of half precision" in result.stdout
    for row in rows:
        assert f"| 2 | {row['rung']} | " in result.stdout
        assert row["seconds_per_step"] > 0 and row["to_rung_before"] > 0
