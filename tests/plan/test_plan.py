"""`train.py --plan`: what a run will use and take, told before it begins."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, Result
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.plan.activations import Activations


@pytest.fixture
def flags(tiny_model: Path, train_file: Path) -> list[str]:
    words = f"--model_name_or_path {tiny_model} --train_file {train_file} --validation_file {train_file}"
    return [*words.split(), "--output_dir=out", "--per_device_train_batch_size=4", "--mixed_precision=no"]


def rows(plan: str) -> dict[str, dict[str, str]]:
    """The parts of a plan by their titles, each with its rows by their names."""
    parts: dict[str, dict[str, str]] = {}
    for line in plan.splitlines():
        if re.fullmatch(r"[A-Z][a-z]+", line):
            part = parts.setdefault(line, {})
        elif line.startswith("  ") and parts:
            name, _, text = line.strip().partition("  ")
            part[name] = text.strip()
    return parts


def test_a_plan_tells_everything_and_leaves_nothing(
    run: Callable[..., Result], tmp_path: Path, flags: list[str], train_file: Path
) -> None:
    result = run("train.py", *flags, "--plan", "--num_train_epochs=2", "--save_steps=3", "--log_gradients_every=2")
    assert result.code == 0, result.err
    assert not (tmp_path / "out").exists()
    plan = rows(result.out)
    assert list(plan) == ["Data", "Example", "Memory", "Disk", "Time"]
    texts = len(train_file.read_text().splitlines())
    steps = 2 * -(-texts // 4)
    assert plan["Data"]["train"].startswith(f"{texts} texts")
    assert plan["Data"]["the run"].startswith(f"{steps} steps, 2 epochs")
    assert "100.0% in train too" in plan["Data"]["validation"]
    assert plan["Example"]["tokens"].startswith("[")
    assert f"at most {steps // 3 + 2:,} are written and 2 kept" in plan["Disk"]["a checkpoint"]
    assert {"all", f"{steps} steps", f"{steps // 2} looks at the gradients", "1 rounds of samples"} <= set(plan["Time"])
    assert "3 evaluations of validation" in plan["Time"]
    assert "This fits" in result.out


def test_a_plan_of_a_resumed_run_tells_what_is_left(run: Callable[..., Result], flags: list[str]) -> None:
    assert run("train.py", *flags, "--max_steps=3", "--save_steps=2").code == 0
    refused = run("train.py", *flags, "--plan", "--max_steps=3")
    assert refused.code == 2 and "already holds a run" in refused.err
    resumed = run("train.py", *flags, "--plan", "--max_steps=3", "--save_steps=2", "--resume_from_checkpoint=latest")
    assert resumed.code == 0, resumed.err
    left = int(rows(resumed.out)["Data"]["the run"].split()[0])
    assert left == (0 if "No step is left" in resumed.out else 1)


def test_what_will_not_fit_is_told_without_trying(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    script = with_patch(tmp_path, "import emoft.device; emoft.device.free_memory = lambda device: 1000")
    result = run(script, *flags, "--plan")
    assert result.code == 0, result.err
    assert "This does not fit in memory: --per_device_train_batch_size=2 --gradient_accumulation_steps=2" in result.out
    assert "estimated from a single text" in rows(result.out)["Memory"]["activations"]
    assert "Time" not in rows(result.out)


def test_activations_are_those_that_the_backward_pass_needs() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=100, bos_token_id=0, eos_token_id=0))
    activations = Activations(model)
    hidden = torch.ones(8, 16, requires_grad=True)
    with activations.counted():
        once = hidden.sin()  # keeps what it is given, 8 x 16 numbers of 4 bytes
        logits = once @ model.lm_head.weight.t()  # likewise; the weight is no activation
        (logits**2).sum()  # keeps the logits
    assert activations.of_texts == 2 * 8 * 16 * 4
    assert activations.logits == 8 * 100 * 4
    with torch.autocast("cpu", dtype=torch.bfloat16), activations.counted():
        (hidden @ model.lm_head.weight.t()).sum()
    assert activations.half_weights == 100 * 16 * 2


def with_patch(tmp_path: Path, line: str) -> Path:
    """train.py with a line before it that changes what it sees of the machine."""
    script = tmp_path / "patched.py"
    script.write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\n{line}\n"
        f"sys.argv[0] = {str(ROOT / 'train.py')!r}\nrunpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    return script


def test_a_disk_without_room_is_told(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    script = with_patch(tmp_path, "import emoft.plan.disk; emoft.plan.disk.free_disk = lambda folder: 1000")
    result = run(script, *flags, "--plan")
    assert result.code == 0, result.err
    assert "The disk has too little room" in result.out and "This fits" not in result.out


def test_a_folder_that_cannot_be_written_is_told(run: Callable[..., Result], tmp_path: Path, flags: list[str]) -> None:
    (tmp_path / "file").write_text("")
    patch = "import tempfile\ndef refuse(**named): raise PermissionError(13, 'Permission denied')\n"
    result = run(with_patch(tmp_path, patch + "tempfile.TemporaryFile = refuse"), *flags, "--plan")
    assert result.code == 2 and "--output_dir out cannot be written (Permission denied)" in result.err
