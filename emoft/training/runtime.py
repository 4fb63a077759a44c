"""Where a run computes, and who may interrupt it: what always travels together."""

from dataclasses import dataclass

import torch

from emoft.distributed.world import World
from emoft.training.precision import Precision
from emoft.training.signals import StopSignals
from emoft.training.threads import Threads


@dataclass(frozen=True)
class Runtime:
    """The processes that compute together, their precision and threads, and the signals that they listen to."""

    world: World
    precision: Precision
    signals: StopSignals | None = None  # none: nothing ends a long evaluation early
    threads: Threads | None = None  # none: as many as torch takes

    @property
    def device(self) -> torch.device:
        """The device of this process."""
        return self.precision.device

    def is_to_stop(self) -> bool:
        """Ask all ranks whether one has received a signal; a collective."""
        return self.signals is not None and self.signals.poll() is not None
