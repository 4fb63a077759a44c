"""Infinite or NaN losses and gradients: kept from the weights, and traced to where they began.

The training loop itself repeats such a step, with a listener at every module: what is traced is what was computed.
"""

import base64
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel

from emoft.data.steps import Step
from emoft.device import random_state, set_random_state
from emoft.distributed.parallel import whole
from emoft.errors import UserError
from emoft.files import fault_file
from emoft.training.optimizer import skip_next_step_if
from emoft.training.runtime import Runtime

REPETITIONS = 2  # of a bad step: what is of the step comes again in each, what is of the device may not
MOST_IN_A_ROW = 10  # steps that --on_nonfinite skip drops before it stops
ROWS_AT_ONCE = 64  # of logits, each as wide as the vocabulary
LAST_MODULE = "transformer.ln_f"  # what comes after it is the head and the loss


@dataclass
class Fault:
    """Where a step stopped being finite. Lists of names are in the order of the model."""

    step: int
    loss: float  # in nats
    loss_scale: float
    found: str  # "forward", "backward", "weight gradient", "loop" (train.py itself), or "nowhere" if it did not recur
    module: str = ""  # the first whose output, or whose output's gradient, was not finite; or the parameter
    values_not_finite: int = 0  # of that output or gradient; of the head, places whose loss is not finite
    values: int = 0
    parameters_not_finite: list[str] = field(default_factory=list)
    gradients_not_finite: list[str] = field(default_factory=list)
    examples_at_fault: list[int] = field(default_factory=list)  # places in the step, from 0
    token_ids: list[list[int]] = field(default_factory=list)  # of each example of the step
    rank: int = 0  # of several, the first one where it was found
    recurred: int = 0  # in how many of its repetitions it began at the same place again
    random_state: list[str] = field(default_factory=list)  # its generators at the start of the step, base64


