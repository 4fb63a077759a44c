"""What only an accelerator can show: `python -m pytest -m gpu -n 0 -s`, in a few minutes on one device.

Skipped where there is none. EMOFT_GPU_TESTS_ON=cpu runs those of them on the CPU that can run there, to try themselves.
"""

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SENTENCES
from safetensors.torch import load_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

import train
from emoft import device as devices
from emoft.config import TrainConfig
from emoft.data.batching import Batch, pack, pad
from emoft.data.steps import Step
from emoft.distributed.world import World
from emoft.errors import UserError
from emoft.model.attention import use_packed_attention
from emoft.model.kernels import compile_blocks, use_fast_kernels
from emoft.run.run import Run
from emoft.training.loss import cross_entropy, shift_labels
from emoft.training.precision import Precision

CHOSEN = os.environ.get("EMOFT_GPU_TESTS_ON", "")
DEVICE = torch.device(CHOSEN) if CHOSEN else devices.choose_device(use_cpu=False)
IS_REAL = DEVICE.type != "cpu"
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (IS_REAL or CHOSEN), reason="there is no accelerator: torch.accelerator finds none"),
]
needs_device = pytest.mark.skipif(not IS_REAL, reason="the CPU cannot show it")


def make_model(dropout: float) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(n_layer=4, n_embd=256, n_head=4, embd_pdrop=dropout, attn_pdrop=dropout, resid_pdrop=dropout)
    model = GPT2LMHeadModel(config).to(DEVICE).train()
    use_packed_attention(model)
    use_fast_kernels(model)
    return model


def texts(count: int = 16, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(5, 60, (count,), generator=generator).tolist()
    return [{"input_ids": torch.randint(50257, (n,), generator=generator).tolist()} for n in lengths]


def loss_of(model: GPT2LMHeadModel, batch: Batch, precision: Precision) -> Tensor:
    batch = batch.to(DEVICE)
    with precision.autocast():
        hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
        losses = cross_entropy(hidden, model.lm_head.weight, shift_labels(batch.labels), batch.predicting)
    return losses.sum() / batch.target_tokens


@pytest.mark.parametrize(("name", "tolerance"), [("no", 1e-4), ("bf16", 3e-2), ("fp16", 1e-2)])
def test_packed_and_padded_rows_give_the_same_gradients(name: str, tolerance: float) -> None:
    precision, found = Precision(name, DEVICE), []
    for lay_out in (pack, pad):
        model = make_model(dropout=0.0)
        loss = loss_of(model, lay_out(texts(), 50256, devices.token_multiple(DEVICE)), precision)
        loss.backward()
        found.append((float(loss), torch.cat([p.grad.float().flatten() for p in model.parameters()])))
    (loss, gradient), (other_loss, other) = found
    assert loss == pytest.approx(other_loss, rel=tolerance)
    assert float((gradient - other).norm() / other.norm()) < 3 * tolerance


@pytest.mark.parametrize("name", ["no", "bf16"])
def test_dropout_leaves_the_mean_of_the_loss(name: str) -> None:
    precision, model = Precision(name, DEVICE), make_model(dropout=0.1)
    means = []
    for lay_out in (pack, pad):
        batch = lay_out(texts(), 50256, devices.token_multiple(DEVICE))
        with torch.no_grad():
            means.append(sum(float(loss_of(model, batch, precision)) for _ in range(20)) / 20)
    assert means[0] == pytest.approx(means[1], rel=5e-3)


class Watched(Run):
    """A run that lets a step wait for nothing where it logs nothing, after its first ones."""

    planted_at = 0

    def steps(self) -> Iterator[Step]:
        for step in super().steps():
            if step.number == self.planted_at:
                self.planted_at = 0
                with torch.no_grad():
                    self.setup.text_model.model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan
            waits_for_nothing = DEVICE.type == "cuda" and step.number > 3 and not self.timetable.logs(step.number)
            if waits_for_nothing:
                torch.cuda.set_sync_debug_mode("error")
            try:
                yield step
            finally:
                if waits_for_nothing:
                    torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def config(tmp_path: Path) -> TrainConfig:
    file = tmp_path / "texts.csv"
    file.write_text("text,label\n" + "".join(f"{text},{label}\n" for text, label in SENTENCES * 3), encoding="utf-8")
    return TrainConfig(
        model_name_or_path="",
        config_overrides="n_layer=2,n_embd=64,n_head=2",
        vocab_size=300,
        train_file=str(file),
        output_dir=str(tmp_path / "run"),
        max_steps=20,
        logging_steps=20,
        load_best_model_at_end=False,
        use_cpu=not IS_REAL,
        mixed_precision="bf16",
    )


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_twenty_steps_wait_for_nothing(config: TrainConfig, batching: str) -> None:
    config = replace(config, batching=batching)
    assert train.train(config, World(), run_class=Watched) == 0


def test_a_weight_that_becomes_nan_at_step_7_is_named(
    config: TrainConfig, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Watched, "planted_at", 7)
    with pytest.raises(UserError):
        train.train(config, World(), run_class=Watched)
    found = json.loads(next(Path(config.output_dir).glob("nonfinite-*.json")).read_text())
    assert found["step"] == 7 and found["module"].startswith("transformer.h.1.mlp")


def test_fp16_overflows_and_goes_on(config: TrainConfig) -> None:
    """The scale begins at 65,536: a loss of some nats a token, so scaled, overflows at once, and the scale falls."""
    shape = f"{config.config_overrides},initializer_range=0.6"
    config = replace(config, mixed_precision="fp16", learning_rate=1e-3, config_overrides=shape)
    assert train.train(config, World(), run_class=Watched) == 0
    results = json.loads((Path(config.output_dir) / "all_results.json").read_text())
    assert math.isfinite(results["train_loss"])


def test_a_resumed_run_ends_with_the_same_weights(config: TrainConfig) -> None:
    weights = []
    for name, limits in (("whole", (0,)), ("parts", (7, 0))):
        for limit in limits:
            folder = f"{config.output_dir}-{name}"
            each = replace(config, output_dir=folder, save_steps=7, resume_from_checkpoint="latest")
            stop = StoppedAt if limit else Watched
            train.train(each, World(), run_class=stop)
        weights.append(load_file(Path(each.output_dir) / "model.safetensors"))
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


class StoppedAt(Watched):
    """A run that is stopped after its seventh step, which it has saved."""

    def finish_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        return super().finish_step(step, loss, grad_norm) or step.number == 7

    def finish(self) -> int:
        with self._opened:
            return 0


@needs_device
def test_it_compiles_once() -> None:
    model, precision = make_model(dropout=0.1), Precision("bf16", DEVICE)
    compile_blocks(model.transformer)
    multiple = devices.token_multiple(DEVICE)
    for seed in range(12):
        batch = pack(texts(seed=seed), 50256, multiple).to(DEVICE)
        stance = "fail_on_recompile" if seed > 3 else "default"
        with torch.compiler.set_stance(stance), precision.autocast():
            model.transformer(**batch.inputs, use_cache=False).last_hidden_state.float().sum().backward()


@needs_device
def test_memory_and_speed_are_told(tmp_path: Path) -> None:
    """Its table is the report: -s shows it."""
    command = [sys.executable, "-m", "emoft.benchmark", "--turns=2", "--steps=5", "--warmup_steps=10"]
    done = subprocess.run([*command, f"--output_dir={tmp_path}"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stdout)
    rows = json.loads((tmp_path / "benchmark.json").read_text())
    assert devices.describe_device(DEVICE) in rows["machine"]
