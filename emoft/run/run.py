"""When a run logs, evaluates, samples, saves and stops, around the loop of train.py.

It touches neither a loss nor a gradient: those are computed and applied in train.py alone.
"""

import contextlib
import sys
from collections.abc import Iterator

from torch import Tensor

from emoft.checkpoints.folder import Saver
from emoft.data.steps import Step
from emoft.data.tokenized import unigram_entropy
from emoft.device import give_back_memory
from emoft.errors import is_out_of_memory
from emoft.model.generation import sample_texts
from emoft.model.kernels import uncompiled
from emoft.run.ending import Ending
from emoft.run.evaluation import classify_rows, validate
from emoft.run.faults import Faults
from emoft.run.out_of_memory import OutOfMemory
from emoft.run.setup import Setup
from emoft.run.spikes import Spikes
from emoft.run.threads import follow_threads
from emoft.run.timetable import Timetable
from emoft.tracking.throughput import measure_flops
from emoft.tracking.tracker import Tracker
from emoft.training.loss import given_targets
from emoft.training.nonfinite import NonFiniteGuard


class Run:
    """Gives the loop its steps, and does between two of them what the flags ask for."""

    def __init__(self, setup: Setup) -> None:
        """Prepare a run that goes on from a state."""
        self.setup, self.config, self.state = setup, setup.config, setup.run_state
        self.runtime, self.signals = setup.runtime, setup.signals
        self.loader, self.monitor = setup.loader, setup.monitor
        model, training_state = setup.text_model.model, setup.training_state
        self.guard = NonFiniteGuard(model, training_state.optimizer, self.runtime, self.config.on_nonfinite)
        self.tracker = Tracker(
            self.config,
            self.state,
            self.loader.total_steps,
            self.loader.steps_per_epoch,
            model.config,
            unigram_entropy(setup.splits["train"]),
            measure_flops(self.runtime.precision),
            self.runtime.device,
            self.runtime.world,
        )
        self.saver = Saver(
            self.config, self.runtime.world, setup.output_dir, setup.text_model, self.tracker, training_state
        )
        self.timetable = Timetable(setup)
        self.spikes = Spikes(setup, self.tracker)
        self.faults = Faults(setup, self.guard, self.tracker, self.saver, self.spikes)
        self.memory = OutOfMemory(setup, self.tracker, self.saver, self.faults, self.spikes)
        self.is_done = self.state.step >= self.loader.total_steps  # a resumed run may have only its end to write
        self.has_stopped_early = False
        self._first_step = self.state.step + 1  # of this process
        self._refused: tuple[Tensor, Tensor] | None = None  # loss and gradient norm of a step that was not applied
        self._leaves_out = False  # the step, since its loss stands out
        self._opened = contextlib.ExitStack()  # the bar, the event file, and what a signal does

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Close what the run has opened if an error leaves this context, and tell of memory what can be told."""
        try:
            yield
        except GeneratorExit:  # the loop has ended
            raise
        except BaseException as error:
            # Before it is closed: the state is saved, of which there is an event.
            refusal = self.memory.refusal(error) if is_out_of_memory(error) else None
            self._opened.__exit__(*sys.exc_info())
            if refusal:
                raise refusal from None
            raise

    # ---- Steps ------------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Yield the steps of the run, from where a resumed one goes on, until it is to stop.

        A step that was not finite comes again, twice, to be traced; then the run ends, or goes on without it.

        Raises:
            UserError: a step was not finite, and the flags do not allow to go on.
        """
        if self.runtime.threads:
            self.runtime.threads.go_on(self.state)
        self._opened.enter_context(self.signals)
        self._opened.enter_context(self.tracker)
        with self._closed_on_error():
            self._begin()
            while not self.is_done:
                yield from self._steps_of_an_epoch()

    def _begin(self) -> None:
        """Evaluate before the first step: what fine-tuning brings is the difference to that."""
        setup, state = self.setup, self.state
        if state.step == 0:
            norms = self.monitor.weights_at_start()
            state.weights_at_start = self.monitor.start
            checksums = setup.training_state.checksums
            self.tracker.log_start(setup.text_model.model, self.loader.examples_per_step, norms, checksums)
        else:
            self.monitor.start = state.weights_at_start
            self.tracker.log_layers_at_start()
        self.has_stopped_early = self._out_of_patience() and state.step > 0
        self.is_done |= self.has_stopped_early and not state.evaluation_due
        if state.evaluation_due:
            # A signal came into the evaluation of the step that the run goes on from.
            if validate(setup, self.tracker) and self.config.load_best_model_at_end:
                self.saver.save()
            self.has_stopped_early = self._out_of_patience()
            self.is_done |= self.has_stopped_early or state.evaluation_due
        elif state.step == 0 and "validation" in setup.splits:
            validate(setup, self.tracker)
            with self.tracker.clock_stopped():
                if found := classify_rows(setup, setup.splits["validation"]):
                    self.tracker.log_classification(found)
            self.is_done |= state.evaluation_due

    def _out_of_patience(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self.state.evaluations_since_best

    def _steps_of_an_epoch(self) -> Iterator[Step]:
        """Yield the steps to the end of an epoch, or until one comes again in other micro-batches."""
        for step in self.loader.after(self.state.step):
            follow_threads(self.runtime, self.state)
            step.learning_rate = float(self.setup.training_state.schedule.get_last_lr()[0])
            step.loss_scale = self.runtime.precision.scaler.get_scale()
            self.faults.begin_step(step)
            self.memory.begin_step(step)
            with self.monitor.watching(step), given_targets() as step.targets:
                yield step
            if self.memory.comes_again:
                give_back_memory()
                return
            if self._leaves_out:
                assert self._refused is not None
                self.finish_step(step, *self._refused)
            if bad_step := self.guard.bad_step:
                with uncompiled(self.config.torch_compile):
                    yield from self.guard.repetitions()
                self.faults.after(bad_step)
                assert self._refused is not None
                self.finish_step(bad_step, *self._refused)
            if self.is_done:
                return

    @contextlib.contextmanager
    def attempt(self, step: Step) -> Iterator[None]:
        """Let the loop compute and apply a step in this context. One that does not fit in memory comes again, smaller.

        Raises:
            UserError: it cannot become smaller, or the weights may have changed already.
        """
        with self._closed_on_error(), self.memory.attempt(step):
            yield

    def refuse_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Say whether a step must not be applied; its gradients are dropped then.

        One whose loss or gradient is infinite or NaN comes again as the next step; see `NonFiniteGuard`. One whose loss
        stands out is left out by --on_spike skip; see `Spikes`.
        """
        self.signals.poll()
        self._leaves_out = False
        skips = self.config.on_spike == "skip"
        # Whatever is told or kept of a step must be known to be sound: then the device is waited for.
        number = step.number
        looks = self.timetable.logs(number) or self.timetable.evaluates(number) or self._saves(number)
        looks |= skips or self.signals.received is not None
        if self.guard.refuses(step, loss, grad_norm, looks):
            self._refused = loss, grad_norm
            return True
        if looks:
            self.faults.all_sound()
        self.spikes.note(step, loss, looks or self.guard.looks_always)
        self._leaves_out = skips and self.spikes.holds(step)
        if self._leaves_out:
            self._refused = loss, grad_norm
            self.guard.drop_gradients()
        self.memory.applies = not self._leaves_out
        return self._leaves_out

    def finish_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Count a step, and log, sample, evaluate and save, if it is time to.

        Reading a number from a GPU waits until it is computed (a sync point): a step that logs nothing reads none.

        Args:
            step: that was applied, or left out.
            loss: the mean over all its targets, of all ranks, on the device.
            grad_norm: before clipping, likewise.

        Returns:
            Whether the run is to stop.
        """
        tracker, number = self.tracker, step.number
        scaler = self.runtime.precision.scaler
        self.memory.end_step()
        if number == self._first_step:
            self.runtime.world.first_step_is_done()
        tracker.count_step(step, loss, grad_norm, skipped=scaler.get_scale() < step.loss_scale)
        self.spikes.tell(applied=not self._leaves_out)
        if self.timetable.logs(number):
            self._log(step, grad_norm)
        if figures := self.monitor.take_figures():
            tracker.log_gradients(figures)
        if self.timetable.samples(number):
            with tracker.clock_stopped():
                tracker.log_samples(sample_texts(self.setup.text_model, self.config.seed))
        should_save = self._saves(number)
        if self.timetable.evaluates(number):
            should_save |= validate(self.setup, tracker) and self.config.load_best_model_at_end
            self.has_stopped_early = self._out_of_patience()
        if should_save or self.signals.received:
            self.saver.save()
        is_last = number >= self.loader.total_steps
        self.is_done = is_last or self.has_stopped_early or self.signals.received is not None
        return self.is_done

    def _saves(self, number: int) -> bool:
        """Say whether it is time to save, or to try again."""
        return self.timetable.saves(number) or (self.saver.has_failed and self.timetable.logs(number))

    def _log(self, step: Step, grad_norm: Tensor) -> None:
        state, tracker, scaler = self.state, self.tracker, self.runtime.precision.scaler
        if not state.logged:  # the first time: not before the first step, since it may take half a second
            with tracker.clock_stopped():
                tracker.log_data(self.setup.splits["train"])
        fp16 = {"loss_scale": step.loss_scale, "skipped_steps": state.skipped_steps} if scaler.is_enabled() else {}
        contrast = self.setup.label_contrast.of_last_step(self.runtime.world)
        tracker.log_step(grad_norm, learning_rate=step.learning_rate, **contrast, **fp16)

    def finish(self) -> int:
        """Write the model, the best one if the flags say so, with its figures and a few texts; or say how to go on.

        Returns:
            The exit code of the script.

        Raises:
            UserError: the run was stopped and could not be saved.
        """
        with self._opened, self._closed_on_error():
            return Ending(self.setup, self.tracker, self.saver).finish(self.has_stopped_early)
