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
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from datasets import Dataset
from torch import Tensor, nn

import train
from emoft.checkpoints.search import find_checkpoint
from emoft.checkpoints.state import TrainingState
from emoft.config import TrainConfig
from emoft.data.batching import Batch
from emoft.data.steps import Step, StepLoader
from emoft.distributed.world import World
from emoft.errors import UserError
from emoft.gradients.leaks import TOLERANCE as UNMOVED
from emoft.gradients.leaks import hidden_states
from emoft.gradients.monitor import GradientMonitor, group_blocks
from emoft.model.loading import TextModel
from emoft.step.config import StepConfig
from emoft.step.numbers import Agreement, Cut, Numbers, Prediction, Text, Weight
from emoft.step.spelling import spell
from emoft.terminal import Bar
from emoft.tracking.run_state import RunState
from emoft.training.contrast import LabelContrast
from emoft.training.loss import given_targets
from emoft.training.nonfinite import NonFiniteGuard
from emoft.training.randomness import random_state, set_random_state
from emoft.training.runtime import Runtime

LIKELIEST = 5
SEEN_TEXTS = 2  # of which it is measured what each place sees: a forward pass for each of their tokens
NUDGE = 1e-4  # of a weight, for the finite difference
# How far two numbers may be from each other that must agree, as a share.
SAME_LOSS = 1e-3  # computed in the step's precision in two ways
SAME_STEP = 1e-4  # of float32, whose sums are taken in another order
SAME_GRADIENT = 2e-3  # of float32, against a difference quotient in float64
SAME_UPDATE = 1e-3  # of float32, against the formula in float64
ROUNDING = 2.4e-7  # of a weight in float32, which the update is added to: two units in the last place


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


