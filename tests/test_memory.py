"""A run that does not fit in memory ends in one line, loses nothing, and goes on by the command that it names."""

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Result
from safetensors.torch import load_file

from emoft.config import TrainConfig
from emoft.errors import is_out_of_memory, memory_asked_for
from emoft.hints import smaller_micro_batches

# Sets a real limit to the memory of the process as its first step begins: what is in use, and 64 MB.
LIMITED = """
import resource, runpy, sys
sys.path.insert(0, {root!r})
import emoft.run
begin = emoft.run.NonFiniteGuard.begin_step
def begin_step(self, step):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20), -1))
    begin(self, step)
emoft.run.NonFiniteGuard.begin_step = begin_step
sys.argv[0] = {root!r} + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Raises what torch raises for a device, in one step: in its forward or backward pass, or in the update.
PLANTED = """
import runpy, sys
sys.path.insert(0, {root!r})
where, number = sys.argv.pop(1), int(sys.argv.pop(1))
import torch, emoft.run
def fail(*ignored):
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of ...")
begin = emoft.run.NonFiniteGuard.begin_step
def begin_step(self, step):
    begin(self, step)
    if step.number == number and where == "forward":
        self.model.transformer.ln_f.register_forward_hook(fail)
    if step.number == number and where == "backward":
        self.model.transformer.h[0].register_full_backward_hook(fail)
    if step.number == number and where == "optimizer":
        self.optimizer.register_step_pre_hook(fail)
    if step.number == number and where == "behind the update":
        self.optimizer.register_step_post_hook(fail)
emoft.run.NonFiniteGuard.begin_step = begin_step
sys.argv[0] = {root!r} + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def flags(tiny_model: Path, train_file: Path, tmp_path: Path) -> list[str]:
    """Of a run without dropout, which draws otherwise in micro-batches of another size."""
    model = shutil.copytree(tiny_model, tmp_path / "model")
    without = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    config = json.loads((model / "config.json").read_text()) | without
    (model / "config.json").write_text(json.dumps(config))
    words = f"--model_name_or_path {model} --train_file {train_file} --max_steps 5 --logging_steps 1"
    return [*words.split(), "--mixed_precision=no", "--per_device_train_batch_size=6", "--lr_scheduler_type=constant"]


def written(folder: Path, script: str) -> Path:
    path = folder / "script.py"
    path.write_text(script.format(root=str(ROOT)), encoding="utf-8")
    return path


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
def test_the_command_that_it_names_ends_as_if_nothing_had_been(
    run: Callable[..., Result], tmp_path: Path, flags: list[str], where: str
) -> None:
    script = written(tmp_path, PLANTED)
    assert run("train.py", *flags, "--output_dir=whole").code == 0
    result = run(script, where, 3, *flags, "--output_dir=out")
    assert result.code == 2, result.err
    (line,) = [line for line in result.error_lines if not line.startswith("warning")]
    assert "step 3 does not fit in memory (2.5 GiB more were asked for); nothing of it was applied" in line
    assert "out/checkpoint-2" in line
    program, file, *words = shlex.split(line.partition("computes the same: ")[2])
    assert {"--per_device_train_batch_size=3", "--gradient_accumulation_steps=2"} <= set(words)
    assert run("train.py", *words).code == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)


def test_weights_of_half_a_step_are_not_kept(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    words = [*flags, "--save_steps=2", "--output_dir=out"]
    result = run(written(tmp_path, PLANTED), "behind the update", 4, *words)
    assert result.code == 2, result.err
    (line,) = [line for line in result.error_lines if not line.startswith("warning")]
    assert "it may be half applied and is left out, out/checkpoint-2 is sound" in line
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_real_limit(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    texts = tmp_path / "long.csv"
    texts.write_text("text\n" + "\n".join("so much to say " * 40 for _ in range(64)), encoding="utf-8")
    words = [f"--train_file={texts}", "--per_device_train_batch_size=64", "--max_length=128", "--output_dir=out"]
    model = ["--model_name_or_path=", "--config_overrides=n_layer=8,n_embd=256,n_head=4", "--vocab_size=300"]
    result = run(written(tmp_path, LIMITED), *flags, *words, *model)
    assert result.code == 2, result.err
    (line,) = [line for line in result.error_lines if not line.startswith("warning")]
    assert re.search(
        r"step 1 does not fit in memory( \([\d.]+ GiB more were asked for\))?; nothing of it was applied", line
    )
    assert "--per_device_train_batch_size=32 --gradient_accumulation_steps=2" in line


def test_an_evaluation_leaves_the_steps_alone(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    in_evaluation = "def fail(module, *_):\n    if module.training: return\n"
    script = written(tmp_path, PLANTED.replace("def fail(*ignored):\n", in_evaluation))
    more = [f"--validation_file={flags[3]}", "--eval_steps=2", "--output_dir=out"]
    result = run(script, "forward", 1, *flags, *more)
    assert result.code == 2, result.err
    (line,) = [line for line in result.error_lines if not line.startswith("warning")]
    assert "what follows step 2 (evaluation, samples or checkpoint) does not fit in memory" in line
    assert "saved out/checkpoint-2; free memory, then go on: " in line


def test_what_is_taken_for_it() -> None:
    cpu = RuntimeError(
        "DefaultCPUAllocator: can't allocate memory: you tried to allocate 3221225472 bytes. Error code 12"
    )
    assert is_out_of_memory(cpu) and memory_asked_for(cpu) == " (3 GiB more were asked for)"
    assert is_out_of_memory(MemoryError()) and is_out_of_memory(RuntimeError("std::bad_alloc"))
    assert not is_out_of_memory(RuntimeError("shapes differ")) and not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize(
    ("size", "accumulation", "smaller"), [(4, 1, (2, 2)), (6, 2, (3, 4)), (5, 1, (1, 5)), (9, 1, (3, 3)), (1, 4, ())]
)
def test_smaller_micro_batches_make_the_same_steps(size: int, accumulation: int, smaller: tuple[int, ...]) -> None:
    config = TrainConfig(per_device_train_batch_size=size, gradient_accumulation_steps=accumulation)
    assert tuple(int(word.partition("=")[2]) for word in smaller_micro_batches(config)) == smaller
