"""The threads that a run is computed with, which its bits depend on."""

import torch

from emoft.errors import warn
from emoft.tracking.run_state import RunState
from emoft.training.runtime import Runtime
from emoft.training.threads import note_threads


def follow_threads(runtime: Runtime, state: RunState) -> None:
    """Follow what other processes use of the CPU, and keep with the run by how many threads its steps are computed."""
    threads = runtime.threads
    if threads is None or runtime.device.type != "cpu":
        return
    threads.look()
    number, known = torch.get_num_threads(), state.threads
    if note_threads(state, number) and len(known) == 2:  # the first time it changes
        reason = "other processes come and go" if threads.follows else "as you ask"
        warn(
            f"{number} thread{'s' * (number != 1)} compute{'s' * (number == 1)} from step {state.step + 1} on,"
            f" not {known[0][1]} ({reason}): sums round otherwise; --num_threads {known[0][1]} keeps the bits"
        )
