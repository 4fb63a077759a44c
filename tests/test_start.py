"""The first second of each script: what is answered before anything slow is imported, and Ctrl-C meanwhile."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, environment

SLOW = ("torch", "transformers", "datasets", "numpy", "pyarrow", "tensorboard", "huggingface_hub", "tokenizers")
SCRIPTS = {
    "train.py": [str(ROOT / "train.py")],
    "generate.py": [str(ROOT / "generate.py")],
    "emoft.evaluate": ["-m", "emoft.evaluate"],
    "emoft.gradients": ["-m", "emoft.gradients"],
    "emoft.benchmark": ["-m", "emoft.benchmark"],
}
ANSWERS = [
    *[(name, ["--help"], 0, "") for name in SCRIPTS],
    *[(name, [*["run"] * (name == "emoft.gradients"), "--jsn=3"], 2, "--jsn") for name in SCRIPTS],
    ("train.py", ["--learning_rate=fast"], 2, "--learning_rate fast"),
    ("train.py", ["--learning_rate=-1"], 2, "above 0"),
    ("train.py", ["--config=demmo"], 2, "demo"),
    ("train.py", ["--train_file=nowhere.csv"], 2, "no such file"),
    ("train.py", ["--train_file=x.csv", "--test_file=nowhere.csv"], 2, "nowhere.csv"),
    ("train.py", ["--model_name_or_path=./nowhere"], 2, "no such folder"),
    ("train.py", ["--template=no text"], 2, "{text}"),
    ("train.py", ["--train_file=x.csv", "--output_dir=held"], 2, "already holds a run"),
    ("generate.py", [], 2, "train first"),
    ("generate.py", ["--model_name_or_path=m", "--prompts_file=nowhere.txt"], 2, "nowhere.txt"),
    ("generate.py", ["--model_name_or_path=m", "--emotion=joi"], 2, "joy"),
    ("emoft.evaluate", ["--test_file=nowhere.csv"], 2, "no such file"),
    ("emoft.gradients", ["nowhere"], 2, "nowhere"),
    ("emoft.benchmark", ["--compare=nothing"], 2, "--compare"),
    ("emoft.benchmark", ["--batch_sizes", "0"], 2, "--batch_sizes"),
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "x.csv").write_text("text,label\nfine,joy\n")
    (tmp_path / "held").mkdir()
    (tmp_path / "held" / "model.safetensors").touch()
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "emoft.json").write_text('{"template": "{label}: {text}", "labels": ["joy", "fear"]}')
    return tmp_path


@pytest.mark.parametrize(("name", "words", "code", "part"), ANSWERS, ids=[f"{a[0]} {' '.join(a[1])}" for a in ANSWERS])
def test_answers_before_anything_slow_is_imported(folder: Path, name: str, words: list, code: int, part: str) -> None:
    done = subprocess.run(
        [sys.executable, *SCRIPTS[name], *words],
        cwd=folder,
        env={**os.environ, **environment(folder), "PYTHONPATH": str(ROOT), "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines if line.startswith("import time:")}
    assert "argparse" in imported, "the test must see what is imported"
    assert imported.isdisjoint(SLOW), imported.intersection(SLOW)
    said = [line for line in lines if not line.startswith("import time:")]
    assert (len(said) == 1 and said[0].startswith(f"{name}: error: ") and part in said[0]) if code else not said


def test_generation_does_not_wait_for_what_reads_data() -> None:
    """`datasets`, and pandas and pyarrow behind it, are a second of an import that has no use for them."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import generate; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert "torch" in imported, "the test must see what is imported"
    assert imported.isdisjoint({"datasets", "pandas", "pyarrow.compute"})


def test_a_start_says_what_it_does_and_ctrl_c_ends_it_with_a_line(folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, *SCRIPTS["train.py"], "--train_file=x.csv"],
        cwd=folder,
        env={**os.environ, **environment(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading PyTorch, transformers, datasets ...\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert errors == "train.py: stopped by Ctrl-C before it began\n"
    assert not (folder / "gpt2-emotion-finetuned").exists()


@pytest.mark.parametrize("seconds", [0.1, 1.0, 3.0])
def test_ctrl_c_at_any_moment_of_the_start(folder: Path, seconds: float) -> None:
    """Whatever is being imported or read then, there is no traceback. (Python's own start is waited for.)"""
    begun = time.monotonic()
    subprocess.run([sys.executable, "-c", "import logging"], check=True)
    seconds = max(seconds, 3 * (time.monotonic() - begun))
    process = subprocess.Popen(
        [sys.executable, *SCRIPTS["train.py"], "--train_file=x.csv", "--model_name_or_path=", "--vocab_size=300"],
        cwd=folder,
        env={**os.environ, **environment(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert process.returncode in (0, 130), errors
    assert "Traceback" not in errors
    told = re.findall("stopped by|interrupted", out + errors)
    assert len(told) == (process.returncode == 130), out + errors


def test_the_loading_of_libraries_is_said_again_while_it_takes_long(folder: Path) -> None:
    """A slow disk: an import that takes four seconds."""
    (folder / "slow").mkdir()
    (folder / "slow" / "torch.py").write_text("import time\ntime.sleep(4)\nraise SystemExit(7)\n")
    done = subprocess.run(
        [sys.executable, *SCRIPTS["train.py"], "--train_file=x.csv"],
        cwd=folder,
        env={**os.environ, **environment(folder), "PYTHONPATH": str(folder / "slow")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 7
    lines = done.stdout.splitlines()
    assert lines[0] == "loading PyTorch, transformers, datasets ..."
    assert re.fullmatch(r"still loading .*transformers.* \(2 s\) \.\.\.", lines[1])
