"""torchrun itself: restarts, signals, several hosts. The short form of hosts.py, which waits as long as users would."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import hosts
import pytest
from conftest import ROOT, WarmScripts, environment
from distributed.test_world import assert_same


@pytest.fixture(scope="module")
def folder(scripts: WarmScripts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, and what a single process makes of them."""
    folder = tmp_path_factory.mktemp("torchrun")
    hosts.write_data(folder)
    result = scripts("train.py", *hosts.words_of("single", 8), cwd=folder)
    assert result.code == 0, result.err
    return folder


def finish_and_compare(scripts: WarmScripts, folder: Path, name: str) -> None:
    """Let a single process finish a run: the same as if it had made all of it."""
    result = scripts("train.py", *hosts.words_of(name, 8), cwd=folder)
    assert result.code == 0, result.err
    assert "resuming from" in result.out
    assert_same(folder / name, folder / "single")


def wait_for(path: Path, log: Path) -> None:
    started = time.monotonic()
    while not path.exists():
        assert time.monotonic() - started < 120, log.read_text(errors="replace")[-3000:]
        time.sleep(0.02)


def worker_of(torchrun: subprocess.Popen) -> int:
    children = Path(f"/proc/{torchrun.pid}/task/{torchrun.pid}/children")
    return int(children.read_text().split()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="finds the workers in /proc")
def test_a_killed_worker_restarts_the_run_and_sigterm_saves_it(scripts: WarmScripts, folder: Path) -> None:
    """Without a word from the user: the command does not even ask to resume."""
    log = folder / "restarted.log"
    words = [word for word in hosts.words_of("restarted", 4, num_train_epochs=40) if "resume" not in word]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "--max_restarts=3",
        str(ROOT / "train.py"),
        *words,
    ]
    with log.open("w") as out:
        torchrun = subprocess.Popen(
            command, cwd=folder, stdout=out, stderr=out, env={**os.environ, **environment(folder)}
        )
        try:
            wait_for(folder / "restarted/checkpoint-40", log)
            os.kill(worker_of(torchrun), signal.SIGKILL)
            wait_for(folder / "restarted/checkpoint-120", log)
            torchrun.send_signal(signal.SIGTERM)
            torchrun.wait(timeout=60)
        finally:
            torchrun.kill()
            torchrun.wait()
    text = log.read_text(errors="replace")
    assert "resuming from restarted/checkpoint-" in text
    assert "stopped by SIGTERM after step" in text
    finish_and_compare(scripts, folder, "restarted")


@pytest.mark.skipif(bool(hosts.why_not()), reason=hosts.why_not())
def test_two_hosts_whose_link_is_cut_end_and_lose_nothing(scripts: WarmScripts, folder: Path) -> None:
    hasty = folder / "hasty.py"
    hasty.write_text(f"""
import runpy, sys
sys.path.insert(0, {str(ROOT)!r})
import emoft.distributed.heartbeat
emoft.distributed.heartbeat.SILENCE_SECONDS = 6
runpy.run_path({str(ROOT / "train.py")!r}, run_name="__main__")
""")
    with hosts.two_hosts(retries=5) as both:  # which take 13 s
        seconds = hosts.run_on_both(
            both, folder, hosts.words_of("cut", 4), script=str(hasty), cut_after="cut/checkpoint-100"
        )
        assert max(seconds) < 40, hosts.logs(both, folder)
        assert hosts.logs(both, folder).count("no sign of life") == 2, "one line a host"
    finish_and_compare(scripts, folder, "cut")
