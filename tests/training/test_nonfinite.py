"""Planted infinite and NaN values: refused, and traced to where they were planted."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Result, count_hooks, read_scalars
from safetensors.torch import load_file
from test_train import flags, history
from torch import nn
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.config import TrainConfig
from emoft.data.batching import pack
from emoft.data.steps import Step
from emoft.distributed.world import World
from emoft.model.attention import use_packed_attention
from emoft.training.loss import cross_entropy, shift_labels
from emoft.training.nonfinite import REPETITIONS, Fault, NonFiniteGuard, describe
from emoft.training.optimizer import build_optimizer, clip_in_next_step
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime

CPU = torch.device("cpu")
FP32 = Precision("no", CPU)
ALONE = Runtime(World(), FP32)
TEXTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10, 11]]


def step_of(number: int, texts: list[list[list[int]]] = ()) -> Step:
    """A step of one micro-batch for each list of texts."""
    batches = [pack([{"input_ids": text} for text in part], pad_id=0, multiple=8) for part in texts]
    lengths = np.array([len(text) for part in texts for text in part], dtype=np.int64)
    return Step(number, list(range(len(lengths))), lengths, batches)


def guard_of(model: nn.Module, runtime: Runtime = ALONE) -> NonFiniteGuard:
    return NonFiniteGuard(model, build_optimizer(model, TrainConfig(weight_decay=0.1)), runtime, "stop")


@pytest.mark.parametrize(("value", "is_refused"), [(1.0, False), (math.inf, True), (math.nan, True)])
@pytest.mark.parametrize("place", ["loss", "gradient"])
@pytest.mark.parametrize("looks", [True, False])
def test_a_step_that_is_not_finite_changes_nothing(place: str, value: float, is_refused: bool, looks: bool) -> None:
    model = nn.Linear(3, 1)
    guard = guard_of(model)
    optimizer, guard.looks_always = guard.optimizer, False
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()  # so that there are moments to spoil
    before = [parameter.detach().clone() for parameter in model.parameters()]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    loss = torch.tensor(value if place == "loss" else 1.0)
    if place == "gradient":
        model.weight.grad[0, 0] = value
    step = step_of(7)
    guard.begin_step(step)
    found = guard.refuses(step, loss, clip_in_next_step(optimizer, 1.0), looks)
    assert found == (is_refused and looks)
    assert (guard.bad_step is step) == found
    assert all(parameter.grad is None for parameter in model.parameters()) == found
    if not found:
        optimizer.step()
    after = list(model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) == is_refused
    now = [state["exp_avg"] for state in optimizer.state.values()]
    assert all(torch.equal(a, b) for a, b in zip(moments, now, strict=True)) == is_refused


def test_where_nobody_looks_at_every_step_nothing_is_updated_until_somebody_does() -> None:
    model = nn.Linear(3, 1)
    guard = guard_of(model)
    guard.looks_always = False
    states, refused = [], []
    for number, loss in enumerate([1.0, math.nan, 1.0, 1.0], start=1):
        model(torch.ones(1, 3)).sum().backward()
        step = step_of(number)
        guard.begin_step(step)
        norm = clip_in_next_step(guard.optimizer, 1.0)
        refused.append(guard.refuses(step, torch.tensor(loss), norm, looks=number == 4))
        if not refused[-1]:
            guard.optimizer.step()
        guard.optimizer.zero_grad()
        states.append(model.weight.detach().clone())
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[1], states[3])
    assert refused == [False, False, False, True]
    assert guard.bad_step.number == 2, "the first of them is the one to be repeated"


def test_an_overflow_of_fp16_is_no_fault_until_no_scale_can_help() -> None:
    model = nn.Linear(1, 1)
    precision = Precision("fp16", CPU)
    runtime = Runtime(World(), precision)
    assert guard_of(model, runtime).looks_always

    def is_fault(loss: float, norm: float, scale: float) -> bool:
        precision.scaler.load_state_dict({**precision.scaler.state_dict(), "scale": scale})
        precision.scaler.scale(torch.zeros(()))  # as the loop has done with its loss
        guard, step = guard_of(model, runtime), step_of(1)
        guard.begin_step(step)
        is_refused = guard.refuses(step, torch.tensor(loss), torch.tensor(norm), looks=False)
        assert precision.scaler.get_scale() == scale, "a step that is refused does not move the scale"
        return is_refused

    assert not is_fault(1.0, math.inf, 65536.0)
    assert is_fault(math.nan, math.nan, 65536.0)
    assert is_fault(1.0, math.inf, 0.5)
    assert not is_fault(1.0, 1.0, 0.5)


def test_another_optimizer_would_not_leave_out_the_step() -> None:
    model = nn.Linear(1, 1)
    guard = NonFiniteGuard(model, torch.optim.AdamW(model.parameters()), Runtime(World(), FP32), "stop")
    guard.looks_always = False  # as on a GPU
    step = step_of(1)
    guard.begin_step(step)
    with pytest.raises(TypeError, match="AdamW does not skip a step by itself"):
        guard.refuses(step, torch.tensor(1.0), torch.tensor(1.0), looks=False)


class TestTrace:
    @pytest.fixture
    def model(self, tiny_model: Path) -> GPT2LMHeadModel:
        model = GPT2LMHeadModel.from_pretrained(tiny_model)
        use_packed_attention(model)
        return model.train()

    def compute(self, model: GPT2LMHeadModel, step: Step) -> torch.Tensor:
        """What the loop of train.py does with a step, up to its loss."""
        step_loss = torch.zeros(())
        for batch in step.micro_batches:
            hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
            targets = shift_labels(batch.labels)
            loss = cross_entropy(hidden, model.lm_head.weight, targets, batch.predicting).sum() / step.tokens
            loss.backward()
            step_loss += loss.detach()
        return step_loss

    def repeat(self, model: GPT2LMHeadModel, step: Step) -> Fault:
        """Compute a step, and once more if it is refused, as `Run.steps` does."""
        guard = guard_of(model)
        guard.begin_step(step)
        loss = self.compute(model, step)
        if not guard.refuses(step, loss, torch.tensor(math.nan), looks=True):
            raise AssertionError("a norm that is not finite is refused")
        drawn = torch.get_rng_state()
        for bad_step in guard.repetitions():
            assert bad_step is step
            assert torch.equal(torch.get_rng_state(), step.random_state[0]), "it begins as it began before"
            again = self.compute(model, bad_step)
            norm = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
            assert guard.refuses(bad_step, again, norm, looks=True)
            assert again.isnan() or torch.equal(loss, again)
        assert torch.equal(drawn, torch.get_rng_state())
        assert len(guard.faults) == REPETITIONS
        assert guard.bad_step is None
        return guard.fault

    def trace(self, model: GPT2LMHeadModel) -> Fault:
        weights = [parameter.detach().clone() for parameter in model.parameters()]
        fault = self.repeat(model, step_of(3, [TEXTS[:1], TEXTS[1:]]))
        assert all(
            torch.equal(a, b.nan_to_num(nan=0)) or a.isnan().any() or a.isinf().any()
            for a, b in zip(weights, model.parameters(), strict=True)
        )
        assert all(parameter.grad is None for parameter in model.parameters())
        assert count_hooks(model) == 0
        assert fault.token_ids == TEXTS
        return fault

    @pytest.mark.parametrize("block", [0, 1])
    @pytest.mark.parametrize("layer", ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "ln_2"])
    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_a_weight(self, model: GPT2LMHeadModel, block: int, layer: str, value: float) -> None:
        name = f"transformer.h.{block}.{layer}"
        with torch.no_grad():
            model.get_submodule(name).weight.view(-1)[3] = value
        fault = self.trace(model)
        assert (fault.found, fault.module) == ("forward", name)
        assert fault.parameters_not_finite == [f"{name}.weight"]
        assert fault.examples_at_fault == [0], "the first micro-batch shows it"

    def test_a_fault_of_one_repetition_alone(self, model: GPT2LMHeadModel) -> None:
        """A device that computes wrongly now and then."""
        mlp, forwards = model.transformer.h[0].mlp, []
        compute = mlp.forward

        def spoil(hidden: torch.Tensor) -> torch.Tensor:
            forwards.append(hidden)
            return compute(hidden) * (math.nan if len(forwards) == 3 else 1)  # the first repetition's first micro-batch

        mlp.forward = spoil
        fault = self.trace(model)
        assert (fault.found, fault.module, fault.recurred) == ("forward", "transformer.h.0.mlp", 1)
        assert "in one of two repetitions only: the device may be faulty" in describe(fault, [1, 2], ["a", "b"], "x")[1]

    def test_one_example(self, model: GPT2LMHeadModel) -> None:
        with torch.no_grad():
            model.transformer.wpe.weight[4] = math.inf  # only the second text is long enough to come there
        fault = self.trace(model)
        assert (fault.found, fault.module) == ("forward", "transformer.wpe")
        assert fault.examples_at_fault == [1]
        assert fault.values_not_finite == model.config.n_embd

    def test_the_head(self, model: GPT2LMHeadModel) -> None:
        with torch.no_grad():
            model.transformer.wte.weight[399] = math.nan  # a token that no text holds
        fault = self.trace(model)
        assert (fault.found, fault.module) == ("forward", "lm_head")
        assert fault.parameters_not_finite == ["transformer.wte.weight"]

    def test_the_backward_pass(self, model: GPT2LMHeadModel) -> None:
        """sqrt(0) is 0 and its derivative infinite: added to a module's output, it shows in the backward pass only."""
        plant = model.transformer.h[1].ln_2.register_forward_pre_hook(lambda _, args: (args[0] + (args[0] * 0).sqrt(),))
        fault = self.repeat(model, step_of(1, [TEXTS]))
        plant.remove()
        assert fault.found == "backward"
        assert fault.module.startswith("transformer.h.1.attn")
        assert "transformer.h.0.mlp.c_fc.weight" in fault.gradients_not_finite
        assert "transformer.h.1.mlp.c_fc.weight" not in fault.gradients_not_finite
        assert not fault.parameters_not_finite

    def test_a_sound_step(self, model: GPT2LMHeadModel) -> None:
        fault = self.trace(model)
        assert (fault.found, fault.recurred) == ("nowhere", 0)
        assert "when the step was repeated twice: the device may be faulty" in describe(fault, [1], ["a"], "x")[1]


