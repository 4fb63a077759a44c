"""Finite steps whose loss stands far above those before: told with their texts, and left out if the flags say so."""

import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, stack

from emoft.data.steps import Step

if TYPE_CHECKING:
    from emoft.tracking.run_state import RunState

WINDOW = 100  # losses of steps before one that tell whether it stands out
LEAST = 30  # of them, below which nothing is said
DEVIATIONS = 6.0  # standard deviations above the median, estimated from the median absolute deviation
RISE = 0.12  # and at least so much above it, as a share of it
MOST_IN_A_ROW = 10  # after which they are no spikes but how the loss is now
MOST_FILES = 20  # of a run


@dataclass(frozen=True)
class Spike:
    """A loss that stands out."""

    step: int
    loss: float  # in nats
    median: float  # of the steps before
    deviation: float  # likewise
    threshold: float  # above which a loss stands out


class SpikeWatch:
    """Compares each step's loss with those before. On a GPU nobody waits for a loss: it is looked at with others."""

    def __init__(self, state: "RunState") -> None:
        """Go on from the losses before, which a checkpoint holds, so that a resumed run judges as the whole one does.

        Args:
            state: of the run; its `recent_losses` and `spikes_in_row` are read and kept up to date.
        """
        self.state = state
        self._waiting: list[tuple[Step, Tensor]] = []

    def forget(self) -> None:
        """Look at none of the losses that were noted since the last look: their steps were not applied."""
        self._waiting.clear()

    def note(self, step: Step, loss: Tensor) -> None:
        """Remember the loss of a step, on its device."""
        self._waiting.append((step, loss))

    def look(self) -> list[tuple[Step, Spike]]:
        """Return the steps since the last look that stand out; reads from the device: a CPU-GPU sync point."""
        if not self._waiting:
            return []
        steps, losses = zip(*self._waiting, strict=True)
        self._waiting.clear()
        judged = [(step, self._judge(step, loss)) for step, loss in zip(steps, stack(losses).tolist(), strict=True)]
        return [(step, spike) for step, spike in judged if spike]

    def _judge(self, step: Step, loss: float) -> Spike | None:
        state, recent = self.state, self.state.recent_losses
        if len(recent) >= LEAST:
            median = statistics.median(recent)
            # 1.4826 makes it the standard deviation where values are distributed normally.
            deviation = 1.4826 * statistics.median(abs(value - median) for value in recent)
            threshold = median + max(DEVIATIONS * deviation, RISE * median)
            state.spikes_in_row = state.spikes_in_row + 1 if loss > threshold else 0
            if 0 < state.spikes_in_row <= MOST_IN_A_ROW:
                return Spike(step.number, loss, median, deviation, threshold)
            if state.spikes_in_row:
                recent.clear()
                state.spikes_in_row = 0
        recent.append(loss)
        del recent[:-WINDOW]
        return None


def describe(spike: Spike, examples: list[int], texts: list[str], losses: list[float], applied: bool, file: str) -> str:
    """Return a spike in a line.

    Args:
        spike: what stands out.
        examples: the indices of the step's examples in the train split.
        texts: their texts.
        losses: of each text by itself, measured after the step, in nats; none where that cannot be measured.
        applied: whether the step was.
        file: that holds all of it.
    """
    left_out = "" if applied else "; nothing of it was applied"
    hardest = ""
    if losses:
        worst = losses.index(max(losses))
        shown = texts[worst] if len(texts[worst]) <= 60 else texts[worst][:57] + "..."
        hardest = f" the hardest text is row {examples[worst]} of train, {shown!r}, {losses[worst]:.2f} nats after it;"
    return (
        f"step {spike.step}: the loss is {spike.loss:.2f} nats, where up to {spike.threshold:.2f} is usual{left_out};"
        f"{hardest} all in {file}"
    )
