"""Infinite or NaN losses and gradients: kept from the weights, and traced to where they began."""

import base64
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW
from transformers import GPT2LMHeadModel

from emoft.data.batching import Batch
from emoft.distributed.parallel import whole
from emoft.distributed.world import World
from emoft.errors import UserError
from emoft.files import fault_file
from emoft.training.contrast import label_contrast
from emoft.training.loss import cross_entropy
from emoft.training.precision import Precision
from emoft.training.randomness import random_state, set_random_state

MOST_IN_A_ROW = 10  # steps that --on_nonfinite skip drops before it stops


@dataclass(frozen=True)
class Step:
    """What repeats a step: its micro-batches, and the random state in which it began."""

    number: int
    batches: list[Batch]  # of this rank
    targets: int  # tokens that all ranks' micro-batches predict
    random_state: list[Tensor]


class NonFiniteGuard:
    """Keeps a step whose loss or gradient is not finite from changing anything, and remembers it.

    On a GPU nobody waits at every step for the answer: once there was such a step, the optimizer itself changes
    nothing any more, until `look` reads which step it was. Where each step is looked at anyway (on the CPU, in fp16,
    whose scaler waits, and if such steps are to be skipped), `looks_always` says so.
    """

    def __init__(self, optimizer: AdamW, precision: Precision, on_nonfinite: str) -> None:
        self.optimizer, self.precision = optimizer, precision
        is_cpu, is_fp16 = precision.device.type == "cpu", precision.scaler.is_enabled()
        self.looks_always = is_cpu or is_fp16 or on_nonfinite == "skip"
        self._first = torch.zeros((), dtype=torch.int64, device=precision.device)  # such step since the last look
        self._recent: list[Step] = []

    def begin_step(self, number: int, batches: list[Batch], targets: int) -> None:
        """Remember what repeats the step that begins; see `Step`."""
        self._recent.append(Step(number, batches, targets, random_state(self.precision.device)))

    def refuse(self, loss: Tensor, grad_norm: Tensor) -> None:
        """Make the next `optimizer.step()` change nothing if the loss or the gradient is infinite or NaN.

        In fp16 an infinite gradient is no fault, since the scaler drops the step and lowers its scale; but no scale
        mends an infinite loss, or a gradient that is infinite at a scale below 1.
        """
        is_fault = ~(loss.isfinite() & grad_norm.isfinite())
        scaler = self.precision.scaler
        if scaler.is_enabled() and scaler.get_scale() >= 1:
            is_fault = ~loss.isfinite()
        number = self._recent[-1].number
        self._first = torch.where((self._first == 0) & is_fault, number, self._first)
        if not scaler.is_enabled():
            # Read by the fused kernel, on the device.
            self.optimizer.found_inf = (self._first > 0).float()  # type: ignore[attr-defined]

    def look(self) -> Step | None:
        """Return the first step at fault since the last look. Reads from the device: a CPU-GPU sync point."""
        number = int(self._first)
        fault = next((step for step in self._recent if step.number == number), None)
        self._first.zero_()
        self._recent.clear()
        return fault


@dataclass
class Fault:
    """Where a step stopped being finite. Lists of names are in the order of the model."""

    step: int
    loss: float  # in nats
    loss_scale: float
    found: str  # "forward", "backward", "weight gradient", or "nowhere" if it did not recur
    module: str = ""  # the first whose output, or whose output's gradient, was not finite; or the parameter
    values_not_finite: int = 0  # of that output or gradient
    values: int = 0
    parameters_not_finite: list[str] = field(default_factory=list)
    gradients_not_finite: list[str] = field(default_factory=list)
    examples_at_fault: list[int] = field(default_factory=list)  # places in the step, from 0
    token_ids: list[list[int]] = field(default_factory=list)  # of each example of the step
    rank: int = 0  # of several, the first one where it was found
    random_state: list[str] = field(default_factory=list)  # its generators at the start of the step, base64