def planted(tiny_model: Path, folder: Path, name: str, index: object, value: float) -> Path:
    """A copy of the tiny model with one of its weights replaced."""
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    with torch.no_grad():
        model.get_parameter(name)[index] = value
    model.save_pretrained(folder)
    GPT2Tokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    return folder


class TestThroughTheScript:
    @pytest.mark.parametrize("batching", ["packed", "padded"])
    @pytest.mark.parametrize("precision", ["no", "fp16"])
    def test_a_nan_weight_is_named(
        self, run: Callable[..., Result], tiny_model, train_file, tmp_path, batching, precision
    ) -> None:
        broken = planted(tiny_model, tmp_path / "broken", "transformer.h.1.mlp.c_fc.weight", (0, 0), math.nan)
        words = flags(broken, train_file, max_steps=3, save_steps=1, batching=batching, mixed_precision=precision)
        result = run("train.py", *words)
        assert result.code == 2
        assert len(result.error_lines) == 1
        for text in ("step 1", "transformer.h.1.mlp.c_fc.weight", "nonfinite-1.json"):
            assert text in result.error_lines[0]
        lines = result.out.splitlines()
        start = next(number for number, line in enumerate(lines) if line.startswith("step 1: the loss is nan"))
        explanation = lines[start : start + 4]
        assert "transformer.h.1.mlp.c_fc are not finite" in explanation[1]
        assert "transformer.h.1.mlp.c_fc.weight" in explanation[2]
        assert "4 of 4 examples" in explanation[3]
        assert f"loss scale of {65536 if precision == 'fp16' else 1}" in explanation[0]
        assert not list((tmp_path / "run").glob("checkpoint-*"))
        assert not (tmp_path / "run" / "model.safetensors").exists()
        report = json.loads((tmp_path / "run" / "nonfinite-1.json").read_text())
        assert report["module"] == "transformer.h.1.mlp.c_fc"
        assert len(report["examples"]) == len(report["texts"]) == len(report["token_ids"]) == 4
        assert read_scalars(tmp_path / "run")["train/nonfinite_steps"] == {1: 1.0}

    @pytest.fixture
    def long_text(self, tiny_model: Path, tmp_path: Path) -> tuple[Path, Path, str]:
        """A data set of which one text reaches a position that is infinite in the model; and that text."""
        text = (
            "a text that is longer than all of the others by far, so that it alone comes to the end the end the end now"
        )
        lines = [f"a short message number {number};joy" for number in range(23)]
        lines.insert(9, f"{text};joy")
        (tmp_path / "data.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
        model = planted(tiny_model, tmp_path / "broken", "transformer.wpe.weight", (30, slice(None)), math.inf)
        return model, tmp_path / "data.txt", text

    def test_the_example_is_named_and_nothing_is_lost(self, run, long_text, tmp_path) -> None:
        model, data, text = long_text
        words = flags(model, data, num_train_epochs=1, template="{text}")
        first = run("train.py", *words)
        assert first.code == 2
        report_file = next((tmp_path / "run").glob("nonfinite-*.json"))
        report = json.loads(report_file.read_text())
        step = report["step"]
        assert step > 1, "the test needs a step before"
        at_fault = report["examples_at_fault"]
        assert [report["texts"][place] for place in at_fault] == [text]
        assert [report["examples"][place] for place in at_fault] == [9]
        assert report["module"] == "transformer.wpe"
        # Not even the weights are finite, so nothing is saved that a resume would choke on; with a cure it would be.
        assert not list((tmp_path / "run").glob("checkpoint-*"))

    def test_where_nobody_looked_the_run_goes_back_to_before_the_step(
        self, run, tiny_model, long_text, tmp_path
    ) -> None:
        """As on a GPU: the step is found when the last one logs, and nothing since has been applied."""
        (tmp_path / "deferred.py").write_text(f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import emoft.model.loading, emoft.training.nonfinite
guard, load = emoft.training.nonfinite.NonFiniteGuard, emoft.model.loading.load_model_and_tokenizer
begin = guard.__init__
def deferred(self, *arguments):
    begin(self, *arguments)
    self.looks_always = False
def spoiled(*arguments):
    model, tokenizer = load(*arguments)
    model.transformer.wpe.register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == 30).unsqueeze(-1), float("inf"))
    )
    return model, tokenizer
