"""A step of train.py's own loop, watched: the loop computes it several times over, and applies it once.

`WatchedRun` takes the place of `emoft.run.run.Run` around the loop. It yields the same step again and again, each time
in another way (in float32, with a weight nudged, cut into other micro-batches), looks at what the loop made of it, and
refuses it, as a step that is not finite is refused. So whatever is changed in train.py is seen here.
"""

import contextlib
import io
import math
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import replace

from torch import Tensor

import train
from emoft.checkpoints.search import find_checkpoint
from emoft.config import TrainConfig
from emoft.data.steps import Step
from emoft.device import random_state, set_random_state
from emoft.distributed.world import World
from emoft.errors import UserError
from emoft.run.setup import Setup
from emoft.step.config import StepConfig
from emoft.step.look import Look
from emoft.step.numbers import Cut, Numbers
from emoft.step.observer import Observer
from emoft.step.summary import Seen, clip_factor, sum_up
from emoft.step.texts import TextReader
from emoft.step.update import Update
from emoft.step.ways import in_float32, in_float64, nudged, without_dropout
from emoft.terminal import Bar
from emoft.training.loss import given_targets
from emoft.training.nonfinite import NonFiniteGuard

NUDGE = 1e-4  # of a weight, for the finite difference


def watch_step(config: StepConfig) -> Numbers:
    """Run train.py's loop to a step and return the numbers of that.

    Raises:
        UserError: the flags, the data or the model cannot be trained on, or there is no such step.
    """
    world = World()
    flags = TrainConfig(**config.of_training())
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        checkpoint = None
        if flags.resume_from_checkpoint:
            checkpoint = find_checkpoint(replace(flags, overwrite_output_dir=False), world)
            if checkpoint is None:
                raise UserError(
                    f"--resume_from_checkpoint latest: {flags.output_dir} holds no checkpoint, name the folder of one"
                )
        # The step is watched and nothing else of a run is done: nothing is written, logged, compiled or measured.
        flags = replace(
            flags,
            output_dir=folder,
            overwrite_output_dir=False,
            resume_from_checkpoint=str(checkpoint or ""),
            log_gradients_every=0,
            torch_compile=False,
        )
        watched: list[WatchedRun] = []

        def run_class(setup: Setup) -> WatchedRun:
            watched.append(WatchedRun(config, setup))
            return watched[0]

        train.train(flags, world, run_class=run_class)
        numbers = watched[0].numbers
    assert numbers is not None
    return numbers