class NonFiniteGuard:
    """Keeps a step whose loss or gradient is not finite from changing anything, and lets it be repeated.

    On a GPU nobody waits at every step for the answer: once there was such a step, the optimizer itself changes
    nothing any more, until somebody looks and reads which step it was. Where each step is looked at anyway (on the CPU,
    in fp16, whose scaler waits, and if such steps are to be skipped), `looks_always` says so.
    """

    def __init__(self, model: GPT2LMHeadModel, optimizer: Optimizer, runtime: Runtime, on_nonfinite: str) -> None:
        self.model, self.optimizer, self.runtime = model, optimizer, runtime
        is_cpu, is_fp16 = runtime.device.type == "cpu", runtime.precision.scaler.is_enabled()
        self.looks_always = is_cpu or is_fp16 or on_nonfinite == "skip"
        self.bad_step: Step | None = None  # that is to be repeated, or is being repeated
        self.faults: list[Fault] = []  # what each of its repetitions found
        self._first = torch.zeros((), dtype=torch.int64, device=runtime.device)  # such step since the last look
        self._recent: list[Step] = []  # since then
        self._listener: _Listener | None = None

    def begin_step(self, step: Step) -> None:
        """Remember what repeats the step that begins."""
        step.random_state = random_state(self.runtime.device)
        self._recent.append(step)

    def refuses(self, step: Step, loss: Tensor, grad_norm: Tensor, looks: bool) -> bool:
        """Say whether a step must not be applied; its gradients are dropped then, and the loss scale stays as it is.

        In fp16 an infinite gradient is no fault, since the scaler drops the step and lowers its scale; but no scale
        mends an infinite loss, or a gradient that is infinite at a scale below 1.

        Args:
            step: of `begin_step`, or `bad_step` once more.
            loss: of the whole step, on the device.
            grad_norm: likewise, unscaled.
            looks: reads from the device, a CPU-GPU sync point, which elsewhere than there is no matter.
        """
        if self._listener is not None:  # this was the repetition
            self.faults.append(self._find_fault(step, float(loss), float(grad_norm)))
            self.drop_gradients()
            return True
        is_fault = ~(loss.isfinite() & grad_norm.isfinite())
        scaler = self.runtime.precision.scaler
        if scaler.is_enabled() and scaler.get_scale() >= 1:
            is_fault = ~loss.isfinite()
        self._first = torch.where((self._first == 0) & is_fault, step.number, self._first)
        if self.looks_always or looks:
            first = int(self._first)
            self.bad_step = next((each for each in self._recent if each.number == first), None)
            self._first.zero_()
            self._recent.clear()
        else:
            skip_next_step_if(self.optimizer, self._first > 0)
        if self.bad_step is not None:
            self.drop_gradients()
        return self.bad_step is not None

    def forget(self, step: Step) -> None:
        """Forget a step that was begun and comes again, made anew."""
        self._recent = [each for each in self._recent if each is not step]

    def drop_gradients(self) -> None:
        """Leave out a step, whatever there is of its gradients."""
        self.optimizer.zero_grad(set_to_none=True)
        scaler = self.runtime.precision.scaler
        if scaler.is_enabled():
            scaler.scale(self._first)  # it makes its scale when it is first used, which may not have been
            scaler.update(scaler.get_scale())  # the same scale, and the gradients of the next step are scaled anew

    def repetitions(self) -> Iterator[Step]:
        """Yield the bad step to be repeated, as often as it takes to know; `fault` then says what was found."""
        step = self.bad_step
        assert step is not None
        self.faults = []
        for _ in range(REPETITIONS):
            with self._repeating(step):
                yield step
        self.bad_step = None

    @property
    def fault(self) -> Fault:
        """What the repetitions of the bad step found, as one."""
        found = next((fault for fault in self.faults if fault.found != "nowhere"), self.faults[0])
        same = [fault for fault in self.faults if (fault.found, fault.module) == (found.found, found.module)]
        return replace(found, recurred=0 if found.found == "nowhere" else len(same))

    @contextmanager
    def _repeating(self, step: Step) -> Iterator[None]:
        """Listen to the step in this context, which begins in the random state in which it began before."""
        now = random_state(self.runtime.device)
        set_random_state(step.random_state, self.runtime.device)
        try:
            with _Listener(self.model) as self._listener:
                yield
        finally:
            self._listener = None
            set_random_state(now, self.runtime.device)

    def _find_fault(self, step: Step, loss: float, grad_norm: float) -> Fault:
        """Return what the listener heard while the step was repeated, of all ranks."""
        assert self._listener is not None
        named = list(self.model.named_parameters())
        fault = Fault(
            step.number,
            loss,
            step.loss_scale,
            "nowhere",
            rank=self.runtime.world.rank,
            parameters_not_finite=[name for name, p in named if _is_bad(whole(p))],
            gradients_not_finite=[name for name, p in named if p.grad is not None and _is_bad(whole(p.grad))],
            token_ids=[ids for batch in step.micro_batches for ids in batch.token_ids()],
            random_state=[base64.b64encode(state.numpy().tobytes()).decode() for state in step.random_state],
        )
        if self._listener.first is not None:
            fault.found, fault.module, bad, micro_batch = self._listener.first
            if (fault.found, fault.module) == ("backward", LAST_MODULE) and not math.isfinite(loss):
                # All modules were finite, and the loss was not: the head stands between, and the lines of the loop.
                is_head = self._listener.has_bad_logits(micro_batch)
                fault.found, fault.module = ("forward", "lm_head") if is_head else ("loop", "")
                bad = bad.any(-1)
            fault.values_not_finite, fault.values = int(bad.sum()), bad.numel()
            batch = step.micro_batches[micro_batch]
            owners = batch.owners()
            of_places = bad.flatten(2).any(2).cpu() if bad.dim() > 2 else bad.cpu()  # (B, T), of most modules
            places = owners[of_places] if of_places.shape == owners.shape else owners
            at_fault = (places[places >= 0] % max(1, batch.examples)).unique()  # a rival is its text
            examples_before = sum(each.examples for each in step.micro_batches[:micro_batch])
            fault.examples_at_fault = [examples_before + int(place) for place in at_fault]
        elif fault.gradients_not_finite:
            fault.found, fault.module = "weight gradient", fault.gradients_not_finite[0]
        elif not (math.isfinite(loss) and math.isfinite(grad_norm)):
            fault.found = "loop"
        return _of_all_ranks(self.runtime.world.gather(fault))


def _of_all_ranks(faults: list[Fault]) -> Fault:
    """Return what the ranks found, as one: the earliest in the course of a step."""
    course = ("forward", "backward", "weight gradient", "loop", "nowhere")
    first = min(faults, key=lambda fault: course.index(fault.found))
    gradients = [name for fault in faults for name in fault.gradients_not_finite]
    examples_at_fault, examples_before = [], 0
    for fault in faults:
        if (fault.found, fault.module) == (first.found, first.module):
            examples_at_fault += [examples_before + place for place in fault.examples_at_fault]
        examples_before += len(fault.token_ids)
    return replace(
        first,
        examples_at_fault=examples_at_fault,
        # After a forward pass that is not finite, all are.
        gradients_not_finite=[] if first.found == "forward" else list(dict.fromkeys(gradients)),
        token_ids=[ids for fault in faults for ids in fault.token_ids],
    )


