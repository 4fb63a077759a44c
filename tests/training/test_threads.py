"""How many threads compute: what a run does beside other processes, real ones and played ones."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from emoft.tracking.run_state import RunState
from emoft.training import threads as module
from emoft.training.threads import Threads, available_cores, cores_busy_seconds, note_threads, threads_for

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def restored(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Without the variable that the tests run with, which fixes the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(8)  # as torch begins on eight cores
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("cores", "others", "number"),
    [(2, 0.0, 2), (2, 0.2, 2), (2, 0.67, 1), (2, 2.0, 1), (8, 0.9, 7), (8, 20.0, 1), (1, 0.0, 1)],
)
def test_others_leave_so_many_cores(cores: int, others: float, number: int) -> None:
    assert threads_for(cores, others) == number


class Played:
    """A machine of four cores on which others use what it is told, from one look to the next."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = (0.0, 0.0, 0.0)  # clock, busy cores, own
        monkeypatch.setattr(module, "_now", lambda: self.now)
        monkeypatch.setattr(module, "available_cores", lambda: 4)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now[0])
        self.threads = Threads(0, CPU)

    def look(self, others: float, seconds: float = 1.5) -> int:
        clock, busy, own = self.now
        used = seconds * torch.get_num_threads()
        self.now = clock + seconds, busy + used + seconds * others, own + used
        self.threads.look()
        return torch.get_num_threads()


def test_the_number_follows_what_others_use(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Played(monkeypatch)
    assert torch.get_num_threads() == 4
    assert [machine.look(others=2.0) for _ in range(7)] == [4] * 7  # nine seconds since the first look
    assert machine.look(others=2.0) == 2
    assert machine.look(others=0.0) == 2  # a single second is not believed
    assert machine.look(others=0.0) == 4
    assert [machine.look(others) for others in (3.0, 0.0, 3.0, 0.0)] == [4, 4, 4, 4]
    assert [machine.look(9.0, seconds=0.3) for _ in range(3)] == [4, 4, 4]  # too soon to look
    assert [machine.look(others) for others in (9.0, 9.0)] == [4, 1]


def test_two_hardware_threads_of_a_core_count_once(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.set_num_threads(2)  # as torch begins on two cores that show themselves as four
    machine = Played(monkeypatch)
    assert torch.get_num_threads() == 2
    assert {machine.look(others=1.5) for _ in range(9)} == {2}
    assert [machine.look(others) for others in (3.0, 3.0, 0.0, 0.0)] == [2, 1, 1, 2]


def test_a_resumed_run_begins_with_the_number_that_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Played(monkeypatch)
    machine.threads.go_on(RunState(threads=[[0, 4], [9, 3]]))
    assert torch.get_num_threads() == 3
    machine.threads.go_on(RunState(threads=[[0, 16]]))  # of a larger machine
    assert torch.get_num_threads() == 4
    Threads(2, CPU).go_on(RunState(threads=[[0, 3]]))
    assert torch.get_num_threads() == 2


def test_a_number_that_is_given_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(3, CPU)
    assert torch.get_num_threads() == 3 and not threads.follows
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert not Threads(0, CPU).follows and torch.get_num_threads() == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert not Threads(0, torch.device("cuda")).follows


def test_real_processes_take_cores_away(monkeypatch: pytest.MonkeyPatch) -> None:
    if cores_busy_seconds() is None:
        pytest.skip("this system does not tell what its cores do")
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.3)
    monkeypatch.setattr(module, "PATIENCE_SECONDS", 1.0)
    threads = Threads(0, CPU)
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(threads.cores)]
    try:
        values = torch.ones(300, 300)
        end = time.monotonic() + 20
        while torch.get_num_threads() > max(1, threads.cores // 2) and time.monotonic() < end:
            values @ values
            threads.look()
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert torch.get_num_threads() <= max(1, threads.cores // 2)


@pytest.mark.parametrize(("told", "share"), [("150000 100000", 1), ("300000 100000", 3), ("50000 100000", 1)])
def test_a_container_has_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch, told: str, share: int) -> None:
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    monkeypatch.setattr(Path, "read_text", lambda path: told)
    assert available_cores() == share
    monkeypatch.setattr(Path, "read_text", lambda path: "max 100000")
    assert available_cores() == 8


def test_only_the_cores_that_we_may_use_count(monkeypatch: pytest.MonkeyPatch) -> None:
    stat = "cpu  9 9 9 9 9 9 9 0 0 0\ncpu0 100 10 20 5000 300 1 2 0 0 0\ncpu1 700 0 0 0 0 0 0 0 0 0\nintr 5\n"
    monkeypatch.setattr(Path, "read_text", lambda path: stat)
    monkeypatch.setattr(module.os, "sched_getaffinity", lambda process: {0}, raising=False)
    assert cores_busy_seconds() == pytest.approx(133 / module.TICKS)


def test_a_run_keeps_who_computed_it() -> None:
    state = RunState()
    assert not note_threads(state, 2)
    state.step = 5
    assert not note_threads(state, 2) and note_threads(state, 1)
    assert state.threads == [[0, 2], [5, 1]]
