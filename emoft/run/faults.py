"""Steps of a run that are not finite: told, and taken back with all that was counted after them."""

from dataclasses import asdict
from typing import Any

from emoft.checkpoints.folder import Saver
from emoft.checkpoints.search import checkpoints
from emoft.data.steps import Step
from emoft.data.tokens import decode
from emoft.device import set_random_state
from emoft.errors import UserError
from emoft.files import fault_file
from emoft.run.reports import origin, write_report
from emoft.run.setup import Setup
from emoft.run.spikes import Spikes
from emoft.terminal import say
from emoft.tracking.counts import Moment
from emoft.tracking.tracker import Tracker
from emoft.training.nonfinite import MOST_IN_A_ROW, Fault, NonFiniteGuard, describe, refusal


class Faults:
    """Knows where the run stood before each step that may prove not to be finite; see `NonFiniteGuard`."""

    def __init__(self, setup: Setup, guard: NonFiniteGuard, tracker: Tracker, saver: Saver, spikes: Spikes) -> None:
        """Begin with steps that are all known to be sound.

        Args:
            setup: of the run.
            guard: refuses such steps and finds where they began.
            tracker: whose counts are taken back.
            saver: keeps what there is of a run that ends.
            spikes: whose losses are forgotten if they were not applied.
        """
        self.setup, self.guard, self.tracker, self.saver, self.spikes = setup, guard, tracker, saver, spikes
        # Counts and schedule before each step since somebody last looked whether all were sound.
        self._moments: dict[int, tuple[Moment, dict[str, Any]]] = {}

    def begin_step(self, step: Step) -> None:
        """Remember where the run stands before a step."""
        self.guard.begin_step(step)
        if not self.guard.looks_always:
            schedule = self.setup.training_state.schedule.state_dict()
            self._moments[step.number] = self.tracker.counts.remember(), schedule

    def all_sound(self) -> None:
        """Note that somebody has looked: all steps until here were finite."""
        self._moments.clear()

    @property
    def are_known(self) -> bool:
        """Whether all steps that were applied are known to be sound."""
        return self.guard.looks_always or not self._moments

    def after(self, bad_step: Step) -> None:
        """Tell of a step that was not finite and has been traced, and stand where the run stood before it.

        Raises:
            UserError: the run ends with it, by --on_nonfinite stop, or since there were many in a row.
        """
        fault, setup, state = self.guard.fault, self.setup, self.setup.run_state
        if bad_step.number in self._moments:
            # No weight has changed since then: what was counted of the steps after it comes from steps not applied.
            moment, schedule = self._moments[bad_step.number]
            self.tracker.counts.return_to(moment)
            self.spikes.watch.forget()
            setup.training_state.return_to(schedule)
            self._moments.clear()
        self._tell(fault, bad_step)
        if setup.config.on_nonfinite == "stop" or state.nonfinite_in_row == MOST_IN_A_ROW:
            raise self._refusal(fault, bad_step)

    def _refusal(self, fault: Fault, bad_step: Step) -> UserError:
        """Keep what there is of the run, and return the error that ends it."""
        setup, state, kept = self.setup, self.setup.run_state, ""
        if state.step > 0 and not fault.parameters_not_finite:
            # The run stands before this step, and its weights are worth going on from.
            set_random_state(bad_step.random_state, setup.runtime.device)
            saved = self.saver.save()
            kept = f"saved {saved}" if saved else ""
        if not kept:
            sound = f"checkpoints in {setup.output_dir} are sound"
            kept = sound if checkpoints(setup.output_dir) else "there is no checkpoint yet"
        return refusal(fault, state.nonfinite_in_row, kept, setup.output_dir)

    def _tell(self, fault: Fault, step: Step) -> None:
        """Tell of a fault: on the terminal, in the Text tab, and in nonfinite-STEP.json."""
        setup, state, file = self.setup, self.setup.run_state, fault_file(fault.step)
        with self.tracker.clock_stopped():
            texts = [decode(setup.text_model.tokenizer, ids) for ids in fault.token_ids]
            lines = "\n".join(describe(fault, step.examples, texts, str(setup.output_dir / file)))
            state.nonfinite_steps += 1
            state.nonfinite_in_row = state.nonfinite_in_row + 1 if fault.step == state.last_nonfinite_step + 1 else 1
            state.last_nonfinite_step = fault.step
            write_report(setup, file, {**asdict(fault), "texts": texts, **origin(setup, step)})
            say(lines)
            self.tracker.events.add_text("faults/nonfinite", lines, fault.step)
            self.tracker.events.add_scalars({"train/nonfinite_steps": state.nonfinite_steps}, fault.step)