guard.__init__, emoft.model.loading.load_model_and_tokenizer = deferred, spoiled
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
        words = flags(
            tiny_model, long_text[1], max_steps=18, logging_steps=50, save_steps=0, template="{text}", warmup_steps=3
        )
        first = run(tmp_path / "deferred.py", *words)
        assert first.code == 2, first.err
        (report_file,) = (tmp_path / "run").glob("nonfinite-*.json")
        step = int(report_file.stem.split("-")[1])
        assert 1 < step <= 6, "in the first epoch, and not at its start"
        assert f"saved run/checkpoint-{step - 1}" in first.error_lines[-1]
        words = [word for word in words if "save_steps" not in word]
        undisturbed = run("train.py", *words, f"--save_steps={step - 1}", "--save_total_limit=0", "--output_dir=whole")
        assert undisturbed.code == 0, undisturbed.err
        ours, theirs = (tmp_path / name / f"checkpoint-{step - 1}" for name in ("run", "whole"))
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()
        left, right = (torch.load(each / "training_state.pt", weights_only=True) for each in (ours, theirs))
        for name in ("schedule", "random_states", "data_checksum"):
            assert str(left[name]) == str(right[name]), name
        assert str(left["optimizer"]) == str(right["optimizer"])
        for name in ("step", "samples", "tokens", "loss_sum", "loss_tokens", "clipped_steps", "depth_steps"):
            assert left["run"][name] == right["run"][name], name

    @pytest.mark.parametrize(
        ("after", "line", "where"),
        [
            ("losses, contrast = label_contrast", "losses = (losses - losses).sqrt() / 0", "train.py itself"),
            ("step_loss += loss.detach()", "step_loss /= 0 * step_loss", "train.py itself"),
        ],
    )
    def test_lines_of_the_loop_itself(self, run, tiny_model, train_file, tmp_path, after, line, where) -> None:
        loop = (ROOT / "train.py").read_text()
        (found,) = [each for each in loop.splitlines() if each.strip().startswith(after)]
        indent = found[: len(found) - len(found.lstrip())]
        edited = loop.replace(found, f"{found}\n{indent}{line}")
        (tmp_path / "edited.py").write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{edited}")
        result = run(tmp_path / "edited.py", *flags(tiny_model, train_file, max_steps=2))
        assert result.code == 2, result.err
        assert where in result.out
        assert "device may be faulty" not in result.out
        assert "there is no checkpoint yet" in result.error_lines[-1]

    def test_skip_drops_the_step_and_goes_on(self, run, long_text, tmp_path) -> None:
        model, data, _ = long_text
        result = run("train.py", *flags(model, data, num_train_epochs=3, template="{text}", on_nonfinite="skip"))
        assert result.code == 0, result.err
        entries = [entry for entry in history(tmp_path / "run") if "loss" in entry]
        faults = sorted(int(path.stem.split("-")[1]) for path in (tmp_path / "run").glob("nonfinite-*.json"))
        assert len(entries) == 18
        assert len(faults) == 3, "once an epoch"
        assert result.out.count("nothing of this step was applied") == 3
        rates = [entry["learning_rate"] for entry in entries]
        for step in range(2, 19):
            assert (rates[step - 1] == rates[step - 2]) == (step - 1 in faults), "the schedule waits"
        curve = read_scalars(tmp_path / "run")["train/nonfinite_steps"]
        assert curve[18] == 3
        weights = load_file(tmp_path / "run/model.safetensors")
        assert all(tensor.isfinite().all() for name, tensor in weights.items() if name != "transformer.wpe.weight")

    def test_ten_in_a_row_stop(self, run, tiny_model, train_file, tmp_path) -> None:
        broken = planted(tiny_model, tmp_path / "broken", "transformer.h.0.ln_1.weight", 0, math.inf)
        result = run("train.py", *flags(broken, train_file, max_steps=30, on_nonfinite="skip"))
        assert result.code == 2
        assert "step 10" in result.error_lines[-1]
        assert "9 steps before" in result.error_lines[-1]

    def test_a_fault_is_saved_before_and_replayed_by_resuming(self, run, tiny_model, train_file, tmp_path) -> None:
        """A step so large that the next one overflows: its weights are finite, so the run can be taken up again."""
        words = flags(tiny_model, train_file, max_steps=30, learning_rate=1e30, warmup_steps=4)
        first = run("train.py", *words)
        assert first.code == 2, first.out
        step = max(int(path.stem.split("-")[1]) for path in (tmp_path / "run").glob("nonfinite-*.json"))
        report = (tmp_path / "run" / f"nonfinite-{step}.json").read_text()
        assert (tmp_path / "run" / f"checkpoint-{step - 1}").is_dir()
        assert f"saved run/checkpoint-{step - 1}" in first.error_lines[-1]
        again = run("train.py", *words, "--resume_from_checkpoint", "latest")
        assert again.code == 2
        assert (tmp_path / "run" / f"nonfinite-{step}.json").read_text() == report
