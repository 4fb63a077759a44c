"""A run that does not fit in memory ends in one line, loses nothing, and goes on by the command that it names."""

import json
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
from emoft.training.nonfinite import NonFiniteGuard
begin = NonFiniteGuard.begin_step
def begin_step(self, step):
    pages = int(open("/proc/self/statm").read().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + (64 << 20), -1))
    begin(self, step)
NonFiniteGuard.begin_step = begin_step
sys.argv[0] = {root!r} + "/train.py"
runpy.run_path(sys.argv[0], run_name="__main__")
"""
# Raises what torch raises for a device, from one step on: in the forward or backward pass, or in the update, if the
# step's micro-batches hold more than a number of texts; on one rank alone, if there are several.
PLANTED = """
import os, runpy, sys
sys.path.insert(0, {root!r})
where, number, most = sys.argv.pop(1), int(sys.argv.pop(1)), int(sys.argv.pop(1))
import torch
from emoft.training.nonfinite import NonFiniteGuard
largest = [0]
def fail(*ignored):
    if largest[0] <= most or os.environ.get("RANK", "1") != "1": return
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of ...")
begin = NonFiniteGuard.begin_step
def begin_step(self, step):
    begin(self, step)
    is_first = step.number == number and not largest[0]
    if step.number >= number:
        largest[0] = max(batch.examples for batch in step.micro_batches)
    if not is_first: return
    if where == "forward":
        self.model.transformer.ln_f.register_forward_hook(fail)
    if where == "backward":
        self.model.transformer.h[0].register_full_backward_hook(fail)
    if where == "optimizer":
        self.optimizer.register_step_pre_hook(fail)
    if where == "behind the update":
        self.optimizer.register_step_post_hook(fail)
NonFiniteGuard.begin_step = begin_step
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


def warnings_of(result: Result) -> list[str]:
    return [line for line in result.error_lines if "micro-batches of" in line]


@pytest.mark.parametrize("where", ["forward", "backward", "optimizer"])
@pytest.mark.parametrize("number", [1, 3])
def test_a_step_that_does_not_fit_comes_again_in_smaller_micro_batches(
    run: Callable[..., Result], tmp_path: Path, flags: list[str], where: str, number: int
) -> None:
    small = ["--per_device_train_batch_size=3", "--gradient_accumulation_steps=2"]
    assert run("train.py", *flags, *(small if number == 1 else []), "--output_dir=small").code == 0
    result = run(written(tmp_path, PLANTED), where, number, 3, *flags, "--output_dir=out")
    assert result.code == 0, result.err
    (line,) = warnings_of(result)
    assert f"step {number} did not fit in memory (2.5 GiB more were asked for): micro-batches of 3 from now on" in line
    small_weights, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "out"))
    assert all(torch.allclose(small_weights[name], weights[name], atol=1e-6) for name in weights)


def test_the_size_is_halved_until_it_fits_and_kept_in_the_checkpoint(
    run: Callable[..., Result], tmp_path: Path, flags: list[str]
) -> None:
    result = run(written(tmp_path, PLANTED), "backward", 2, 1, *flags, "--save_steps=3", "--output_dir=out")
    assert result.code == 0, result.err
    assert [line.partition(": micro-")[2].split()[2] for line in warnings_of(result)] == ["3", "2", "1"]
    state = json.loads((tmp_path / "out" / "checkpoint-3" / "trainer_state.json").read_text())
    shutil.rmtree(tmp_path / "out" / "checkpoint-5", ignore_errors=True)
    resumed = run("train.py", *flags, "--save_steps=3", "--output_dir=out", "--resume_from_checkpoint=latest")
    assert resumed.code == 0, resumed.err
    assert "micro-batches of 1, since larger ones did not fit in memory" in resumed.out, state


