"""A step of train.py's own loop, watched: the loop computes it several times over, and applies it once.

`WatchedRun` takes the place of `emoft.run.Run` around the loop. It yields the same step again and again, each time in
another way (in float32, with a weight nudged, cut into other micro-batches), looks at what the loop made of it, and
refuses it, as a step that is not finite is refused. So whatever is changed in train.py is seen here.
"""

import contextlib
import io
import math
import tempfile
from collections.abc import Generator, Iterator
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

import train
from emoft.checkpoints.search import find_checkpoint
from emoft.checkpoints.state import TrainingState
from emoft.config import TrainConfig
from emoft.data.steps import Step, StepLoader
from emoft.device import random_state, set_random_state
from emoft.distributed.world import World
from emoft.errors import UserError
from emoft.gradients.monitor import GradientMonitor, group_blocks
from emoft.model.loading import TextModel
from emoft.step.agreements import compare
from emoft.step.config import StepConfig
from emoft.step.look import Look
from emoft.step.numbers import Cut, Numbers, Weight
from emoft.step.texts import Shown, TextReader
from emoft.step.update import Update
from emoft.terminal import Bar
from emoft.tracking.run_state import RunState
from emoft.training.contrast import LabelContrast
from emoft.training.loss import given_targets
from emoft.training.nonfinite import NonFiniteGuard
from emoft.training.runtime import Runtime

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

        def run_class(*arguments: Any) -> WatchedRun:
            watched.append(WatchedRun(config, *arguments))
            return watched[0]

        train.train(flags, world, run_class=run_class)
        numbers = watched[0].numbers
    assert numbers is not None
    return numbers