def trace(step: Step, model: GPT2LMHeadModel, precision: Precision, world: World) -> Fault:
    """Repeat a step, which has changed nothing, and note the first module that was not finite.

    Each rank repeats its own part; the result is the same on all. The gradients are gone afterwards; weights and random
    generators are as before.

    Args:
        step: the step, of `NonFiniteGuard.look`.
        model: in training mode.
        precision: of the run.
        world: all ranks.
    """
    fault = Fault(
        step.number,
        0.0,
        precision.scaler.get_scale(),
        "nowhere",
        rank=world.rank,
        parameters_not_finite=[name for name, p in model.named_parameters() if _is_bad(whole(p))],
        token_ids=[ids for batch in step.batches for ids in batch.token_ids()],
        random_state=[base64.b64encode(state.numpy().tobytes()).decode() for state in step.random_state],
    )
    model.zero_grad(set_to_none=True)
    examples_before = 0
    with _random_state_of(step, precision.device):
        for cpu_batch in step.batches:
            batch = cpu_batch.to(precision.device)
            with _Listener(model) as listener:
                with precision.autocast():
                    hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
                    losses = cross_entropy(hidden, model.lm_head.weight, batch.predicting, batch.targets)
                loss = label_contrast(losses, batch)[0] / max(1, step.targets)
                fault.loss += loss.item()
                if _is_bad(loss):
                    listener.note("forward", "lm_head", loss)
                precision.scaler.scale(loss * world.size).backward()
            if listener.first is not None and fault.found == "nowhere":
                fault.found, fault.module, bad = listener.first
                fault.values_not_finite, fault.values = int(bad.sum()), bad.numel()
                owners = cpu_batch.owners()
                places = owners[bad.flatten(2).any(2).cpu()] if bad.shape[:2] == owners.shape else owners
                at_fault = (places[places >= 0] % max(1, batch.examples)).unique()  # a rival is its text
                fault.examples_at_fault = [examples_before + int(place) for place in at_fault]
            examples_before += batch.examples
    gradients = [(name, p.grad) for name, p in model.named_parameters() if p.grad is not None]
    fault.gradients_not_finite = [name for name, gradient in gradients if _is_bad(whole(gradient))]
    if fault.found == "nowhere" and fault.gradients_not_finite:
        fault.found, fault.module = "weight gradient", fault.gradients_not_finite[0]
    model.zero_grad(set_to_none=True)
    return _of_all_ranks(world.gather(fault))


def _of_all_ranks(faults: list[Fault]) -> Fault:
    """Return what the ranks found, as one: the earliest in the course of a step."""
    course = ("forward", "backward", "weight gradient", "nowhere")
    first = min(faults, key=lambda fault: course.index(fault.found))
    gradients = [name for fault in faults for name in fault.gradients_not_finite]
    examples_at_fault, examples_before = [], 0
    for fault in faults:
        if (fault.found, fault.module) == (first.found, first.module):
            examples_at_fault += [examples_before + place for place in fault.examples_at_fault]
        examples_before += len(fault.token_ids)
    return replace(
        first,
        loss=sum(fault.loss for fault in faults),
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
        "forward": f"began in the forward pass: {share} of the output of {fault.module} are not finite",
        "backward": f"began in the backward pass: {share} of the gradient to {fault.module}'s output are not finite",
        "weight gradient": f"began in the gradient of {fault.module}; those of the activations are finite",
        "nowhere": "it did not recur when the step was repeated: the device may be faulty",
    }[fault.found]
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


def refusal(fault: Fault, in_a_row: int, saved_in: Path | None, output_dir: Path) -> UserError:
    """Return the error that ends a run after a fault.

    Args:
        fault: the last one.
        in_a_row: how many steps, it included, were not finite one after another.
        saved_in: the checkpoint of the state before it, if one was saved.
        output_dir: of the run.
    """
    what = f"the loss or gradient of step {fault.step} is not finite"
    if in_a_row > 1:
        what += f", as in the {in_a_row - 1} steps before"
    cure = "lower --learning_rate, raise --warmup_steps, or leave such steps out by --on_nonfinite skip"
    if fault.parameters_not_finite:
        cure = f"the weights {fault.parameters_not_finite[0]} are not finite, start from sound ones"
    kept = f"saved {saved_in}" if saved_in else f"checkpoints in {output_dir} are sound"
    return UserError(f"{what}; it was not applied, {kept}; {cure} (see {output_dir / fault_file(fault.step)})")


@contextmanager
def _random_state_of(step: Step, device: torch.device) -> Iterator[None]:
    now = random_state(device)
    set_random_state(step.random_state, device)
    try:
        yield
    finally:
        set_random_state(now, device)


class _Listener:
    """Hears every module of a model, and notes the first output or gradient that is not finite."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        self.model = model
        self.first: tuple[str, str, Tensor] | None = None  # the pass, the module, where its values are not finite

    def __enter__(self) -> "_Listener":
        modules = [(name, module) for name, module in self.model.named_modules() if name]
        self.hooks = [module.register_forward_hook(self._output_hook(name)) for name, module in modules]
        return self

    def __exit__(self, *error: object) -> None:
        for hook in self.hooks:
            hook.remove()

    def note(self, direction: str, name: str, values: Tensor) -> None:
        if self.first is None:
            self.first = direction, name, ~values.detach().isfinite()

    def _output_hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            values = output[0] if isinstance(output, tuple) else output
            if not isinstance(values, Tensor):
                return
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
