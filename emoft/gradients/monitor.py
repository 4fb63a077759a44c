"""What is measured of weights, gradients, updates and activations, block by block, at one step in many.

`python -m emoft.gradients RUN_DIR` reads the figures of a run and says what they mean: see `emoft.gradients.diagnosis`.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel

from emoft.config import TrainConfig
from emoft.data.steps import Step
from emoft.device import sums_type
from emoft.distributed.parallel import whole
from emoft.distributed.world import World
from emoft.gradients.listener import Listener, gradient_noise
from emoft.gradients.names import NO_UPDATE
from emoft.model.kernels import uncompiled

IN_BLOCK = re.compile(r"transformer\.h\.(\d+)\.(ln|[a-z]+\.[a-z_]+)")
BINS = 64  # of a histogram
SAMPLED = 4096  # weights of a block, by which its distance from the start is estimated
MATRICES = re.compile(r"\.c_(attn|proj|fc)\.weight$")
COUNTED_AT_ONCE = 1 << 18  # values of a histogram on a CPU: what stays in its cache; elsewhere 64 times as many


@dataclass(frozen=True)
class Histogram:
    """How the finite ones of many values are distributed, in bins of equal width."""

    low: float
    high: float
    counts: list[int]
    total: float  # sum of the values
    squares: float  # sum of their squares
    not_finite: int  # values left out

    @staticmethod
    def read(numbers: list[float]) -> "Histogram":
        """Return what the function `histogram` found, once it has been read from the device."""
        low, high, total, squares, *counts, not_finite = numbers
        return Histogram(low, high, [int(count) for count in counts], total, squares, int(not_finite))

    @property
    def limits(self) -> list[float]:
        """The upper end of each bin."""
        width = (self.high - self.low) / len(self.counts)
        return [self.low + width * (number + 1) for number in range(len(self.counts))]


@dataclass
class Figures:
    """The measurements of a step, by TensorBoard tag."""

    step: int
    scalars: dict[str, float] = field(default_factory=dict)
    histograms: dict[str, Histogram] = field(default_factory=dict)
    depth: list[float] = field(default_factory=list)  # gradient norm of each block, the first block first


def group_parameters(model: GPT2LMHeadModel) -> dict[str, list[nn.Parameter]]:
    """Return a model's parameters by what is told apart: "h00.attn.c_attn" and so on, and "wte", "wpe", "ln_f"."""
    groups: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        match = IN_BLOCK.match(name)
        place = f"h{int(match[1]):02}.{match[2]}" if match else name.removeprefix("transformer.").rpartition(".")[0]
        groups.setdefault(place, []).append(parameter)
    return groups


def group_blocks(model: GPT2LMHeadModel) -> dict[str, list[nn.Parameter]]:
    """Return a model's parameters by block: "h00" and so on, and "wte", "wpe", "ln_f"."""
    groups: dict[str, list[nn.Parameter]] = {}
    for place, parameters in group_parameters(model).items():
        groups.setdefault(place.partition(".")[0], []).extend(parameters)
    return groups