class WatchedRun:
    """Stands around the loop of train.py instead of `emoft.run.run.Run`, up to the end of one step."""

    def __init__(self, flags: StepConfig, setup: Setup) -> None:
        """Find the step.

        Args:
            flags: which step, and how much of it is shown.
            setup: of the run that has it.

        Raises:
            UserError: the run has no such step.
        """
        self.flags, self.setup, self.config, self.loader = flags, setup, setup.config, setup.loader
        self.model, self.precision, self.device = setup.text_model.model, setup.runtime.precision, setup.runtime.device
        self.reader = TextReader(setup.text_model, setup.splits["train"], self.config.batching, self.precision.dtype)
        self.optimizer, self.schedule = setup.training_state.optimizer, setup.training_state.schedule
        self.done = setup.run_state.step
        self.guard = NonFiniteGuard(self.model, self.optimizer, setup.runtime, "stop")
        self.number = flags.step or self._first_that_moves()
        if not self.done < self.number <= self.loader.total_steps:
            where = f"the run has {self.loader.total_steps} steps"
            where += f" and the checkpoint stands after step {self.done}" if self.done else ""
            raise UserError(
                f"--step {self.number}: {where}, choose one from {self.done + 1} to {self.loader.total_steps}"
            )
        self.observer = Observer(setup)
        self._applies = False
        self._seen = Look(math.nan, math.nan, [], [], [], 0.0)  # the latest
        self.numbers: Numbers | None = None

    def _first_that_moves(self) -> int:
        """Return the next step whose learning rate is not 0, as that of the first step of a warmup is."""
        factor = self.schedule.lr_lambdas[0]
        return next((n + 1 for n in range(self.done, self.loader.total_steps) if factor(n) > 0), self.done + 1)

    def attempt(self, step: Step) -> contextlib.AbstractContextManager[None]:
        """Return the context in which the loop computes a step."""
        return contextlib.nullcontext()

    def finish(self) -> int:
        """Return the exit code of a training."""
        return 0

    # ---- What the loop is given ---------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Yield the steps before the watched one, then that one, in several ways."""
        self._applies, before = True, self.number - 1 - self.done
        with Bar(f"Training up to step {self.number}", "steps", before) as bar:
            while self.done < self.number - 1:
                for step in self.loader.after(self.done):
                    if step.number == self.number:
                        break
                    self._begin(step)
                    yield step
                    self.done += 1
                    bar.advance()
        step = next(iter(self.loader.after(self.done)))
        with Bar(f"Computing step {self.number} in several ways"):
            yield from self._watch(step)

    def _begin(self, step: Step) -> None:
        step.learning_rate = float(self.schedule.get_last_lr()[0])
        step.loss_scale = self.precision.scaler.get_scale()

    def refuse_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Look at what the loop has computed, and say whether it must not be applied."""
        overflows = bool(loss.isfinite()) and not grad_norm.isfinite() and step.loss_scale > 1
        if overflows and step.number == self.number:
            raise UserError(
                f"step {step.number} changes nothing: its gradient overflows fp16 at the loss scale of"
                f" {step.loss_scale:g}, which falls then; show a later one by --step {step.number + 1}"
            )
        if not (loss.isfinite() and grad_norm.isfinite()) and not overflows:
            raise UserError(
                f"the loss or the gradient of step {step.number} is not finite (loss {float(loss)}): python train.py"
                " with the same flags finds where it begins"
            )
        if step.number < self.number:
            return False
        self._seen = self.observer.look(step, loss, grad_norm)
        if not self._applies:
            self.guard.drop_gradients()
        return not self._applies

    def finish_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Go on until the generator of steps ends."""
        return False

    # ---- One way after another ----------------------------------------------------------------------------------

    def _watch(self, step: Step) -> Generator[Step, None, None]:
        self._begin(step)
        self._random_state = random_state(self.device)
        trained = yield from self._once(step, closely=True)
        if len(trained.given) != len(step.micro_batches):
            raise UserError(
                "the loop of train.py does not call emoft.training.loss.cross_entropy once for each micro-batch: what"
                " it computes cannot be followed"
            )
        with in_float32(self.precision):
            exact = yield from self._once(step)
        shown = self.reader.read(step, trained, self.flags.examples)
        finite_difference = yield from self._difference(step)
        cuts = yield from self._cut_otherwise(step)
        watched, index = self.observer, self._index
        update = Update(self.optimizer, watched.groups, watched.parameter, index, trained.weight_gradient)
        hook = self.optimizer.register_step_post_hook(update.look)
        yield from self._once(step, applies=True)
        hook.remove()
        with in_float32(self.precision):
            after = yield from self._once(step)
        weight = update.weight(
            watched.parameter_name,
            step.learning_rate,
            clip_factor(self.config.max_grad_norm, trained.grad_norm),
            exact.weight_gradient,
            finite_difference=finite_difference,
            nudge=NUDGE,
        )
        self.numbers = sum_up(self.setup, step, Seen(trained, exact, after, cuts, weight, update, shown))

    @property
    def _index(self) -> tuple[int, ...]:
        """The place of the weight that is followed, in its matrix."""
        assert self.observer.index is not None
        return self.observer.index

    def _once(self, step: Step, closely: bool = False, applies: bool = False) -> Generator[Step, None, Look]:
        """Let the loop compute the step with the same random numbers as at first; return what it made of it."""
        set_random_state(self._random_state, self.device)
        self._applies = applies
        step.loss_scale = self.precision.scaler.get_scale()
        again = replace(step)  # the label contrast sums up over a step, which is another one each time
        with self.observer.listening(closely), given_targets() as again.targets:
            yield again
        return self._seen

    def _difference(self, step: Step) -> Generator[Step, None, float]:
        """Return the finite difference of the loss by the weight that is followed."""
        losses = []
        with in_float32(self.precision), in_float64(self.model):
            for sign in (1, -1):
                with nudged(self.observer.parameter, self._index, sign * NUDGE):
                    look = yield from self._once(step)
                losses.append(look.precise_loss(step, self.config.label_contrast))
        return (losses[0] - losses[1]) / (2 * NUDGE)

    def _cut_otherwise(self, step: Step) -> Generator[Step, None, list[Cut]]:
        """Let the loop accumulate the gradient over micro-batches of one text, of some, and of all."""
        count, cuts = len(step.examples), []
        middle = max((n for n in range(1, count) if count % n == 0 and n * n <= count), default=1)
        was = self.loader.micro_batch_size
        try:
            # Dropout would draw other numbers for other micro-batches.
            with without_dropout(self.model), self.observer.comparing(), in_float32(self.precision):
                for size in sorted({1, count // middle if middle > 1 else count, count}):
                    self.loader.micro_batch_size = size
                    other = next(iter(self.loader.after(step.number - 1)))
                    self._begin(other)
                    look = yield from self._once(other)
                    size_of_cut = min(size, count)
                    cuts.append(
                        Cut(len(other.micro_batches), size_of_cut, look.loss, look.grad_norm, look.largest_difference)
                    )
        finally:
            self.loader.micro_batch_size = was
        return cuts