class WatchedRun:
    """Stands around the loop of train.py instead of `emoft.run.Run`, up to the end of one step."""

    def __init__(
        self,
        flags: StepConfig,
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
        """Find the step.

        Args:
            flags: which step, and how much of it is shown.
            config: and all others are as `emoft.run.Run` is given them.
            runtime: see there.
            text_model: see there.
            splits: see there.
            loader: see there.
            training_state: see there.
            run_state: see there.
            monitor: is not used.
            label_contrast: see there.

        Raises:
            UserError: the run has no such step.
        """
        self.flags, self.config, self.runtime, self.loader = flags, config, runtime, loader
        self.model = text_model.model
        self.reader = TextReader(text_model, splits["train"], config.batching, runtime.precision.dtype)
        self.optimizer, self.schedule = training_state.optimizer, training_state.schedule
        self.label_contrast, self.done = label_contrast, run_state.step
        self.guard = NonFiniteGuard(self.model, self.optimizer, runtime, "stop")
        self.number = flags.step or self._first_that_moves()
        if not self.done < self.number <= loader.total_steps:
            where = f"the run has {loader.total_steps} steps"
            where += f" and the checkpoint stands after step {self.done}" if self.done else ""
            raise UserError(f"--step {self.number}: {where}, choose one from {self.done + 1} to {loader.total_steps}")
        middle: Any = self.model.transformer.h[len(self.model.transformer.h) // 2]
        self.parameter: nn.Parameter = middle.mlp.c_fc.weight
        self.parameter_name = f"transformer.h.{len(self.model.transformer.h) // 2}.mlp.c_fc.weight"
        self.index: tuple[int, ...] | None = None  # of the chosen weight, once its gradient is known
        self.groups = group_blocks(self.model)
        self._kept: list[Tensor] | None = None  # gradients that others are compared with
        self._looks_closely = self._applies = False
        self.seen = Look(math.nan, math.nan, [], [], [], 0.0)  # the latest
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
        step.loss_scale = self.runtime.precision.scaler.get_scale()

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
        self._look(step, loss, grad_norm)
        if not self._applies:
            self.guard.drop_gradients()
        return not self._applies

    def finish_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Go on until the generator of steps ends."""
        return False

    # ---- One way after another ----------------------------------------------------------------------------------

    def _watch(self, step: Step) -> Generator[Step, None, None]:
        self._begin(step)
        self._random_state = random_state(self.runtime.device)
        trained = yield from self._once(step, closely=True)
        if len(trained.given) != len(step.micro_batches):
            raise UserError(
                "the loop of train.py does not call emoft.training.loss.cross_entropy once for each micro-batch: what"
                " it computes cannot be followed"
            )
        with self._in_float32():
            exact = yield from self._once(step)
        shown = self.reader.read(step, trained, self.flags.examples)
        contrast = self.config.label_contrast
        quotients = []
        with self._in_float32(), self._in_float64():
            for sign in (1, -1):
                assert self.index is not None
                with _nudged(self.parameter, self.index, sign * NUDGE):
                    nudged = yield from self._once(step)
                quotients.append(nudged.precise_loss(step, contrast))
        cuts = yield from self._cut_otherwise(step)
        assert self.index is not None
        update = Update(self.optimizer, self.groups, self.parameter, self.index, trained.weight_gradient)
        hook = self.optimizer.register_step_post_hook(update.look)
        yield from self._once(step, applies=True)
        hook.remove()
        with self._in_float32():
            after = yield from self._once(step)
        weight = update.weight(
            self.parameter_name,
            step.learning_rate,
            self._clip_factor(trained),
            exact.weight_gradient,
            finite_difference=(quotients[0] - quotients[1]) / (2 * NUDGE),
            nudge=NUDGE,
        )
        self.numbers = self._count(step, trained, exact, after, cuts, weight, update, shown)

    def _clip_factor(self, look: Look) -> float:
        return min(1.0, (self.config.max_grad_norm or math.inf) / look.grad_norm) if look.grad_norm else 1.0

    def _once(self, step: Step, closely: bool = False, applies: bool = False) -> Generator[Step, None, Look]:
        """Let the loop compute the step with the same random numbers as at first; return what it made of it."""
        set_random_state(self._random_state, self.runtime.device)
        self._looks_closely, self._applies = closely, applies
        step.loss_scale = self.runtime.precision.scaler.get_scale()
        hidden: list[Tensor] = []
        hooks = [
            self.model.transformer.register_forward_hook(lambda *a: hidden.append(a[2].last_hidden_state.detach()))
        ]
        self._hidden = hidden
        self._embedding: list[tuple[Tensor, Tensor]] = []
        self._scores: list[Tensor] = []
        if closely:
            first: Any = self.model.transformer.h[0]
            hooks.append(first.attn.c_attn.register_forward_hook(lambda *a: self._scores.append(a[2].detach())))
            hooks.append(self.model.transformer.wte.register_forward_hook(self._hear_embedding))
        again = replace(step)  # the label contrast sums up over a step, which is another one each time
        with given_targets() as again.targets:
            yield again
        for hook in hooks:
            hook.remove()
        return self.seen

    def _hear_embedding(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Collect the gradient that comes to the embedding's rows through the model's input."""
        if output.requires_grad:
            output.register_hook(lambda gradient: self._embedding.append((inputs[0], gradient.detach())))

    @torch.no_grad()
    def _look(self, step: Step, loss: Tensor, grad_norm: Tensor) -> None:
        look = Look(float(loss), float(grad_norm), self._hidden, list(step.targets), step.micro_batches, 0.0)
        look.loss_scale = step.loss_scale
        look.contrast = self.label_contrast.of_last_step(self.runtime.world).get("label_contrast", 0.0)
        assert self.parameter.grad is not None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # The loop may have clipped them already, as by clip_grad_norm_: all is told of them as they were before.
        norm_now = float(nn.utils.get_total_norm(gradients))
        unclipped = look.grad_norm / norm_now if norm_now else 1.0
        if self.index is None:
            place = int(self.parameter.grad.abs().argmax())
            self.index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), self.parameter.shape))
        look.weight_gradient = float(self.parameter.grad[self.index]) * unclipped
        if self._looks_closely:
            for name, parameters in self.groups.items():
                norms = [p.grad.norm() for p in parameters if p.grad is not None]
                look.gradient_norms[name] = float(torch.stack(norms).norm()) * unclipped if norms else 0.0
            rows = torch.zeros_like(self.model.transformer.wte.weight)
            for ids, gradient in self._embedding:
                rows.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(rows.dtype) / step.loss_scale)
            head = self.model.lm_head.weight  # the embedding itself, if it is tied
            assert head.grad is not None
            is_tied = head is self.model.transformer.wte.weight
            look.from_input, look.from_head = float(rows.norm()), float((head.grad * unclipped - rows * is_tied).norm())
            look.scores = self._scores[0] if self._scores else None
        if self._kept is not None:
            if not self._kept:
                self._kept = [gradient.clone() for gradient in gradients]
            pairs = list(zip(gradients, self._kept, strict=True))
            largest = max(float(kept.abs().max()) for _, kept in pairs)
            look.largest_difference = max(float((new - kept).abs().max()) for new, kept in pairs) / (largest or 1.0)
        self.seen = look

    def _cut_otherwise(self, step: Step) -> Generator[Step, None, list[Cut]]:
        """Let the loop accumulate the gradient over micro-batches of one text, of some, and of all."""
        count, cuts = len(step.examples), []
        middle = max((n for n in range(1, count) if count % n == 0 and n * n <= count), default=1)
        self._kept = []
        was = self.loader.micro_batch_size
        self.model.eval()  # dropout draws other numbers for other micro-batches
        try:
            for size in sorted({1, count // middle if middle > 1 else count, count}):
                self.loader.micro_batch_size = size
                other = next(iter(self.loader.after(step.number - 1)))
                self._begin(other)
                with self._in_float32():
                    look = yield from self._once(other)
                size_of_cut = min(size, count)
                cuts.append(
                    Cut(len(other.micro_batches), size_of_cut, look.loss, look.grad_norm, look.largest_difference)
                )
        finally:
            self.model.train()
            self.loader.micro_batch_size, self._kept = was, None
        return cuts

    @contextlib.contextmanager
    def _in_float32(self) -> Iterator[None]:
        precision = self.runtime.precision
        name, precision.name = precision.name, "no"
        try:
            yield
        finally:
            precision.name = name

    @contextlib.contextmanager
    def _in_float64(self) -> Iterator[None]:
        self.model.double()  # the weights come back as they were: each float32 is a float64
        try:
            yield
        finally:
            self.model.float()

    # ---- From what was seen to numbers --------------------------------------------------------------------------

    @torch.no_grad()
    def _count(
        self,
        step: Step,
        trained: Look,
        exact: Look,
        after: Look,
        cuts: list[Cut],
        weight: Weight,
        update: Update,
        shown: Shown,
    ) -> Numbers:
        precision, config = self.runtime.precision, self.config
        losses = trained.losses_of_texts()
        loss_sum = sum(float(each.double().sum()) for each in losses)
        contrast = config.label_contrast * trained.contrast
        embedding = self.model.transformer.wte.weight
        largest_hidden = max(float(each.abs().max()) for each in exact.hidden)
        moved = max(
            float((a.double() - b.double()).abs().max()) for a, b in zip(trained.hidden, exact.hidden, strict=True)
        )
        dropouts = [m.p for m in self.model.modules() if isinstance(m, nn.Dropout)]
        numbers = Numbers(
            step=step.number,
            total_steps=self.loader.total_steps,
            epoch=(step.number - 1) / self.loader.steps_per_epoch,
            learning_rate=step.learning_rate,
            precision=precision.name,
            batching=config.batching,
            dropout=any(dropouts),
            parameters=sum(p.numel() for p in self.model.parameters()),
            texts=shown.texts,
            examples=len(step.examples),
            tokens=step.tokens,
            predictions=shown.predictions,
            loss_sum=loss_sum,
            loss=trained.loss,
            mean_of_means=shown.mean_of_means,
            label_contrast=contrast,
            uniform_loss=math.log(embedding.shape[0]),
            attention=shown.attention,
            gradient_norms=trained.gradient_norms,
            grad_norm=trained.grad_norm,
            embedding_from_input=trained.from_input,
            embedding_from_head=trained.from_head,
            head_is_tied=self.model.lm_head.weight is embedding,
            loss_float32=exact.loss,
            grad_norm_float32=exact.grad_norm,
            largest_loss_difference=max(
                float((a[2].float() - b[2].float()).abs().max())
                for a, b in zip(trained.given, exact.given, strict=True)
            ),
            largest_hidden_difference=moved / largest_hidden,
            loss_scale=trained.loss_scale,
            max_grad_norm=config.max_grad_norm,
            clip_factor=self._clip_factor(trained),
            cuts=cuts,
            weight=weight,
            adam=update.settings(),
            update_ratios=update.ratios,
            predicted_change=update.predicted,
            loss_after=after.loss,
            agreements=[],
        )
        numbers.agreements = compare(numbers, shown)
        return numbers


@contextlib.contextmanager
def _nudged(parameter: nn.Parameter, index: tuple[int, ...], by: float) -> Iterator[None]:
    """Move a weight while this context is open."""
    with torch.no_grad():
        before = parameter[index].clone()
        parameter[index] += by
    try:
        yield
    finally:
        with torch.no_grad():
            parameter[index] = before
