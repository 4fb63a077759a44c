"""How many threads compute on the CPU: as many as there are cores that nobody else uses, looked at as a run goes.

The threads of a matrix product wait for each other. Where another process has one of the cores, the thread there is
late each time, and all others spin meanwhile: beside one busy process two threads on two cores are several times slower
than one. Alone, two are faster than one. No fixed number serves both.
"""

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from emoft.tracking.run_state import RunState

LOOK_SECONDS = 1.0  # between two looks at what others use
LOOKS = 2  # that must agree before the number is changed: each change costs, and rounds otherwise
PATIENCE_SECONDS = 10.0  # from the first step on: a short run gives the same bits each time, whatever else runs
TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100  # in a second of /proc/stat


class Threads:
    """Sets the number of threads that torch computes with, on the CPU of this process."""

    def __init__(self, number: int, device: torch.device) -> None:
        """Set the number, if it is given, and begin to see what others use, if it is not.

        Args:
            number: of `--num_threads`; 0 to follow what others use. OMP_NUM_THREADS in the environment fixes it too.
            device: that is computed on: only the CPU's threads matter.
        """
        if number:
            torch.set_num_threads(number)
        self.cores = available_cores()
        # torch's own number is at most that of whole cores: two hardware threads of one compute no faster than one.
        self.most = min(torch.get_num_threads(), self.cores)
        is_fixed = number > 0 or "OMP_NUM_THREADS" in os.environ or device.type != "cpu"
        self.follows = not is_fixed and cores_busy_seconds() is not None
        if self.follows:
            torch.set_num_threads(self.most)
        self._since: tuple[float, float, float] | None = None  # the look before
        self._begun = 0.0
        self._wanted: list[int] = []  # by the latest looks

    def go_on(self, state: "RunState") -> None:
        """Begin with the number that a resumed run was last computed by, so that it rounds as it did."""
        if self.follows and state.threads:
            torch.set_num_threads(min(self.most, state.threads[-1][1]))

    def look(self) -> None:
        """See, between two steps and at most once a second, what others use, and follow it."""
        if not self.follows:
            return
        now = time.perf_counter()
        if self._since is None:
            self._since, self._begun = _now(), now
        if now - self._since[0] < LOOK_SECONDS:
            return
        before, self._since = self._since, _now()
        seconds, busy, own = (now - then for now, then in zip(self._since, before, strict=True))
        wanted = min(self.most, threads_for(self.cores, max(0.0, busy - own) / seconds))
        self._wanted = [*self._wanted, wanted][-LOOKS:]
        is_sure = self._wanted == [wanted] * LOOKS and now - self._begun >= PATIENCE_SECONDS
        if is_sure and wanted != torch.get_num_threads():
            torch.set_num_threads(wanted)


def threads_for(cores: int, used_by_others: float) -> int:
    """Return how many threads serve best where others use so many of the cores; one at least."""
    return max(1, round(cores - used_by_others))


def available_cores() -> int:
    """Return the cores that this process may use: those it is bound to, and no more than its container's share."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([cores, *_container_share()])


def _container_share() -> list[int]:
    """Return the cores that the control group allows, at least one; nothing if it sets no limit."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        try:
            folder = Path("/sys/fs/cgroup/cpu")
            quota, period = (folder.joinpath(f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
        except OSError:
            return []
    return [] if quota.strip() in ("max", "-1") else [max(1, int(quota) // int(period))]


def cores_busy_seconds() -> float | None:
    """Return the seconds that the cores of this process have been busy, added up; None where nobody tells (proc(5))."""
    try:
        lines = Path("/proc/stat").read_text().splitlines()
        names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    except (OSError, AttributeError):
        return None
    ticks = 0
    for line in lines:
        name, *values = line.split()
        if name in names:
            user, nice, system, _, _, interrupt, soft = map(int, values[:7])  # without idle and waiting for disks
            ticks += user + nice + system + interrupt + soft
    return ticks / TICKS


def _now() -> tuple[float, float, float]:
    """Return the clock, the busy seconds of the cores, and those of this process."""
    return time.perf_counter(), cores_busy_seconds() or 0.0, time.process_time()


def note_threads(state: "RunState", number: int) -> bool:
    """Keep with a run from which step on it is computed by so many threads; return whether others were before.

    Sums are rounded otherwise by another number of threads, so that a run ends with other bits.
    """
    if state.threads and state.threads[-1][1] == number:
        return False
    state.threads.append([state.step, number])
    return len(state.threads) > 1