def test_fp16_keeps_its_scale(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    words = [*flags, "--mixed_precision=fp16", "--output_dir=out"]
    result = run(written(tmp_path, PLANTED), "forward", 1, 3, *words)
    assert result.code == 0, result.err
    assert len(warnings_of(result)) == 1


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_ranks_split_together(run: Callable[..., Result], tmp_path: Path, flags: list[str], where: str) -> None:
    words = [*flags, "--per_device_train_batch_size=4"]
    small = ["--per_device_train_batch_size=2", "--gradient_accumulation_steps=2"]
    assert run("train.py", *words, *small, "--output_dir=small", ranks=2).code == 0
    result = run(written(tmp_path, PLANTED), where, 1, 2, *words, "--output_dir=out", ranks=2)
    assert result.code == 0, result.err
    (line,) = warnings_of(result)
    assert "step 1 did not fit in memory: micro-batches of 2 from now on" in line
    small_weights, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "out"))
    assert all(torch.allclose(small_weights[name], weights[name], atol=1e-6) for name in weights)


def test_one_text_that_does_not_fit_ends_the_run_which_the_command_it_names_continues(
    run: Callable[..., Result], tmp_path: Path, flags: list[str]
) -> None:
    assert run("train.py", *flags, "--output_dir=whole").code == 0
    result = run(written(tmp_path, PLANTED), "forward", 3, 0, *flags, "--output_dir=out")
    assert result.code == 2, result.err
    (line,) = [line for line in result.error_lines if not line.startswith("warning")]
    assert "step 3 does not fit in memory (2.5 GiB more were asked for); nothing of it was applied" in line
    assert "saved out/checkpoint-2; go on with fewer activations kept, or take a smaller model or shorter texts" in line
    program, file, *words = shlex.split(line.partition("(--max_length): ")[2])
    assert "--gradient_checkpointing" in words
    assert run("train.py", *words).code == 0
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert all(torch.allclose(whole[name], resumed[name], atol=1e-6) for name in whole)


def test_weights_of_half_a_step_are_not_kept(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    words = [*flags, "--save_steps=2", "--output_dir=out"]
    result = run(written(tmp_path, PLANTED), "behind the update", 4, 3, *words)
    assert result.code == 2, result.err
    (line,) = [line for line in result.error_lines if not line.startswith("warning")]
    assert "it may be half applied and is left out, out/checkpoint-2 is sound" in line
    assert [path.name for path in (tmp_path / "out").glob("checkpoint-*")] == ["checkpoint-2"]


def test_a_real_limit(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    texts = tmp_path / "long.csv"
    texts.write_text("text\n" + "\n".join("so much to say " * 40 for _ in range(64)), encoding="utf-8")
    model = ["--model_name_or_path=", "--config_overrides=n_layer=8,n_embd=256,n_head=4", "--vocab_size=300"]
    words = [*flags, *model, f"--train_file={texts}", "--max_length=128", "--max_steps=2", "--seed=3"]
    words.append("--config_overrides=n_layer=8,n_embd=256,n_head=4,embd_pdrop=0,attn_pdrop=0,resid_pdrop=0")
    result = run(written(tmp_path, LIMITED), *words, "--per_device_train_batch_size=64", "--output_dir=out")
    assert result.code == 0, result.err
    sizes = [int(line.partition(": micro-")[2].split()[2]) for line in warnings_of(result)]
    assert sizes and sizes == [64 // 2**n for n in range(1, len(sizes) + 1)]
    small = [f"--per_device_train_batch_size={sizes[-1]}", f"--gradient_accumulation_steps={64 // sizes[-1]}"]
    assert run("train.py", *words, *small, "--output_dir=small").code == 0
    small_weights, weights = (load_file(tmp_path / name / "model.safetensors") for name in ("small", "out"))
    assert all(torch.allclose(small_weights[name], weights[name], atol=1e-6) for name in weights)


def test_an_evaluation_leaves_the_steps_alone(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    in_evaluation = "def fail(module, *_):\n    if module.training: return\n"
    script = written(tmp_path, PLANTED.replace("def fail(*ignored):\n", in_evaluation))
    more = [f"--validation_file={flags[3]}", "--eval_steps=2", "--output_dir=out"]
    result = run(script, "forward", 1, 0, *flags, *more)
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
    assert tuple(int(word.partition("=")[2]) for word in smaller_micro_batches(config, below=size)) == smaller
