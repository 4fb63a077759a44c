"""Output that cannot be written: a training outlives it, a command whose results it is says so in one line."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, WarmScripts

CLOSED = ""


@pytest.fixture
def words(tiny_model: Path, train_file: Path, tmp_path: Path) -> list[str]:
    """A training in tmp_path / "run" that takes a minute, if it is let."""
    settings = {
        "model_name_or_path": tiny_model,
        "train_file": train_file,
        "delimiter": ";",
        "max_steps": 5000,
        "logging_steps": 1,
        "save_steps": 5,
        "save_total_limit": 0,
        "output_dir": tmp_path / "run",
    }
    return [f"--{name}={value}" for name, value in settings.items()]


def steps_of(folder: Path) -> int:
    """The step of the newest checkpoint."""
    return max((int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def wait_for_a_checkpoint(folder: Path, after: int = 0) -> None:
    deadline = time.monotonic() + 60
    while steps_of(folder) <= after:
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("lost", ["/dev/full", CLOSED])
def test_a_training_ends_well_though_nobody_hears_of_it(
    scripts: WarmScripts, words: list[str], tmp_path: Path, lost: str
) -> None:
    scripts.start("train.py", *words, "--max_steps=4", cwd=tmp_path, streams={"stdout": lost, "stderr": lost})
    assert scripts.finish().code == 0
    assert (tmp_path / "run" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "run" / "all_results.json").read_text())["train_loss"] > 0


def test_all_three_streams_closed(scripts: WarmScripts, words: list[str], tmp_path: Path) -> None:
    """No file that is opened later may take their places, and receive what is printed."""
    closed = {"stdin": CLOSED, "stdout": CLOSED, "stderr": CLOSED}
    scripts.start("train.py", *words, "--max_steps=4", cwd=tmp_path, streams=closed)
    assert scripts.finish().code == 0
    for path in (tmp_path / "run").rglob("*"):
        if path.is_file():
            assert b"parameters on" not in path.read_bytes(), path


def test_the_reader_goes_away(scripts: WarmScripts, words: list[str], tmp_path: Path) -> None:
    """`train.py 2>&1 | tee log`, Ctrl-C: it ends tee too."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    streams = {"stdout": str(pipe), "stderr": str(pipe)}
    (pid,) = scripts.start("train.py", *words, cwd=tmp_path, streams=streams)
    wait_for_a_checkpoint(tmp_path / "run")
    os.close(reader)
    before = steps_of(tmp_path / "run")
    wait_for_a_checkpoint(tmp_path / "run", after=before + 5)  # it goes on
    os.kill(pid, signal.SIGINT)
    assert scripts.finish().code == 130
    assert steps_of(tmp_path / "run") < 5000


class TestATerminalThatIsClosed:
    @pytest.mark.parametrize("says_it_twice", [False, True])
    def test_saves_and_stops(self, scripts: WarmScripts, words: list[str], tmp_path: Path, says_it_twice: bool) -> None:
        ours, theirs = pty.openpty()
        name = os.ttyname(theirs)
        streams: dict[str, Any] = {"stdin": name, "stdout": name, "stderr": name}
        (pid,) = scripts.start(
            "train.py", *words, "--save_steps=0", cwd=tmp_path, streams=streams, terminal=name, TERM="xterm"
        )
        seen = b""
        while b"  loss " not in seen:
            seen += os.read(ours, 65536)
        os.close(theirs)
        os.close(ours)
        if says_it_twice:  # as its shell does
            os.kill(pid, signal.SIGHUP)
        assert scripts.finish().code == 129
        assert 0 < steps_of(tmp_path / "run") < 5000

    def test_is_nothing_to_a_run_that_ignores_it(self, words: list[str], tmp_path: Path) -> None:
        command = ["nohup", sys.executable, str(ROOT / "train.py"), *words, "--max_steps=12"]
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for_a_checkpoint(tmp_path / "run")
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0


@pytest.mark.parametrize(("lost", "reason"), [("/dev/full", "No space left on device"), (CLOSED, "Bad file desc")])
def test_results_that_cannot_be_written_are_an_error(
    scripts: WarmScripts, tiny_model: Path, tmp_path: Path, lost: str, reason: str
) -> None:
    args = [f"--model_name_or_path={tiny_model}", "--prompt=i feel", "--max_length=12"]
    scripts.start("generate.py", *args, cwd=tmp_path, streams={"stdout": lost})
    done = scripts.finish()
    assert done.code == 2
    (line,) = done.error_lines
    assert line.startswith(f"generate.py: error: standard output cannot be written ({reason}")


def test_a_mistake_keeps_its_exit_code_where_nobody_hears_of_it(scripts: WarmScripts, tmp_path: Path) -> None:
    for lost in ("/dev/full", CLOSED):
        streams = {"stdout": lost, "stderr": lost}
        scripts.start("train.py", "--lerning_rate", "3", cwd=tmp_path, streams=streams)
        assert scripts.finish().code == 2
        scripts.start("generate.py", "--help", cwd=tmp_path, streams=streams)
        assert scripts.finish().code in (0, 2)