@dataclass
class Look:
    """What the loop made of the step once."""

    loss: float  # of the loop
    grad_norm: float
    hidden: list[Tensor]  # of each micro-batch, (B, T, C)
    given: list[tuple[Tensor, Tensor, Tensor]]  # likewise targets, places and losses, (K,) each
    batches: list[Batch]
    contrast: float  # unweighted
    weight_gradient: float = math.nan  # of the chosen weight
    gradient_norms: dict[str, float] = field(default_factory=dict)
    loss_scale: float = 1.0
    from_input: float = 0.0  # norm of the part of the embedding's gradient that comes through the model's input
    from_head: float = 0.0  # and through its head
    scores: Tensor | None = None  # (B, T, 3 C), queries, keys and values of the first block in the first micro-batch
    largest_difference: float = 0.0  # of the gradients to those kept, as a share of the largest

    def precise_loss(self, step: Step, weight: float) -> float:
        """Return the loss of the step in float64: that of the loop, summed anew."""
        total = sum(float(losses.double().sum()) for losses in self.losses_of_texts())
        return total / step.tokens + weight * self.contrast

    def losses_of_texts(self) -> list[Tensor]:
        """Return the losses of each micro-batch without those of rivals; see `training.contrast`."""
        found = []
        for batch, (_, places, losses) in zip(self.batches, self.given, strict=True):
            owners = batch.owners().flatten().to(places.device)[places]
            found.append(torch.where(owners < batch.examples, losses, 0))
        return found


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
        self.model, self.tokenizer, self.text_format = text_model.model, text_model.tokenizer, text_model.text_format
        self.rows = splits["train"]
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

    def __enter__(self) -> "WatchedRun":
        return self

    def __exit__(self, *error: object) -> None:
        pass

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
        with Bar(f"Computing step {self.number} in several ways") as self._bar:
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
        texts = self._shown(step, trained)
        contrast = self.config.label_contrast
        quotients = []
        with self._in_float32(), self._in_float64():
            for sign in (1, -1):
                assert self.index is not None
                with _nudged(self.parameter, self.index, sign * NUDGE):
                    nudged = yield from self._once(step)
                quotients.append(nudged.precise_loss(step, contrast))
        cuts = yield from self._cut_otherwise(step)
        before = {p: p.detach().clone() for p in self.model.parameters()}
        state = {name: value.clone() for name, value in self.optimizer.state.get(self.parameter, {}).items()}
        update = _Update(self, before)
        hook = self.optimizer.register_step_post_hook(update.look)
        yield from self._once(step, applies=True)
        hook.remove()
        with self._in_float32():
            after = yield from self._once(step)
        fd = (quotients[0] - quotients[1]) / (2 * NUDGE)
        weight = self._weight(step, trained, exact, fd, state, before[self.parameter], update.after)
        self.numbers = self._count(step, trained, exact, after, cuts, weight, update, texts)

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
        if self.index is None:
            place = int(self.parameter.grad.abs().argmax())
            self.index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), self.parameter.shape))
        look.weight_gradient = float(self.parameter.grad[self.index])
        if self._looks_closely:
            for name, parameters in self.groups.items():
                norms = [p.grad.norm() for p in parameters if p.grad is not None]
                look.gradient_norms[name] = float(torch.stack(norms).norm()) if norms else 0.0
            rows = torch.zeros_like(self.model.transformer.wte.weight)
            for ids, gradient in self._embedding:
                rows.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(rows.dtype) / step.loss_scale)
            head = self.model.lm_head.weight  # the embedding itself, if it is tied
            assert head.grad is not None
            is_tied = head is self.model.transformer.wte.weight
            look.from_input, look.from_head = float(rows.norm()), float((head.grad - rows * is_tied).norm())
            look.scores = self._scores[0] if self._scores else None
        if self._kept is not None:
            gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
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
        was = self.loader.config
        self.model.eval()  # dropout draws other numbers for other micro-batches
        try:
            for size in sorted({1, count // middle if middle > 1 else count, count}):
                self.loader.config = replace(was, per_device_train_batch_size=size)
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
            self.loader.config, self._kept = was, None
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
        update: "_Update",
        shown: "_Shown",
    ) -> Numbers:
        precision, config = self.runtime.precision, self.config
        losses = trained.losses_of_texts()
        loss_sum = sum(float(each.double().sum()) for each in losses)
        contrast = config.label_contrast * trained.contrast
        embedding = self.model.transformer.wte.weight
        group = next(g for g in self.optimizer.param_groups if any(p is self.parameter for p in g["params"]))
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
            adam={
                "beta1": group["betas"][0],
                "beta2": group["betas"][1],
                "epsilon": group["eps"],
                "weight_decay": group["weight_decay"],
            },
            update_ratios=update.ratios,
            predicted_change=update.predicted,
            loss_after=after.loss,
            agreements=[],
        )
        numbers.agreements = [
            _exact("targets", shown.aligned_share, 1.0),
            _exact("sight", float(shown.seen_wrongly), 0.0),
            Agreement("losses", shown.largest_difference, 0.0, shown.largest_difference, SAME_LOSS),
            _share("mean", loss_sum / step.tokens, trained.loss, SAME_LOSS),
            _share("gradient", weight.finite_difference, weight.gradient_float32, SAME_GRADIENT),
            *(_cut(cut, cuts[0]) for cut in cuts[1:]),
            Agreement(
                "update",
                weight.update,
                weight.optimizer_update,
                abs(weight.update - weight.optimizer_update),
                SAME_UPDATE * abs(weight.update) + ROUNDING * abs(weight.before),
            ),
        ]
        return numbers

    def _clip_factor(self, look: Look) -> float:
        return min(1.0, (self.config.max_grad_norm or math.inf) / look.grad_norm) if look.grad_norm else 1.0

    @torch.no_grad()
    def _shown(self, step: Step, look: Look) -> "_Shown":
        """Return what is told of the texts, while the weights are still as the step found them."""
        texts = self._texts(step, look)
        means = [sum(found) / len(found) for text in texts if (found := [x for x in text.losses if x is not None])]
        shown = texts[: self.flags.examples]
        predictions, difference = self._predictions(shown, look)
        return _Shown(
            shown,
            sum(means) / len(means),
            predictions,
            difference,
            self._attention(shown, look),
            replace(step, targets=look.given).aligned_share(),
            self._sight(shown),
        )

    def _texts(self, step: Step, look: Look) -> list[Text]:
        """Return the texts of the step, with what the loss was given of each."""
        found: list[Text] = []
        for batch, (targets, places, losses) in zip(step.micro_batches, look.given, strict=True):
            owners, ids = batch.owners().flatten(), batch.inputs["input_ids"].flatten()
            positions = batch.inputs.get("position_ids")
            width = batch.inputs["input_ids"].shape[1]
            positions = torch.arange(len(ids)) % width if positions is None else positions.flatten()
            target_of = dict(zip(places.tolist(), zip(targets.tolist(), losses.tolist(), strict=True), strict=True))
            for number in range(batch.examples):
                row = step.examples[len(found)]
                where = (owners == number).nonzero().flatten().tolist()
                given = [target_of.get(place, (-100, 0.0)) for place in where]
                of_text = ids[where].tolist()
                found.append(
                    Text(
                        row=row,
                        text=self._filled(row),
                        ids=of_text,
                        tokens=spell(self.tokenizer, of_text),
                        positions=positions[where].tolist(),
                        targets=[None if target == -100 else target for target, _ in given],
                        losses=[None if target == -100 else loss for target, loss in given],
                        target_tokens=[
                            None if target == -100 else spell(self.tokenizer, [target])[0] for target, _ in given
                        ],
                    )
                )
        return found

    def _filled(self, row: int) -> str:
        example = self.rows[row]
        return self.text_format.fill(example["text"], example.get("label", ""))

    def _predictions(self, shown: list[Text], look: Look) -> tuple[list[Prediction], float]:
        """Return what the model expects at the hardest and the easiest place of the texts shown.

        And how far the loop's losses are from those of `F.cross_entropy`, at most; all in the precision of the step.
        """
        head = self.model.lm_head.weight
        found: list[Prediction] = []
        difference, number = 0.0, 0
        for batch, hidden, (targets, places, losses) in zip(look.batches, look.hidden, look.given, strict=True):
            dtype = self.runtime.precision.dtype
            rows = hidden.flatten(0, 1)[places]
            logits = (rows.to(dtype) @ head.to(dtype).T).float()  # (K, V)
            by_formula = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
            difference = max(difference, float((by_formula - losses).abs().max()))
            owners = batch.owners().flatten().to(places.device)[places]
            for text in range(batch.examples):
                if number == len(shown):
                    break
                mine = ((owners == text) & (targets != -100)).nonzero().flatten()
                start = int((batch.owners().flatten() == text).nonzero()[0])
                if len(mine):
                    by_loss = losses[mine].argsort()
                    for k in dict.fromkeys([int(mine[by_loss[-1]]), int(mine[by_loss[0]])]):
                        chances = logits[k].softmax(-1)
                        top = chances.topk(min(LIKELIEST, len(chances)))
                        found.append(
                            Prediction(
                                number,
                                int(places[k]) - start,
                                spell(self.tokenizer, top.indices.tolist()),
                                top.values.tolist(),
                                spell(self.tokenizer, [int(targets[k])])[0],
                                float(chances[targets[k]]),
                                float(losses[k]),
                            )
                        )
                number += 1
        return found, difference

    def _attention(self, shown: list[Text], look: Look) -> list[list[list[float]]]:
        """Return where each place of the shown texts of the first micro-batch looks in the first block."""
        if look.scores is None:
            return []
        attention: Any = self.model.transformer.h[0]
        heads, width = attention.attn.num_heads, attention.attn.head_dim
        values, batch = look.scores.float().flatten(0, -2), look.batches[0]
        owners, maps = batch.owners().flatten(), []
        for number in range(min(len(shown), batch.examples)):
            rows = values[(owners == number).nonzero().flatten()]
            query, key = (part.view(len(rows), heads, width).transpose(0, 1) for part in rows.chunk(3, -1)[:2])
            later = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).triu(1)
            scores = (query @ key.transpose(1, 2) * width**-0.5).masked_fill(later, -math.inf)
            maps.append(scores.softmax(-1).mean(0).tolist())
        return maps

    @torch.no_grad()
    def _sight(self, shown: list[Text]) -> int:
        """Change each token of the first texts shown, and count which places it moves; then how many do not fit."""
        way = self.config.batching
        texts = [text.ids for text in shown[:SEEN_TEXTS]]
        for text in shown[:SEEN_TEXTS]:
            text.sees = [0] * len(text.ids)
        self.model.eval()
        states = hidden_states(self.model, texts, way)
        scale, wrong = max(float(each.abs().max()) for each in states), 0
        for number, ids in enumerate(texts):
            for place in range(len(ids)):
                changed = [list(each) for each in texts]
                changed[number][place] = (ids[place] + 1 + place) % self.model.config.vocab_size
                moved = [
                    (b - a).abs().amax(-1) / scale
                    for a, b in zip(states, hidden_states(self.model, changed, way), strict=True)
                ]
                for other, moves in enumerate(moved):
                    for t, move in enumerate(moves.tolist()):
                        is_own = other == number and t >= place
                        sees = move > (0.0 if is_own else UNMOVED)
                        wrong += sees != is_own
                        shown[other].sees[t] += sees
        self.model.train()
        return wrong

    def _weight(
        self,
        step: Step,
        trained: Look,
        exact: Look,
        finite_difference: float,
        state: dict[str, Tensor],
        before: Tensor,
        new: float,
    ) -> Weight:
        """Compute AdamW's update of the chosen weight by the formula, in float64 (Loshchilov and Hutter, 2019)."""
        assert self.index is not None
        group = next(g for g in self.optimizer.param_groups if any(p is self.parameter for p in g["params"]))
        (beta1, beta2), epsilon, decay = group["betas"], group["eps"], group["weight_decay"]
        now = self.optimizer.state[self.parameter]
        m0, v0 = (float(state[name][self.index]) if state else 0.0 for name in ("exp_avg", "exp_avg_sq"))
        old, steps = float(before[self.index]), int(now["step"])
        gradient = trained.weight_gradient * self._clip_factor(trained)
        m, v = beta1 * m0 + (1 - beta1) * gradient, beta2 * v0 + (1 - beta2) * gradient**2
        m_hat, v_hat = m / (1 - beta1**steps), v / (1 - beta2**steps)
        lost = step.learning_rate * decay * old
        return Weight(
            name=self.parameter_name,
            index=list(self.index),
            gradient=trained.weight_gradient,
            gradient_float32=exact.weight_gradient,
            finite_difference=finite_difference,
            nudge=NUDGE,
            before=old,
            after=new,
            m_before=m0,
            v_before=v0,
            m=m,
            v=v,
            m_hat=m_hat,
            v_hat=v_hat,
            decay=-lost,
            update=-lost - step.learning_rate * m_hat / (math.sqrt(v_hat) + epsilon),
            optimizer_update=new - old,
            steps=steps,
        )


