"""`train.py --plan`: what a training will use and take, before it begins.

The loop of train.py computes a few steps, the largest among them, with weights that are thrown away afterwards. So what
is told of memory and time is measured on what will run; only what would take too long is computed from that.
"""

import contextlib
import itertools
import time
from collections.abc import Iterator

from torch import Tensor

from emoft import device as devices
from emoft.data.batching import Batch
from emoft.data.steps import Step
from emoft.errors import is_out_of_memory
from emoft.plan.activations import Activations
from emoft.plan.disk import Disk
from emoft.plan.measured import Measured
from emoft.plan.report import report
from emoft.plan.times import times_of, tokens_of_a_step
from emoft.run.setup import Setup
from emoft.start import STARTED
from emoft.terminal import Bar

WARMUP_STEPS = 2  # whose shapes are new
LEAST_STEPS, MOST_STEPS, ENOUGH_SECONDS = 3, 150, 5.0  # of measuring the time of a step


class Plan:
    """Stands around the loop of train.py instead of `emoft.run.run.Run`, for a few steps, and tells what it found."""

    def __init__(self, setup: Setup) -> None:
        """Begin with nothing measured."""
        self.setup, self.loader, self.monitor = setup, setup.loader, setup.monitor
        self.device, self.done = setup.runtime.device, setup.run_state.step
        self.measured = Measured(Activations(setup.text_model.model), time.perf_counter() - STARTED)

    # ---- What the loop is given -------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Yield one micro-batch of a single text, the largest step, if it seems to fit, and then some as they come."""
        if not self.setup.steps_left:
            return
        measured = self.measured
        with Bar("Computing a few steps"):
            devices.reset_peak_memory(self.device)
            self._begun = time.perf_counter()
            one = self._of_one_text()
            with measured.activations.counted():
                yield one
            largest = next(iter(self.loader.after(self.loader.largest_step(self.done) - 1)))
            measured.largest = max(largest.micro_batches, key=lambda batch: batch.inputs["input_ids"].numel())
            measured.fits = self._seems_to_fit(one.micro_batches[0], measured.largest)
            if measured.fits:
                with measured.activations.counted():
                    yield largest
            if measured.fits:
                yield from self._timed()

    def _of_one_text(self) -> Step:
        size, self.loader.micro_batch_size = self.loader.micro_batch_size, 1
        step = next(iter(self.loader.after(self.done)))
        self.loader.micro_batch_size = size
        step.micro_batches = step.micro_batches[:1]
        return step

    def _seems_to_fit(self, small: Batch, large: Batch) -> bool:
        """Judge by what a single text keeps, so that memory need not run out to know that it would."""
        found, model = self.measured.activations, self.setup.text_model.model
        found.of_texts = round(found.of_texts * large.inputs["input_ids"].numel() / small.inputs["input_ids"].numel())
        found.logits = round(found.logits * len(large.predicting) / max(1, len(small.predicting)))
        gradients = sum(p.numel() * p.element_size() for p in model.parameters()) // self.setup.shards
        free = devices.free_memory(self.device)
        return free is None or found.of_texts + found.logits + gradients < free

    def _timed(self) -> Iterator[Step]:
        measured = self.measured
        again_and_again = (self.loader.after(self.done) for _ in itertools.count())  # a small split has few steps
        before = begun = time.perf_counter()
        for number, step in enumerate(itertools.chain.from_iterable(again_and_again), start=-WARMUP_STEPS):
            yield step
            devices.synchronize(self.device)
            now = time.perf_counter()
            if number == -1:
                begun, measured.seconds_of_first = now, now - self._begun
            elif number >= 0:
                measured.seconds.append(now - before)  # with the making of its batch
                measured.tokens.append(int(step.lengths.sum()))
                if number >= MOST_STEPS or (number >= LEAST_STEPS and now - begun > ENOUGH_SECONDS):
                    break
            if not measured.fits:
                return
            before = now
        if every := self.setup.config.log_gradients_every:
            step.number = every  # one of those that are measured
            before = time.perf_counter()
            with self.monitor.watching(step):
                yield step
                self.monitor.take_figures()
            usual = measured.seconds_of_a_step(tokens_of_a_step(self.setup))
            measured.seconds_measuring = max(0.0, time.perf_counter() - before - usual)

    @contextlib.contextmanager
    def attempt(self, step: Step) -> Iterator[None]:
        """Let the loop compute a step in this context; see that it may not fit in memory."""
        step.loss_scale = self.setup.runtime.precision.scaler.get_scale()
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.measured.fits = False

    def refuse_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Let each step be applied: nobody keeps these weights."""
        return False

    def finish_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Go on as long as there are steps."""
        return False

    # ---- What it tells ----------------------------------------------------------------------------------------------

    def finish(self) -> int:
        """Print the plan; the exit code of a training."""
        disk = Disk(self.setup)
        with Bar("Evaluating some texts"):
            can_run = self.measured.fits and self.setup.steps_left
            times = times_of(self.setup, self.measured, disk) if can_run else {}
        print(report(self.setup, self.measured, disk, times))
        return 0
