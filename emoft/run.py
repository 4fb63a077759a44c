"""A run around the loop of train.py: when it logs, evaluates, samples, saves and stops.

It touches neither a loss nor a gradient: those are computed and applied in train.py alone.
"""

import contextlib
import functools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from emoft.checkpoints.folder import Saver
from emoft.checkpoints.manifest import damage
from emoft.checkpoints.search import checkpoints
from emoft.checkpoints.state import TrainingState
from emoft.config import TrainConfig
from emoft.data.steps import Step, StepLoader
from emoft.data.tokens import decode, unigram_entropy
from emoft.device import describe_device, give_back_memory, set_random_state
from emoft.distributed.parallel import load_weights
from emoft.errors import UserError, is_out_of_memory, memory_asked_for
from emoft.evaluate.classification import Classification, classify
from emoft.evaluate.scoring import Evaluation, evaluate, format_figures
from emoft.files import fault_file, spike_file
from emoft.gradients.monitor import GradientMonitor
from emoft.gradients.texts import losses_of_texts
from emoft.hints import generate_command, less_memory, resume_command
from emoft.model.generation import sample_texts
from emoft.model.loading import TextModel, load_model
from emoft.share.card import write_card
from emoft.share.upload import upload
from emoft.tracking.run_state import RunState
from emoft.tracking.throughput import measure_flops
from emoft.tracking.tracker import Moment, Tracker
from emoft.training.contrast import LabelContrast
from emoft.training.loss import given_targets
from emoft.training.memory import MemoryFit, has_begun_update
from emoft.training.nonfinite import MOST_IN_A_ROW, Fault, NonFiniteGuard, describe, refusal
from emoft.training.runtime import Runtime
from emoft.training.spikes import MOST_FILES, Spike, SpikeWatch
from emoft.training.spikes import describe as describe_spike
from emoft.training.threads import note_threads