@dataclass
class _Shown:
    texts: list[Text]
    mean_of_means: float
    predictions: list[Prediction]
    largest_difference: float  # of a loss to the formula's
    attention: list[list[list[float]]]
    aligned_share: float
    seen_wrongly: int  # places that see what they must not, or do not see what they must


class _Update:
    """Looks at the weights right after AdamW has changed them, while the gradients are still there."""

    def __init__(self, run: WatchedRun, before: dict[nn.Parameter, Tensor]) -> None:
        self.run, self.before = run, before
        self.ratios: dict[str, float] = {}
        self.predicted = 0.0  # change of the loss, to first order
        self.after = math.nan  # of the chosen weight

    @torch.no_grad()
    def look(self, *arguments: object) -> None:
        """Measure the update: a hook of the optimizer."""
        run, index, seen = self.run, self.run.index, self.run.seen
        assert index is not None and run.parameter.grad is not None
        self.after = float(run.parameter[index])
        # AdamW's kernel may leave the gradients clipped, or as they were: the chosen one tells which.
        left = float(run.parameter.grad[index]) / seen.weight_gradient
        for name, parameters in run.groups.items():
            changes = [p - self.before[p] for p in parameters]
            size = math.hypot(*(float(self.before[p].norm()) for p in parameters))
            self.ratios[name] = math.hypot(*(float(change.norm()) for change in changes)) / (size or math.inf)
            self.predicted += sum(
                float((p.grad.double() * change.double()).sum()) / left
                for p, change in zip(parameters, changes, strict=True)
                if p.grad is not None
            )


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


def _exact(name: str, one: float, other: float) -> Agreement:
    return Agreement(name, one, other, abs(one - other), 0.0)


def _cut(cut: Cut, first: Cut) -> Agreement:
    """Compare a way to cut the step to the first one, by its loss and by all gradients."""
    difference = max(cut.difference, abs(cut.loss - first.loss) / first.loss)
    return Agreement(f"cut_{cut.micro_batches}x{cut.size}", cut.loss, first.loss, difference, SAME_STEP)


def _share(name: str, one: float, other: float, tolerance: float) -> Agreement:
    """Compare two numbers; the difference is a share of the larger one."""
    return Agreement(name, one, other, abs(one - other) / (max(abs(one), abs(other)) or 1.0), tolerance)
