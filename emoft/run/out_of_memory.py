"""Steps of a run that do not fit in memory: they come again, smaller; or the run ends in one line and loses nothing."""

import contextlib
from collections.abc import Iterator

from emoft.checkpoints.folder import Saver
from emoft.data.steps import Step
from emoft.device import set_random_state
from emoft.errors import UserError, is_out_of_memory, memory_asked_for
from emoft.hints import less_memory, resume_command
from emoft.run.faults import Faults
from emoft.run.setup import Setup
from emoft.run.spikes import Spikes
from emoft.tracking.tracker import Tracker
from emoft.training.memory import MemoryFit, has_begun_update


class OutOfMemory:
    """Knows how far a step has come, and so what can be done if memory runs out in it."""

    def __init__(self, setup: Setup, tracker: Tracker, saver: Saver, faults: Faults, spikes: Spikes) -> None:
        """Go on with the micro-batches that a run has found to fit.

        Args:
            setup: of the run.
            tracker: tells.
            saver: keeps what there is of a run that ends.
            faults: knows whether all steps before were sound.
            spikes: forgets a step that comes again.
        """
        self.setup, self.tracker, self.saver, self.faults, self.spikes = setup, tracker, saver, faults, spikes
        self.fit = MemoryFit(setup.loader, setup.runtime.world, setup.config.parallel, setup.run_state)
        self.comes_again = False  # the step, which did not fit
        self.applies = False  # it is changing the weights
        self._step: Step | None = None  # that is being computed, or applied

    def begin_step(self, step: Step) -> None:
        """Note that a step is being computed from now on."""
        self.fit.begin_step(step)
        self._step, self.comes_again = step, False

    def end_step(self) -> None:
        """Note that the step is applied, or left out."""
        self._step, self.applies = None, False

    @contextlib.contextmanager
    def attempt(self, step: Step) -> Iterator[None]:
        """Let a step be computed and applied in this context; see that it comes again if it does not fit and can.

        Raises:
            MemoryError: or RuntimeError, as it was raised: it cannot become smaller, or weights may have changed.
        """
        try:
            yield
            self.fit.fitted()
        except (MemoryError, RuntimeError) as error:
            is_repeatable = self._step is step and self.faults.guard.bad_step is None and not self._is_half_applied()
            if not is_out_of_memory(error) or not is_repeatable or not self.fit.halve(step):
                raise
            self._take_back(step)
            self.tracker.warn(
                f"step {step.number} did not fit in memory{memory_asked_for(error)}: micro-batches of"
                f" {self.setup.loader.micro_batch_size} from now on, which compute the same"
            )

    def _is_half_applied(self) -> bool:
        state = self.setup.training_state
        return self.applies and has_begun_update(state.optimizer, state.schedule)

    def _take_back(self, step: Step) -> None:
        """Stand where the run stood before a step of which nothing was applied, to compute it again."""
        self.comes_again, self.applies = True, False
        self.faults.guard.drop_gradients()
        self.faults.guard.forget(step)
        self.spikes.forget(step)
        set_random_state(step.random_state, self.setup.runtime.device)

    def refusal(self, error: BaseException) -> UserError:
        """Keep what there is of a run that does not fit in memory, and return the error that says how to go on."""
        setup, saver, step = self.setup, self.saver, self._step
        state, world = setup.run_state, setup.runtime.world
        self.faults.guard.drop_gradients()
        # No weight has changed since the last step, unless it was the update that did not fit. What the steps since the
        # last look have computed must be known, and the other ranks would have to help.
        is_sound = not self._is_half_applied() and self.faults.are_known
        if state.step > 0 and is_sound and world.size == 1:
            if step:
                set_random_state(step.random_state, setup.runtime.device)
            saver.save()
        kept = "there is no checkpoint yet"
        if saver.saved:
            kept = f"saved {saver.saved}" if is_sound and not saver.has_failed else f"{saver.saved} is sound"
        kept = f"{'nothing of it was applied' if is_sound else 'it may be half applied and is left out'}, {kept}"
        changes: list[str] = []
        cure = "free memory, then go on"
        if step:
            changes, cure = less_memory(setup.config, setup.loader.micro_batch_size)
        # A batch of an evaluation, or of samples, was already computed in halves, down to a single text.
        what = f"step {step.number}" if step else f"what follows step {state.step} (evaluation, samples or checkpoint)"
        command = resume_command(setup.config, world, *changes)
        return UserError(f"{what} does not fit in memory{memory_asked_for(error)}; {kept}; {cure}: {command}")