class Run:
    """Gives the loop its steps, and does between two of them what the flags ask for."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        text_model: TextModel,
        splits: dict[str, Dataset],
        loader: StepLoader,
        training_state: TrainingState,
        run_state: RunState,
        monitor: GradientMonitor,
        label_contrast: LabelContrast,
    ) -> None:
        """Prepare a run that goes on from a state.

        Args:
            config: all flags.
            runtime: with the signals that stop the run.
            text_model: what is trained.
            splits: tokenized; "train" and, where there are any, "validation" and "test".
            loader: of the train split.
            training_state: what a checkpoint holds besides the model.
            run_state: what the run knows about itself, a fresh one or that of a checkpoint.
            monitor: measures gradients at some steps.
            label_contrast: of the loss.
        """
        assert runtime.signals is not None
        self.config, self.runtime, self.text_model, self.splits = config, runtime, text_model, splits
        self.loader, self.training_state, self.monitor = loader, training_state, monitor
        self.label_contrast, self.state = label_contrast, run_state
        self.world, self.signals = runtime.world, runtime.signals
        self.output_dir = Path(config.output_dir)
        self.guard = NonFiniteGuard(text_model.model, training_state.optimizer, runtime, config.on_nonfinite)
        self.tracker = Tracker(
            config,
            run_state,
            loader.total_steps,
            loader.steps_per_epoch,
            text_model.model.config,
            unigram_entropy(splits["train"]),
            measure_flops(runtime.precision),
            runtime.device,
            runtime.world,
        )
        self.saver = Saver(config, runtime.world, self.output_dir, text_model, self.tracker, training_state)
        self.is_done = run_state.step >= loader.total_steps  # a resumed run may have only its end to write
        self.has_stopped_early = False
        self.save_failed = False
        self.saved = training_state.restored_from  # the latest checkpoint
        self._refused: tuple[Tensor, Tensor] | None = None  # loss and gradient norm of a step that was not applied
        self._leaves_out = False  # the step, since its loss stands out
        self.memory = MemoryFit(loader, runtime.world, config.parallel, run_state)
        self._computed: Step | None = None  # the step that is being computed, or applied
        self._applies = False  # it is changing the weights
        self._comes_again = False  # it did not fit in memory
        self._opened = contextlib.ExitStack()  # the bar, the event file, and what a signal does
        self.spike_watch = SpikeWatch(run_state)
        self._spikes: list[tuple[Step, Spike]] = []  # that nobody has been told of
        self._can_measure = config.parallel != "fsdp" or not runtime.world.launched  # a text by itself
        # Counts and schedule before each step since somebody last looked whether all were sound; see `NonFiniteGuard`.
        self._moments: dict[int, tuple[Moment, dict[str, Any]]] = {}

    @contextlib.contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        """Close what the run has opened if an error leaves this context, and tell of memory what can be told."""
        try:
            yield
        except GeneratorExit:  # the loop has ended
            raise
        except BaseException as error:
            # Before it is closed: the state is saved, of which there is an event.
            refusal = self._out_of_memory(error) if is_out_of_memory(error) else None
            self._opened.__exit__(*sys.exc_info())
            if refusal:
                raise refusal from None
            raise

    def _out_of_memory(self, error: BaseException) -> UserError:
        """Keep what there is of a run that does not fit in memory, and return the error that says how to go on."""
        state, step = self.state, self._computed
        self.guard.drop_gradients()
        # No weight has changed since the last step, unless it was the update that did not fit. What the steps since the
        # last look have computed must be known, and the other ranks would have to help.
        is_sound = not self._is_half_applied() and (self.guard.looks_always or not self._moments)
        if state.step > 0 and is_sound and self.world.size == 1:
            if step:
                set_random_state(step.random_state, self.runtime.device)
            self._save()
        kept = "there is no checkpoint yet"
        if self.saved:
            kept = f"saved {self.saved}" if is_sound and not self.save_failed else f"{self.saved} is sound"
        kept = f"{'nothing of it was applied' if is_sound else 'it may be half applied and is left out'}, {kept}"
        changes: list[str] = []
        cure = "free memory, then go on"
        if step:
            changes, cure = less_memory(self.config, self.loader.micro_batch_size)
        # A batch of an evaluation, or of samples, was already computed in halves, down to a single text.
        what = f"step {step.number}" if step else f"what follows step {state.step} (evaluation, samples or checkpoint)"
        command = resume_command(self.config, self.world, *changes)
        return UserError(f"{what} does not fit in memory{memory_asked_for(error)}; {kept}; {cure}: {command}")

    def _is_half_applied(self) -> bool:
        return self._applies and has_begun_update(self.training_state.optimizer, self.training_state.schedule)

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

    def _steps_of_an_epoch(self) -> Iterator[Step]:
        """Yield the steps to the end of an epoch, or until one comes again in other micro-batches."""
        for step in self.loader.after(self.state.step):
            self._look_at_threads()
            step.learning_rate = float(self.training_state.schedule.get_last_lr()[0])
            step.loss_scale = self.runtime.precision.scaler.get_scale()
            self.guard.begin_step(step)
            self.memory.begin_step(step)
            self._computed, self._comes_again = step, False
            if not self.guard.looks_always:
                self._moments[step.number] = self.tracker.remember(), self.training_state.schedule.state_dict()
            with self.monitor.watching(step), given_targets() as step.targets:
                yield step
            if self._comes_again:
                give_back_memory()
                return
            if self._leaves_out:
                assert self._refused is not None
                self.finish_step(step, *self._refused)
            if bad_step := self.guard.bad_step:
                yield from self.guard.repetitions()
                self._after_fault(bad_step)
            if self.is_done:
                return

    def _look_at_threads(self) -> None:
        """Follow what other processes use of the CPU, and keep with the run what its bits depend on."""
        threads = self.runtime.threads
        if threads is None or self.runtime.device.type != "cpu":
            return
        threads.look()
        number, known = torch.get_num_threads(), self.state.threads
        if note_threads(self.state, number) and len(known) == 2:  # the first time it changes
            reason = "other processes come and go" if threads.follows else "as you ask"
            self.tracker.warn(
                f"{number} thread{'s' * (number != 1)} compute{'s' * (number == 1)} from step {self.state.step + 1} on,"
                f" not {known[0][1]} ({reason}): sums round otherwise; --num_threads {known[0][1]} keeps the bits"
            )

    @contextlib.contextmanager
    def attempt(self, step: Step) -> Iterator[None]:
        """Let the loop compute and apply a step in this context. One that does not fit in memory comes again, smaller.

        Raises:
            UserError: it cannot become smaller, or the weights may have changed already.
        """
        with self._closed_on_error():
            try:
                yield
                self.memory.fitted()
            except (MemoryError, RuntimeError) as error:
                is_repeatable = self._computed is step and self.guard.bad_step is None and not self._is_half_applied()
                if not is_out_of_memory(error) or not is_repeatable or not self.memory.halve(step):
                    raise
                self._take_back(step)
                self.tracker.warn(
                    f"step {step.number} did not fit in memory{memory_asked_for(error)}: micro-batches of"
                    f" {self.loader.micro_batch_size} from now on, which compute the same"
                )

    def _take_back(self, step: Step) -> None:
        """Stand where the run stood before a step of which nothing was applied, to compute it again."""
        self._comes_again, self._applies = True, False
        self.guard.drop_gradients()
        self.guard.forget(step)
        self._spikes = [(each, spike) for each, spike in self._spikes if each is not step]
        set_random_state(step.random_state, self.runtime.device)

    def _begin(self) -> None:
        """Evaluate before the first step: what fine-tuning brings is the difference to that."""
        if self.state.step == 0:
            norms = self.monitor.weights_at_start()
            self.state.weights_at_start = self.monitor.start
            checksums = self.training_state.checksums
            self.tracker.log_start(self.text_model.model, self.loader.examples_per_step, norms, checksums)
        else:
            self.monitor.start = self.state.weights_at_start
            self.tracker.log_layers_at_start()
        self.has_stopped_early = self._out_of_patience() and self.state.step > 0
        self.is_done |= self.has_stopped_early and not self.state.evaluation_due
        if self.state.evaluation_due:
            # A signal came into the evaluation of the step that the run goes on from.
            if self._validate() and self.config.load_best_model_at_end:
                self._save()
            self.has_stopped_early = self._out_of_patience()
            self.is_done |= self.has_stopped_early or self.state.evaluation_due
        elif self.state.step == 0 and "validation" in self.splits:
            self._validate()
            with self.tracker.clock_stopped():
                if found := self._classify("validation"):
                    self.tracker.log_classification(found)
            self.is_done |= self.state.evaluation_due

    def _out_of_patience(self) -> bool:
        return 0 < self.config.early_stopping_patience <= self.state.evaluations_since_best

    def refuse_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Say whether a step must not be applied; its gradients are dropped then.

        One whose loss or gradient is infinite or NaN comes again as the next step; see `NonFiniteGuard`. One whose loss
        stands out is left out by --on_spike skip; see `SpikeWatch`.
        """
        self.signals.poll()
        self._leaves_out = False
        skips = self.config.on_spike == "skip"
        # Whatever is told or kept of a step must be known to be sound: then the device is waited for.
        looks = self._logs(step) or self._evaluates(step) or self._saves(step) or self.signals.received is not None
        looks |= skips
        is_refused = self.guard.refuses(step, loss, grad_norm, looks)
        if is_refused:
            self._refused = loss, grad_norm
            return True
        if looks:
            self._moments.clear()  # all steps until here were sound
        self.spike_watch.note(step, loss)
        if looks or self.guard.looks_always:
            self._spikes += self.spike_watch.look()
        self._leaves_out = skips and any(each is step for each, _ in self._spikes)
        if self._leaves_out:
            self._refused = loss, grad_norm
            self.guard.drop_gradients()
        self._applies = not self._leaves_out
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
        config, state, tracker = self.config, self.state, self.tracker
        scaler = self.runtime.precision.scaler
        self._computed, self._applies = None, False
        tracker.count_step(step, loss, grad_norm, skipped=scaler.get_scale() < step.loss_scale)
        self._tell_spikes()
        if self._logs(step):
            if not state.logged:  # the first time: not before the first step, since it may take half a second
                with tracker.clock_stopped():
                    tracker.log_data(self.splits["train"])
            fp16 = {"loss_scale": step.loss_scale, "skipped_steps": state.skipped_steps} if scaler.is_enabled() else {}
            contrast = self.label_contrast.of_last_step(self.world)
            tracker.log_step(grad_norm, learning_rate=step.learning_rate, **contrast, **fp16)
        if figures := self.monitor.take_figures():
            tracker.log_gradients(figures)
        if config.sample_every > 0 and step.number % config.sample_every == 0:
            with tracker.clock_stopped():
                tracker.log_samples(sample_texts(self.text_model, config.seed))
        should_save = self._saves(step)
        if self._evaluates(step):
            should_save |= self._validate() and config.load_best_model_at_end
            self.has_stopped_early = self._out_of_patience()
        if should_save or self.signals.received:
            self._save()
        is_last = step.number >= self.loader.total_steps
        self.is_done = is_last or self.has_stopped_early or self.signals.received is not None
        return self.is_done

    def _logs(self, step: Step) -> bool:
        return step.number >= self.loader.total_steps or step.number % self.config.logging_steps == 0

    def _evaluates(self, step: Step) -> bool:
        every = self.config.eval_steps or self.loader.steps_per_epoch
        is_time = step.number >= self.loader.total_steps or step.number % every == 0
        return "validation" in self.splits and is_time

    def _saves(self, step: Step) -> bool:
        is_time = self.config.save_steps > 0 and step.number % self.config.save_steps == 0
        return is_time or (self.save_failed and self._logs(step))

    def _after_fault(self, bad_step: Step) -> None:
        """Tell of a step that was not finite, and end the run, or count it and go on."""
        fault, state = self.guard.fault, self.state
        assert self._refused is not None
        if bad_step.number in self._moments:
            # No weight has changed since then: what was counted of the steps after it comes from steps not applied.
            moment, schedule = self._moments[bad_step.number]
            self.tracker.return_to(moment)
            self.spike_watch.forget()
            self.training_state.return_to(schedule)
            self._moments.clear()
        self._tell(fault, bad_step)
        if self.config.on_nonfinite == "stop" or state.nonfinite_in_row == MOST_IN_A_ROW:
            kept = ""
            if state.step > 0 and not fault.parameters_not_finite:
                # The run stands before this step, and its weights are worth going on from.
                set_random_state(bad_step.random_state, self.runtime.device)
                saved = self.saver.save()
                kept = f"saved {saved}" if saved else ""
            if not kept:
                sound = f"checkpoints in {self.output_dir} are sound"
                kept = sound if checkpoints(self.output_dir) else "there is no checkpoint yet"
            raise refusal(fault, state.nonfinite_in_row, kept, self.output_dir)
        self.finish_step(bad_step, *self._refused)

    def _tell(self, fault: Fault, step: Step) -> None:
        with self.tracker.clock_stopped():
            texts = [decode(self.text_model.tokenizer, ids) for ids in fault.token_ids]
            lines = describe(fault, step.examples, texts, str(self.output_dir / fault_file(fault.step)))
            self.tracker.log_fault(
                fault,
                lines,
                {"texts": texts, **self._origin(step)},
            )

    def _origin(self, step: Step) -> dict[str, Any]:
        """Return where a step came from, for the reports of it."""
        return {
            "examples": step.examples,
            "epoch": (step.number - 1) // self.loader.steps_per_epoch,
            "seed": self.config.seed,
            "learning_rate": step.learning_rate,
            "precision": self.runtime.precision.name,
        }

    def _tell_spikes(self) -> None:
        """Tell of the steps that stood out since the last look, each with its hardest text."""
        spikes, self._spikes = self._spikes, []
        for step, spike in spikes:
            self.state.spikes += 1
            if self.state.spikes > MOST_FILES:
                continue
            with self.tracker.clock_stopped():
                ids, applied = self.splits["train"].select(step.examples)["input_ids"], not self._leaves_out
                texts = [decode(self.text_model.tokenizer, each) for each in ids]
                losses = losses_of_texts(self.text_model.model, ids) if self._can_measure else []
                file = str(self.output_dir / spike_file(spike.step))
                line = describe_spike(spike, step.examples, texts, losses, applied, file)
                self.tracker.log_spike(
                    spike, line, {"applied": applied, "texts": texts, "losses": losses, **self._origin(step)}
                )

    # ---- Evaluation and checkpoints ---------------------------------------------------------------------------------

    def _evaluate(self, split: str) -> Evaluation | None:
        """Evaluate a split; None if a signal ended it."""
        batch_size = self.config.per_device_eval_batch_size
        return evaluate(self.text_model, self.splits[split], self.runtime, batch_size, self.config.batching)

    def _classify(self, split: str) -> Classification | None:
        """Let the model tell the emotions of a split; None without one, or without several that the template names."""
        text_format = self.text_model.text_format
        if split not in self.splits or not text_format.has_label or len(text_format.labels) < 2:
            return None
        return classify(self.text_model, self.splits[split], self.runtime, self.config.per_device_eval_batch_size)

    def _validate(self) -> bool:
        """Evaluate and return whether the model is the best so far; after a signal, leave it to the resumed run."""
        self.state.evaluation_due = True
        with self.tracker.clock_stopped():
            evaluation = self._evaluate("validation")
            if evaluation is None:
                return False
            self.state.evaluation_due = False
            return self.tracker.log_evaluation(evaluation)

    def _save(self) -> None:
        self.saved = self.saver.save()
        self.save_failed = self.saved is None

    # ---- The end ----------------------------------------------------------------------------------------------------

    def finish(self) -> int:
        """Write the model, the best one if the flags say so, with its figures and a few texts; or say how to go on.

        Returns:
            The exit code of the script.

        Raises:
            UserError: the run was stopped and could not be saved.
        """
        with self._opened, self._closed_on_error():
            return self._finish()

    def _finish(self) -> int:
        self.tracker.close_bar()
        if self.state.evaluation_due or (self.state.step < self.loader.total_steps and not self.has_stopped_early):
            return self._say_how_to_go_on()
        if self.has_stopped_early:
            print(
                f"stopped early: {self.state.evaluations_since_best} evaluations without a loss below step"
                f" {self.state.best_step}'s"
            )
        self._take_best_model()
        self.saver.export()
        results = self._results()
        samples = sample_texts(self.text_model, self.config.seed)
        self.tracker.log_samples(samples)
        self.tracker.log_results(results)
        self.saver.write_results(results)
        self._write_card(results)
        print(format_figures(results))
        print("\n".join(samples.values()))
        text_format = self.text_model.text_format
        command = generate_command(self.output_dir, text_format.labels[0] if text_format.label_first else "")
        print(f"saved the model in {self.output_dir}; generate with: {command}")
        if self.config.push_to_hub:
            address = self.world.on_main(lambda: upload(self.output_dir, self.config.push_to_hub))
            print(f"uploaded to {address}")
        return 0

    def _write_card(self, results: dict[str, Any]) -> None:
        """Write the model's card; without room for it the run goes on."""
        device = describe_device(self.runtime.device)
        text_format = self.text_model.text_format
        try:
            self.world.on_main(lambda: write_card(self.output_dir, self.config, text_format, results, device))
        except OSError as error:
            self.tracker.warn(f"no model card: {error.strerror}")

    def _say_how_to_go_on(self) -> int:
        name, step = self.signals.name, self.state.step
        if step == 0:
            print(f"stopped by {name} before the first step, with nothing to save yet; to start, run:")
        elif self.save_failed:
            raise UserError(f"stopped by {name} after step {step}, which could not be saved")
        else:
            print(f"stopped by {name} after step {step} and saved {self.saved}; to go on, run:")
        print(f"  {resume_command(self.config, self.world)}")
        return self.signals.exit_code

    def _take_best_model(self) -> None:
        """Load the weights of the best step, if the flags ask for it and they can be had."""
        self.exported_step = self.state.step
        if not (self.config.load_best_model_at_end and 0 < self.state.best_step < self.state.step):
            return
        name = f"checkpoint-{self.state.best_step}"
        folders = [self.output_dir / name]
        if self.training_state.restored_from:  # perhaps in another folder
            folders.append(self.training_state.restored_from.parent / name)
        reasons = []
        for folder in dict.fromkeys(folders):
            reason = self.world.on_main(functools.partial(_why_not, folder))
            if not reason:
                load_weights(self.text_model.model, load_model(str(folder)).state_dict())
                self.exported_step = self.state.best_step
                print(f"took the model of step {self.state.best_step}, the best")
                return
            reasons.append(reason)
        self.tracker.warn(f"the best model cannot be had: {reasons[0]}; the model of the last step is kept")

    def _results(self) -> dict[str, Any]:
        """Return the figures of the model that was exported."""
        if found := self._classify("validation"):
            self.tracker.log_classification(found)
        is_known = "validation" not in self.splits or self.tracker.has_evaluated(self.exported_step)
        if not is_known and (evaluation := self._evaluate("validation")):
            self.tracker.log_evaluation(evaluation)
        results = self.tracker.results(self.exported_step)
        if "test" in self.splits:
            for test in (self._evaluate("test"), self._classify("test")):
                results |= {f"test_{name}": value for name, value in (test.figures() if test else {}).items()}
        if self.signals.received:
            self.tracker.warn(
                f"{self.signals.name} came at the end: figures may be missing, python -m emoft.evaluate tells them"
            )
        return results


def _why_not(checkpoint: Path) -> str:
    """Return why the model of a checkpoint cannot be taken; an empty text if it can."""
    if not checkpoint.is_dir():
        return f"{checkpoint} is missing"
    reason = damage(checkpoint)
    return f"{checkpoint} is damaged ({reason})" if reason else ""