def describe(fault: Fault, examples: list[int], texts: list[str], details: str) -> list[str]:
    """Return a fault in four lines.

    Args:
        fault: of `trace`.
        examples: the indices of the step's examples in the train split.
        texts: their texts.
        details: the file that holds all of it.
    """
    share = f"{fault.values_not_finite:,} of {fault.values:,} values"
    where = {
        "head": f"began in the head: {share} of its losses are not finite, though all that came before it is",
        "forward": f"began in the forward pass: {share} of the output of {fault.module} are not finite",
        "backward": f"began in the backward pass: {share} of the gradient to {fault.module}'s output are not finite",
        "weight gradient": f"began in the gradient of {fault.module}; those of the activations are finite",
        "loop": "began in train.py itself, behind the model: its logits are finite, what the loop makes of them is not",
        "nowhere": "it did not recur when the step was repeated twice: the device may be faulty",
    }["head" if fault.module == "lm_head" else fault.found]
    if 0 < fault.recurred < REPETITIONS:
        where += "; it did so in one of two repetitions only: the device may be faulty"
    weights = "all weights are finite"
    if fault.parameters_not_finite:
        weights = f"not finite are the weights {_few(fault.parameters_not_finite)}"
    gradients = f"; not finite are the gradients of {_few(fault.gradients_not_finite)}"
    at_fault = fault.examples_at_fault or list(range(len(examples)))
    shown = texts[at_fault[0]] if len(texts[at_fault[0]]) <= 60 else texts[at_fault[0]][:57] + "..."
    what = "gradient is not finite" if math.isfinite(fault.loss) else f"loss is {fault.loss}"
    return [
        f"step {fault.step}: the {what}, at a loss scale of {fault.loss_scale:g}; nothing of this step was applied",
        f"  {where}",
        f"  {weights}{gradients if fault.gradients_not_finite else ''}",
        f"  {len(at_fault)} of {len(examples)} examples are at fault, the first is row {examples[at_fault[0]]} of"
        f" train, {shown!r}; all in {details}",
    ]


def refusal(fault: Fault, in_a_row: int, kept: str, output_dir: Path) -> UserError:
    """Return the error that ends a run after a fault.

    Args:
        fault: the last one.
        in_a_row: how many steps, it included, were not finite one after another.
        kept: what there is of the run from before it.
        output_dir: of the run.
    """
    what = f"the loss or gradient of step {fault.step} is not finite"
    if in_a_row > 1:
        what += f", as in the {in_a_row - 1} steps before"
    cure = "lower --learning_rate, raise --warmup_steps, or leave such steps out by --on_nonfinite skip"
    if fault.parameters_not_finite:
        cure = f"the weights {fault.parameters_not_finite[0]} are not finite, start from sound ones"
    return UserError(f"{what}; it was not applied, {kept}; {cure} (see {output_dir / fault_file(fault.step)})")


class _Listener:
    """Hears every module of a model, and notes the first output or gradient that is not finite."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model
        # The pass, the module, where its values are not finite, and the number of the micro-batch, from 0.
        self.first: tuple[str, str, Tensor, int] | None = None
        self.micro_batch = -1
        self.hidden: list[Tensor] = []  # that the head is given, of each micro-batch: (B, T, C)

    def __enter__(self) -> "_Listener":
        modules = [(name, module) for name, module in self.model.named_modules() if name]
        self.hooks = [module.register_forward_hook(self._output_hook(name)) for name, module in modules]
        self.hooks.append(self.model.transformer.register_forward_pre_hook(self._count_micro_batch))
        return self

    def _count_micro_batch(self, module: nn.Module, inputs: Any) -> None:
        self.micro_batch += 1

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    @torch.no_grad()
    def has_bad_logits(self, micro_batch: int) -> bool:
        """Say whether the head makes numbers that are not finite of what it was given."""
        rows = self.hidden[micro_batch].flatten(0, -2).split(ROWS_AT_ONCE)  # (n, C) each
        return any(_is_bad(rows_of_some.float() @ self.model.lm_head.weight.T.float()) for rows_of_some in rows)

    def note(self, direction: str, name: str, values: Tensor) -> None:
        if self.first is None:
            self.first = direction, name, ~values.detach().isfinite(), self.micro_batch

    def _output_hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if not isinstance(values, Tensor):
                return
            if name == LAST_MODULE:
                self.hidden.append(values.detach())
            if _is_bad(values):
                self.note("forward", name, values)
            elif values.requires_grad:
                values.register_hook(look_at_gradient)

        def look_at_gradient(gradient: Tensor) -> None:
            if _is_bad(gradient):
                self.note("backward", name, gradient)

        return look


def _is_bad(values: Tensor) -> bool:
    return not bool(values.detach().isfinite().all())


def _few(names: list[str]) -> str:
    more = len(names) - 2
    return ", ".join(names[:2]) + (f" and {more} more" if more > 0 else "")
