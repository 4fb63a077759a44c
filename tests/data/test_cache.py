"""A cache that cannot be written: a home that is none, a disk that is full or read-only, a folder of somebody else."""

import os
import resource
import stat
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from conftest import ROOT

from emoft.data import cache


@pytest.fixture(autouse=True)
def afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    cache._writable.cache_clear()


def test_the_usual_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "not" / "there" / "yet")
    assert cache.cache_dir() == str(tmp_path / "not" / "there" / "yet")
    assert list((tmp_path / "not" / "there" / "yet").iterdir()) == []
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("why", ["a file", "below a file", "a system's own", "read-only", "full", "somebody else's"])
def test_another_one_until_the_end(
    why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    usual = tmp_path / "cache"
    usual.mkdir()
    folders = {"a file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "a system's own": Path("/proc/x")}
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folders.get(why, usual))
    if why in ("read-only", "somebody else's"):
        if os.geteuid() == 0:
            pytest.skip("to root nothing is read-only")
        usual.chmod(stat.S_IRUSR | stat.S_IXUSR)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        if why == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        found = cache.cache_dir()
        assert cache.cache_dir() == found != str(folders.get(why, usual))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        usual.chmod(stat.S_IRWXU)
    Path(found, "kept").touch()
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: the cache in {folders.get(why, usual)} cannot be written (")
    assert found in line and "HF_HOME" in line


def test_a_home_that_is_none(tmp_path: Path, train_file: Path) -> None:
    """As of services and containers without a user: the libraries must come up too, and no folder stays behind."""
    names = [name for name in os.environ if name.startswith(("HF_", "XDG_", "TORCH"))]
    env = {name: value for name, value in os.environ.items() if name not in names}
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    words = [
        "--config=demo",
        "--max_steps=1",
        f"--train_file={train_file}",
        "--delimiter=;",
        f"--output_dir={tmp_path}/run",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        cwd=tmp_path,
        env={**env, "HOME": "/dev/null", "HF_HUB_OFFLINE": "1", "TMPDIR": str(temporary), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stderr.splitlines() if line.startswith("warning: the cache in /dev/null/")]
    assert "Traceback" not in done.stderr
    assert not list(temporary.glob("emoft-*"))


@pytest.mark.parametrize("kilobytes", [1100, 5000])
def test_a_disk_that_fills_up_later(tmp_path: Path, kilobytes: int) -> None:
    """Room for a trial, and not for the rows, or for them and not for their tokens: one line names the cache."""
    rows = "".join(f"a text of some length {number},joy\na sad one {number},sadness\n" for number in range(60_000))
    (tmp_path / "train.csv").write_text("text,label\n" + rows)
    limited = f"ulimit -f {kilobytes}; exec {sys.executable} {ROOT / 'train.py'} --config=demo --train_file=train.csv"
    done = subprocess.run(
        ["bash", "-c", f"{limited} --max_steps=1 --output_dir=run"],
        cwd=tmp_path,
        env={**os.environ, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "error" in line]
    assert "the disk of the cache" in line and "HF_HOME" in line