class GradientMonitor:
    """Measures a step in three looks: at the first micro-batch, at the complete gradients, and at the update.

    A step that is not measured costs nothing but the question whether it is.
    """

    def __init__(self, model: GPT2LMHeadModel, optimizer: Optimizer, config: TrainConfig, world: World) -> None:
        self.model, self.optimizer, self.every = model, optimizer, config.log_gradients_every
        self.is_compiled, self.world = config.torch_compile, world
        if self.every:
            optimizer.register_step_post_hook(lambda *_: self._after_update())
        self._found: Figures | None = None
        self.layers = group_parameters(model)
        self.groups = self.layers if config.log_gradients_of == "layers" else group_blocks(model)
        self.blocks = [f"h{number:02}" for number in range(len(model.transformer.h))]
        self.is_on = False
        self._listener: Listener | None = None
        self._matrices = [p for name, p in model.named_parameters() if MATRICES.search(name)]
        self.start: dict[str, list[float]] = {}  # some weights of each block as the run began, if that is known

    @torch.no_grad()
    def weights_at_start(self) -> dict[str, dict[int, float]]:
        """Return the norms of the weights as they are, and keep some weights; none if nothing is to be measured.

        Returns:
            By tag, the values by step; those of the layers of a kind stand at the number of their block instead.
        """
        if not self.every:
            return {}
        self.start = {name: self._sample(name).tolist() for name in self.blocks}
        norms = {place: _norm([whole(p) for p in parameters]) for place, parameters in self.layers.items()}
        values = dict(zip(norms, torch.stack(list(norms.values())).tolist(), strict=True))
        curves: dict[str, dict[int, float]] = {}
        for place, value in values.items():
            block, _, kind = place.partition(".")
            if kind:
                curves.setdefault(f"weights_at_start/{kind}", {})[self.blocks.index(block)] = value
            else:
                curves[f"weight_norm/{place}"] = {0: value}
        for name in self.blocks:
            norm = math.hypot(*(values[place] for place in self.layers if place.partition(".")[0] == name))
            curves[f"weight_norm/{name}"] = {0: norm}
        return {tag: curve for tag, curve in curves.items() if all(map(math.isfinite, curve.values()))}

    def _sample(self, name: str) -> Tensor:
        """Return some weights of a block, always the same, evenly spread; all of a small one."""
        parts = [whole(p).detach().flatten() for p in self._parameters_of(name)]
        each = -(-sum(part.numel() for part in parts) // SAMPLED)
        return torch.cat([part[::each].float() for part in parts])

    @contextlib.contextmanager
    def watching(self, step: Step) -> Iterator[None]:
        """Measure, if it is time to, the step that is computed and applied in this context."""
        self.is_on = self.every > 0 and step.number % self.every == 0
        if not self.is_on:
            yield
            return
        try:
            self._listen(step)
            with uncompiled(self.is_compiled):
                yield
        finally:
            self.is_on = False  # also of a step that was refused
            self._stop_listening()
            self._weights.clear()

    def _listen(self, step: Step) -> None:
        device = self.model.device
        self.figures = Figures(step.number)
        self._weights: dict[nn.Parameter, Tensor] = {}
        # What each gradient of this rank is multiplied by until the gradients are unscaled and averaged over the ranks.
        self._loss_scale = step.loss_scale * self.world.size
        batches = step.micro_batches
        # What is still on the device. All of it is read at once after the update: a GPU is waited for then, not at each
        # of some hundred figures.
        self._read_later: dict[str, Tensor] = {}
        self._histograms: dict[str, Tensor] = {}
        seen = self.world.gather({i for batch in batches for i in batch.inputs["input_ids"].flatten().tolist()})
        self._touched = torch.tensor(sorted(set().union(*seen)), device=device)
        self._listener = Listener(self.model, self.blocks, batches, self._loss_scale)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.stop()

    @torch.no_grad()
    def measure_gradients(self) -> None:
        """Measure the complete gradients, of all micro-batches, unscaled and not yet clipped; keep the weights."""
        if not self.is_on:
            return
        self._stop_listening()
        clip = getattr(self.optimizer, "grad_scale", None)  # what the update will divide the gradients by
        for place, parameters in self.groups.items():
            gradients = _gradients(parameters)
            zeros = sum((g.numel() - g.count_nonzero() for g in gradients), torch.zeros((), device=self.model.device))
            self._read_later |= {
                f"gradient_norm/{place}": _norm(gradients),
                f"weight_norm/{place}": _norm([whole(p) for p in parameters]),
                f"gradient_zeros/{place}": zeros / max(1, sum(g.numel() for g in gradients)),
            }
            if gradients and (ratio := self._signal_to_noise(parameters, clip)) is not None:
                self._read_later[f"signal_to_noise/{place}"] = ratio
        self._read_later["gradient_of_matrices"] = _norm(_gradients(self._matrices))
        embedding = self.model.transformer.wte.weight
        if embedding.grad is not None:
            rows = whole(embedding.grad).norm(dim=1).square()  # (V,)
            touched = rows[self._touched].sum()
            rows[self._touched] = 0
            self._read_later["gradient_norm/wte.touched"] = touched.sqrt()
            self._read_later["gradient_norm/wte.others"] = rows.sum().sqrt()
        for name in [*self.blocks, "wte"]:
            parameters = self._parameters_of(name)
            self._histograms[f"weights/{name}"] = histogram([whole(p) for p in parameters])
            if gradients := _gradients(parameters):
                self._histograms[f"gradients/{name}"] = histogram(gradients)
        self._weights = {p: p.detach().clone() for parameters in self.groups.values() for p in parameters}

    def _parameters_of(self, name: str) -> list[nn.Parameter]:
        """Return the parameters of a group, or of all groups of a block."""
        return [p for place, group in self.groups.items() if place.split(".")[0] == name for p in group]

    def _signal_to_noise(self, parameters: list[nn.Parameter], clip: Tensor | None) -> Tensor | None:
        """Return |m| / |g - m|, with AdamW's running mean m of the gradients before this one; None without a mean."""
        signal, noise = [], []
        for parameter in parameters:
            state = self.optimizer.state.get(parameter)
            if parameter.grad is None or not state:
                return None
            beta = self.optimizer.param_groups[0]["betas"][0]
            # Unbiased: Kingma and Ba, 2015, algorithm 1. It is one of clipped gradients.
            mean = whole(state["exp_avg"]) / (1 - beta ** state["step"])
            gradient = whole(parameter.grad) if clip is None else whole(parameter.grad) / clip
            signal.append(mean.norm())
            noise.append((gradient - mean).norm())
        return _norm(signal) / _norm(noise)

    def take_figures(self) -> Figures | None:
        """Return the figures of the step that was measured since they were taken last, if there was one."""
        found, self._found = self._found, None
        return found

    @torch.no_grad()
    def _after_update(self) -> None:
        """Measure what the update changed, and read all numbers from the device: a few CPU-GPU sync points."""
        if not self.is_on:
            return
        for place, parameters in self.groups.items():
            changes = [whole(self._weights[p].sub_(p.detach())) for p in parameters]
            self._read_later[f"update_norm/{place}"] = _norm(changes)
        self._weights.clear()
        for name, start in self.start.items():
            began = torch.tensor(start, device=self.model.device)
            # Weights that all began as 0 have no distance in their own norm: it is infinite, and left out.
            self._read_later[f"distance/{name}"] = (self._sample(name) - began).norm() / began.norm()
        values = dict(zip(self._read_later, torch.stack(list(self._read_later.values())).tolist(), strict=True))
        values |= self._heard(values.pop("gradient_of_matrices"))
        for name in self.blocks:
            for kind in ("gradient_norm", "weight_norm", "update_norm"):
                values[f"{kind}/{name}"] = math.hypot(*(values[f"{kind}/{p}"] for p in self.groups if name == p[:3]))
        for place in dict.fromkeys([*self.groups, *self.blocks]):
            change = values.pop(f"update_norm/{place}") / (values[f"weight_norm/{place}"] or math.inf)
            values[f"update_ratio/{place}"] = max(NO_UPDATE, math.log10(change)) if change > 0 else NO_UPDATE
        figures = self.figures
        figures.depth = [values[f"gradient_norm/{name}"] for name in self.blocks]
        found = torch.stack(list(self._histograms.values())).tolist()
        figures.histograms = {tag: Histogram.read(each) for tag, each in zip(self._histograms, found, strict=True)}
        figures.scalars = {tag: value for tag, value in values.items() if math.isfinite(value)}
        gradients = [shape for tag, shape in figures.histograms.items() if tag.startswith("gradients/")]
        figures.scalars["gradient_not_finite/entries"] = float(sum(shape.not_finite for shape in gradients))
        self._found = figures

    def _heard(self, gradient_of_matrices: float) -> dict[str, float]:
        """Return what the listener heard, of all ranks."""
        heard, values = self._listener, {}
        assert heard is not None
        sums = self.world.sum(torch.stack(list(heard.sums.values())))
        totals = dict(zip(heard.sums, sums.tolist(), strict=True))
        for tag, (total, count) in totals.items():
            kind, _, name = tag.partition("/")
            if kind == "activation_norm":
                values[tag] = math.sqrt(total / max(1, count))
            elif kind == "activation_gradient":
                values[tag] = math.sqrt(total)
            elif kind == "fourth_powers":
                squares = totals[f"activation_norm/{name}"][0]
                values[f"kurtosis/{name}"] = count * total / squares**2 if squares else math.nan
            elif count:
                values[tag] = total / count
        if heard.largest:
            largest = self.world.gather(torch.stack(list(heard.largest.values())).tolist())
            values |= {tag: max(each) for tag, each in zip(heard.largest, zip(*largest, strict=True), strict=True)}
        squares = torch.cat(heard.squares).tolist() if heard.squares else []
        squares_of_texts = [square for of_rank in self.world.gather(squares) for square in of_rank]
        if len(squares_of_texts) > 1:
            trace, common = gradient_noise(squares_of_texts, gradient_of_matrices**2)
            values |= {"gradient_noise/scatter": trace, "gradient_noise/common": common}
        self._listener = None
        return values


def _gradients(parameters: Sequence[nn.Parameter]) -> list[Tensor]:
    return [whole(p.grad) for p in parameters if p.grad is not None]


def _norm(tensors: Sequence[Tensor]) -> Tensor:
    """Return the L2 norm over all entries of several tensors; 0 of none."""
    return nn.utils.get_total_norm(list(tensors))


def histogram(tensors: Sequence[Tensor]) -> Tensor:
    """Compute the histogram of all entries of several tensors, without waiting for their device.

    Returns:
        (BINS + 5,) on the device, which `Histogram.read` reads: the ends, sum and sum of squares of the finite entries,
        how many are in each bin, and how many are not finite.
    """
    parts = [tensor.detach().flatten() for tensor in tensors]
    device, kind = parts[0].device, sums_type(parts[0].device)
    low, high = _ends(parts)
    # On a CPU it costs nothing to know whether all are finite, and more than the counting to leave some out.
    leaves_out = device.type != "cpu" or not bool(low.isfinite() & high.isfinite())
    if leaves_out:
        low = _ends([torch.where(part.isfinite(), part, math.inf) for part in parts])[0]
        high = _ends([torch.where(part.isfinite(), part, -math.inf) for part in parts])[1]
    is_none = low > high
    low, high = torch.where(is_none, 0.0, low).to(kind), torch.where(is_none, 0.0, high).to(kind)
    is_point = low == high  # bins need a width
    low, high = torch.where(is_point, low - 0.5, low), torch.where(is_point, high + 0.5, high)
    scale = BINS / (high - low)
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=device)  # the last one: of those that are not finite
    sums = torch.zeros(2, dtype=kind, device=device)
    for part in parts:
        for values in part.split(COUNTED_AT_ONCE if device.type == "cpu" else COUNTED_AT_ONCE * 64):
            bins = ((values - low) * scale).clamp_(0, BINS - 1)
            if leaves_out:
                is_finite = values.isfinite()
                values, bins = torch.where(is_finite, values, 0), torch.where(is_finite, bins, BINS)
            counts += _count(bins.to(torch.uint8))
            sums += torch.stack([values.sum(dtype=kind), values.norm().to(kind).square()])
    return torch.cat([torch.stack([low, high]), sums, counts.to(kind)])


def _count(bins: Tensor) -> Tensor:
    """Return how often each number from 0 to BINS occurs: (BINS + 1,) int64."""
    if bins.device.type == "cpu":
        return torch.bincount(bins, minlength=BINS + 1)  # twice as fast as torch.histc
    # Elsewhere bincount waits for the device, to know its largest number.
    counts = torch.zeros(BINS + 1, dtype=torch.int64, device=bins.device)
    return counts.index_add_(0, bins.int(), torch.ones_like(bins, dtype=torch.int64))


def _ends(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Return the smallest and the largest entry, each ()."""
    lows, highs = zip(*(torch.aminmax(part) for part in parts if part.numel()), strict=True)
    return torch.stack(lows).amin(), torch.stack(highs).amax()
