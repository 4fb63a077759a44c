"""The numbers of a step are those of train.py's own loop: of its log, of its checkpoints, of what is edited in it."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Result
from safetensors.torch import load_file
from transformers import GPT2LMHeadModel, GPT2Tokenizer

TRAIN = (ROOT / "train.py").read_text(encoding="utf-8")


@pytest.fixture
def flags(train_file: Path, tiny_model: Path) -> dict[str, object]:
    return {
        "train_file": train_file,
        "delimiter": ";",
        "model_name_or_path": tiny_model,
        "mixed_precision": "no",
        "learning_rate": 1e-3,
        "max_steps": 6,
        "warmup_steps": 2,
    }


def words(flags: dict[str, object], **others: object) -> list[str]:
    return [f"--{name}={value}" for name, value in {**flags, **others}.items()]


@pytest.fixture
def numbers(run: Callable[..., Result], flags: dict[str, object]) -> Callable[..., dict[str, Any]]:
    def watch(code: int = 0, **others: object) -> dict[str, Any]:
        result = run("-m", "emoft.step", *words(flags, **others), "--json")
        assert result.code == code, result.err
        return json.loads(result.out)

    return watch


@pytest.fixture
def trained(run: Callable[..., Result], flags: dict[str, object], tmp_path: Path) -> Path:
    """The same run by train.py, with its log and a checkpoint of each step."""
    every = {"logging_steps": 1, "save_steps": 1, "save_total_limit": 0, "output_dir": tmp_path / "run"}
    result = run("train.py", *words(flags, **every))
    assert result.code == 0, result.err
    return tmp_path / "run"


def test_they_are_those_of_the_run(numbers, trained: Path) -> None:
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    of_step = {entry["step"]: entry for entry in log if "grad_norm" in entry}
    for step in (2, 5):
        found, entry = numbers(step=step), of_step[step]
        assert found["loss"] == pytest.approx(entry["loss"], rel=1e-6)
        assert found["grad_norm"] == pytest.approx(entry["grad_norm"], rel=1e-6)
        assert found["learning_rate"] == entry["learning_rate"]
        weight = found["weight"]
        before, after = (
            float(load_file(trained / f"checkpoint-{n}/model.safetensors")[weight["name"]][tuple(weight["index"])])
            for n in (step - 1, step)
        )
        assert (weight["before"], weight["after"]) == (before, after)
        state = torch.load(trained / f"checkpoint-{step}/training_state.pt", weights_only=True)["optimizer"]["state"]
        moments = {float(each["exp_avg"][tuple(weight["index"])]) for each in state.values() if fits(each, weight)}
        assert any(m == pytest.approx(weight["m"], rel=1e-5) for m in moments)


def fits(state: dict[str, torch.Tensor], weight: dict[str, Any]) -> bool:
    shape = state["exp_avg"].shape
    return len(shape) == len(weight["index"]) and all(i < n for i, n in zip(weight["index"], shape, strict=True))


def test_a_checkpoint_leads_to_the_same_step(numbers, trained: Path, run: Callable[..., Result]) -> None:
    whole = numbers(step=5)
    assert numbers(step=5, resume_from_checkpoint=trained / "checkpoint-3") == whole
    # Its flags need not be given again: the run says them.
    alone = run("-m", "emoft.step", "--resume_from_checkpoint", trained / "checkpoint-4", "--json")
    assert alone.code == 0, alone.err
    assert json.loads(alone.out) == whole
    refused = run("-m", "emoft.step", "--resume_from_checkpoint", trained / "checkpoint-4", "--step", 3)
    assert refused.code == 2
    assert refused.error_lines[-1].endswith(
        "--step 3: the run has 6 steps and the checkpoint stands after step 4, choose one from 5 to 6"
    )


def test_nothing_is_left_behind(numbers, tmp_path: Path) -> None:
    numbers(output_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "others",
    [
        {"batching": "padded"},
        {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2},
        {"mixed_precision": "bf16"},
        {"mixed_precision": "fp16", "step": 5},
        {"max_grad_norm": 0, "weight_decay": 0.1},
        {"max_grad_norm": 0.01, "adam_beta1": 0.5, "adam_beta2": 0.9, "adam_epsilon": 1e-3},
        {"label_contrast": 0.3, "template": "{label}: {text}", "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size": 1, "examples": 1},
        {"gradient_checkpointing": True},
    ],
    ids=lambda others: ", ".join(others),
)
def test_all_that_must_agree_does(numbers, others: dict[str, object]) -> None:
    found = numbers(**others)
    assert [each["name"] for each in found["agreements"] if not each["holds"]] == []
    assert found["step"] == others.get("step", 2)  # the first one moves nothing, since the warmup begins at 0
    assert found["loss_after"] < found["loss_float32"] and found["predicted_change"] < 0
    shown = others.get("examples", 2)
    assert len(found["texts"]) == shown
    for text in found["texts"]:
        assert len(text["ids"]) == len(text["tokens"]) == len(text["targets"]) == len(text["losses"])
        assert text["targets"][:-1] == text["ids"][1:] and text["targets"][-1] is None
        assert text["sees"] == list(range(1, len(text["ids"]) + 1)) and text["positions"][0] == 0
    if shown == found["examples"]:
        losses = [loss for text in found["texts"] for loss in text["losses"] if loss is not None]
        assert sum(losses) / found["tokens"] == pytest.approx(found["loss"], rel=1e-4)
    assert math.hypot(*found["gradient_norms"].values()) == pytest.approx(found["grad_norm"], rel=1e-4)
    assert found["clip_factor"] == pytest.approx(min(1, (others.get("max_grad_norm", 1) or 1e9) / found["grad_norm"]))


def edited(folder: Path, source: str) -> Path:
    """A script that runs the command with another train.py."""
    (folder / "train.py").write_text(source, encoding="utf-8")
    (folder / "edited.py").write_text(
        f"import runpy, sys\nsys.path[:0] = [{str(folder)!r}, {str(ROOT)!r}]\n"
        "runpy.run_module('emoft.step', run_name='__main__', alter_sys=True)\n",
        encoding="utf-8",
    )
    return folder / "edited.py"


@pytest.mark.parametrize(
    ("before", "after", "fails"),
    [
        ("targets = shift_labels(batch.labels)", "targets = shift_labels(shift_labels(batch.labels))", "targets"),
        ("targets = shift_labels(batch.labels)", "targets = batch.labels", "targets"),
        ("loss = losses.sum() / step.tokens", "loss = losses.mean() / len(step.micro_batches)", "mean"),
        ("loss = losses.sum() / step.tokens", "loss = losses.mean() / len(step.micro_batches)", "cut_1x6"),
        ("scaler.step(optimizer)", "optimizer.grad_scale = None; scaler.step(optimizer)", "update"),
        (".backward()\n", ".backward(); model.transformer.h[1].mlp.c_fc.weight.grad *= 2\n", "gradient"),
    ],
    ids=["shifted twice", "not shifted", "mean of means", "mean of means, cut", "not clipped", "a wrong gradient"],
)
def test_an_edit_of_the_loop_is_seen(
    run: Callable[..., Result], flags: dict[str, object], tmp_path: Path, before: str, after: str, fails: str
) -> None:
    assert TRAIN.count(before) == 1
    script = edited(tmp_path, TRAIN.replace(before, after))
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.01}
    result = run(script, *words(flags, **sizes), "--json")
    assert result.code == 1, result.err
    assert fails in [each["name"] for each in json.loads(result.out)["agreements"] if not each["holds"]]
    said = run(script, *words(flags, **sizes))
    assert said.code == 1 and "[DOES NOT AGREE]" in said.out
    assert after in said.out or ";" in after, "the line as it is now"


def test_another_way_to_clip_agrees_and_to_clip_scaled_gradients_does_not(
    run: Callable[..., Result], flags: dict[str, object], tmp_path: Path
) -> None:
    clips = "clip_in_next_step(optimizer, config.max_grad_norm)"
    unscales = "            scaler.unscale_(optimizer)"
    measures = "            monitor.measure_gradients()"
    sound = TRAIN.replace(clips, "torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)")
    late = TRAIN.replace(unscales, "            pass").replace(measures, unscales + "; monitor.measure_gradients()")
    for code, source in ((0, sound), (1, late)):
        assert source != TRAIN
        result = run(edited(tmp_path, source), *words(flags, max_grad_norm=0.01, mixed_precision="fp16"), "--json")
        assert result.code == code, result.err or result.out
    assert "gradient" in [each["name"] for each in json.loads(result.out)["agreements"] if not each["holds"]]


@pytest.mark.parametrize(
    "others",
    [
        {"per_device_train_batch_size": 7, "examples": 100},
        {"max_length": 2, "no_append_eos": "", "template": "{text}"},
        {"step": 6, "max_train_samples": 9, "per_device_train_batch_size": 4},
        {"weight_decay": 0, "lr_scheduler_type": "cosine", "warmup_steps": 0},
    ],
    ids=["a prime number of texts, all shown", "texts of two tokens", "the last step", "no decay"],
)
def test_odd_steps_are_shown_too(
    run: Callable[..., Result], flags: dict[str, object], others: dict[str, object]
) -> None:
    given = [f"--{name}" if value == "" else f"--{name}={value}" for name, value in {**flags, **others}.items()]
    result = run("-m", "emoft.step", *given)
    assert result.code == 0, result.err or result.out


def test_a_head_of_its_own_is_told(run: Callable[..., Result], flags: dict[str, object], tmp_path: Path) -> None:
    model = GPT2LMHeadModel.from_pretrained(flags["model_name_or_path"], tie_word_embeddings=False)
    model.save_pretrained(tmp_path / "untied")
    GPT2Tokenizer.from_pretrained(flags["model_name_or_path"]).save_pretrained(tmp_path / "untied")
    given = words({**flags, "model_name_or_path": tmp_path / "untied"})
    result = run("-m", "emoft.step", *given)
    assert result.code == 0, result.err or result.out
    assert "The head has weights of its own" in result.out
    found = json.loads(run("-m", "emoft.step", *given, "--json").out)
    assert found["embedding_from_head"] == pytest.approx(found["gradient_norms"]["lm_head"])
    assert found["embedding_from_input"] == pytest.approx(found["gradient_norms"]["wte"])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--step", "99999"], "--step 99999: the run has 1488 steps, choose one from 1 to 1488"),
        (["--output", "nowhere/page.html"], "make it first or name another"),
        (["--output", "."], "--output . is a folder: name a file in it, such as page.html"),
        (["--train_file", "nowhere.txt"], "--train_file nowhere.txt: no such file, check the path"),
        (["--language", "fr"], "--language fr: choose en or km"),
        (["--resume_from_checkpoint", "latest"], "emoft-demo holds no checkpoint, name the folder of one"),
        (["--learning_rate", "1e30", "--step", "3"], "python train.py with the same flags finds where it begins"),
        (["--mixed_precision", "fp16", "--step", "1", "--config_overrides", "n_layer=1,n_embd=8,n_head=1"], ""),
    ],
)
def test_what_cannot_be_shown_is_told_in_a_line(run: Callable[..., Result], words: list[str], line: str) -> None:
    result = run("-m", "emoft.step", *words)
    if not line:
        assert result.code == 0, result.err
        return
    assert (result.code, result.out) == (2, "")
    assert result.error_lines[-1].startswith("emoft.step: error: ") and result.error_lines[-1].endswith(line)


def test_several_processes_are_refused(run: Callable[..., Result]) -> None:
    result = run("-m", "emoft.step", LOCAL_RANK="0")
    assert result.code == 2 and "start it without torchrun" in result.err
