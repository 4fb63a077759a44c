"""What the steps that a plan computes were seen to use and take."""

from dataclasses import dataclass, field

import numpy as np

from emoft.data.batching import Batch
from emoft.plan.activations import Activations


@dataclass
class Measured:
    """Bytes and seconds of the steps of a plan."""

    activations: Activations  # of the largest micro-batch, or estimated for it from a single text
    seconds_of_start: float  # from the start of the process to the first step
    largest: Batch | None = None  # the largest micro-batch; none if no step is left
    fits: bool = True
    seconds: list[float] = field(default_factory=list)  # of the steps that were timed
    tokens: list[int] = field(default_factory=list)  # of each of them
    seconds_of_first: float = 0.0  # steps, whose shapes are new
    seconds_measuring: float = 0.0  # that a step takes longer whose gradients are measured

    def seconds_of_a_step(self, average: float) -> float:
        """Return the seconds of a step of average length, of those that were timed: a constant and a time a token.

        Args:
            average: tokens of such a step.
        """
        tokens, seconds = np.array(self.tokens, float), np.array(self.seconds)
        if len(tokens) > 2 and np.ptp(tokens) > 0:
            slope, constant = np.polyfit(tokens, seconds, 1)
            if slope > 0 and constant > 0:
                return float(slope * average + constant)
        return float(seconds.mean())
