"""The commands that the program prints do what they say."""

import os
import shlex
import signal
import time
from pathlib import Path

import pytest
from conftest import WarmScripts

from emoft.command_line import parse_config
from emoft.config import TrainConfig
from emoft.distributed.world import World
from emoft.hints import resume_command

SPELLINGS = (
    "--overwrite_output_dir",
    "--overwrite-output-dir",
    "--overwrite_output_dir=true",
    "--overwrite-output-dir=1",
    "--overwrite_output_dir yes",
    "--max_steps 3 --overwrite_output_dir --seed 7",
    "--config run.yaml",
    "--config run.yaml --overwrite_output_dir",
    "--config run.yaml --overwrite_output_dir true",
    "--resume_from_checkpoint run/checkpoint-1",
    "--resume_from_checkpoint latest",
    "--resume_from_checkpoint=run/checkpoint-1 --overwrite_output_dir=no",
    "--output_dir 'a b'",
    "",
)


@pytest.mark.parametrize("given", SPELLINGS)
def test_the_command_that_goes_on(given: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run.yaml").write_text("overwrite_output_dir: true\nlearning_rate: 1e-3\n")
    monkeypatch.setattr("sys.argv", ["train.py", *shlex.split(given)])
    config = parse_config(TrainConfig)
    words = shlex.split(resume_command(config, World()))
    again = parse_config(TrainConfig, words[2:])
    assert (again.resume_from_checkpoint, again.overwrite_output_dir) == ("latest", False)
    for name in ("max_steps", "seed", "learning_rate", "output_dir"):
        assert getattr(again, name) == getattr(config, name)


def test_it_works_as_printed(scripts: WarmScripts, tiny_model: Path, train_file: Path, tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(
        f"model_name_or_path: {tiny_model}\ntrain_file: {train_file}\ndelimiter: ;\nmax_steps: 3000\n"
        "save_steps: 5\noverwrite_output_dir: yes\noutput_dir: run\n"
    )
    words = ["--config", "run.yaml"]
    for _ in range(2):
        (pid,) = scripts.start("train.py", *words, cwd=tmp_path)
        before = set(tmp_path.glob("run/checkpoint-*"))
        deadline = time.monotonic() + 60
        while not set(tmp_path.glob("run/checkpoint-*")) - before:
            assert time.monotonic() < deadline
            time.sleep(0.01)

        os.kill(pid, signal.SIGINT)
        done = scripts.finish()
        assert done.code == 130, done.err
        words = shlex.split(done.out.partition("to go on, run:\n")[2])[2:]
    assert "resuming from" in done.out
