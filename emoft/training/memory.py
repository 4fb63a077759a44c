"""A step that does not fit in memory comes again, in smaller micro-batches.

The loss of a step is a sum over its tokens, so that micro-batches of any size compute the same.
"""

from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from emoft.data.steps import Step, StepLoader
from emoft.distributed.parallel import Agreement
from emoft.distributed.world import World

if TYPE_CHECKING:
    from emoft.tracking.run_state import RunState


class MemoryFit:
    """Knows which micro-batches have fitted in memory, and makes those of the steps to come smaller if one does not."""

    def __init__(self, loader: StepLoader, world: World, parallel: str, state: "RunState") -> None:
        """Go on with the size that a run has found before.

        Args:
            loader: of the steps; its `micro_batch_size` is lowered.
            world: all ranks.
            parallel: "ddp" or "fsdp"; how several ranks train together.
            state: of the run; its `micro_batch_size` and `most_fitted` are read and kept up to date.
        """
        self.loader, self.world, self.state = loader, world, state
        self.is_replicated = world.size > 1 and parallel == "ddp"
        self._tokens = 0  # of the largest micro-batch of the step
        if 0 < state.micro_batch_size < loader.micro_batch_size:
            loader.micro_batch_size = state.micro_batch_size
            print(f"micro-batches of {loader.micro_batch_size}, since larger ones did not fit in memory")

    def begin_step(self, step: Step) -> None:
        """Let several ranks agree on a step that is larger than all that have fitted.

        The others would wait in the exchange of gradients for a rank that cannot compute its own. All ranks know the
        lengths of all texts, so that nobody has to be asked whether it is such a step.
        """
        if self.is_replicated:
            self._tokens = self.loader.largest_micro_batch(step.examples)
            if self._tokens > self.state.most_fitted:
                step.agreement = Agreement(self.world)

    def fitted(self) -> None:
        """Note that the step has fitted in memory."""
        self.state.most_fitted = max(self.state.most_fitted, self._tokens)

    def halve(self, step: Step) -> bool:
        """Make the micro-batches from now on half as large; return whether the step that did not fit can come again.

        It cannot if micro-batches hold a single text already, or if other ranks wait in a collective for this one.
        """
        if self.world.size > 1 and (step.agreement is None or step.agreement.reach(fits=False)):
            return False  # the others have gone on
        if self.loader.micro_batch_size == 1:
            return False
        self.loader.micro_batch_size = (self.loader.micro_batch_size + 1) // 2
        self.state.micro_batch_size = self.loader.micro_batch_size
        return True


def has_begun_update(optimizer: Optimizer, schedule: LRScheduler) -> bool:
    """Say whether an optimizer has touched a parameter since the schedule last moved. Reads from the device."""
    counts = [int(state.get("step", 0)) for state in optimizer.state.values()]
    return any(count != schedule.last_epoch for count in counts)
