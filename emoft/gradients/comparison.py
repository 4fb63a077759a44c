"""Where two runs part: by their flags, their data, their first weights, and the first step whose figures differ."""

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from emoft.config import GradientsConfig
from emoft.gradients.names import NO_UPDATE
from emoft.gradients.record import Record, read_record

# Relative difference of two figures, below which another order of the same sums explains it. The event files hold
# float32 (6e-8); bf16 has 8 bits (4e-3).
ROUNDING = {"no": 2e-5, "bf16": 2e-2, "fp16": 5e-3}
OF_THE_RUN = {"output_dir", "overwrite_output_dir", "resume_from_checkpoint"}  # flags that compute nothing
# What is not of the mathematics: how fast it was, and what is told of the end.
NOT_COMPARED = ("speed/", "final/", "data/", "update_ratio/guide", "train/share_of_peak")
# In the order of a step: what comes first explains what comes after.
ORDER = ("activation_norm", "train/loss", "activation_gradient", "gradient_norm", "train/grad_norm", "update_ratio")


@dataclass(frozen=True)
class Difference:
    """Two values of a figure at a step."""

    step: int
    tag: str
    first: float
    second: float

    @property
    def size(self) -> float:
        """Relative to the larger; of update ratios, which are logarithms, of what they stand for."""
        if self.tag.startswith("update_ratio/") and min(self.first, self.second) > NO_UPDATE:
            return 1 - 10 ** -abs(self.first - self.second)
        return abs(self.first - self.second) / max(abs(self.first), abs(self.second), 1e-12)


@dataclass
class Comparison:
    """What tells two runs apart."""

    names: list[str]
    flags: dict[str, list[Any]]  # that differ: the value of each run
    data: dict[str, bool | None]  # by split: the same tokens or not; None where a run does not tell
    compared: int  # figures that both have, at the same steps
    last_common_step: int
    first: list[Difference] = field(default_factory=list)  # at the first step where any differs
    tolerance: float = 0.0  # of rounding
    by_more: list[Difference] = field(default_factory=list)  # at the first step where one differs by more than that

    @property
    def is_rounding(self) -> bool:
        """Whether the first difference is no larger than rounding makes."""
        return all(each.size <= self.tolerance for each in self.first)

    def describe(self) -> list[str]:
        """Return it in words, a line for each."""
        lines = []
        for name, (a, b) in self.flags.items():
            lines.append(f"--{name}: {a!r} and {b!r}")
        if not self.flags:
            lines.append("flags: the same, but for folders")
        for split, same in self.data.items():
            what = {True: "the same", False: "other texts, or tokens", None: "not told by both runs"}[same]
            lines.append(f"data of {split}: {what}")
        if not self.compared:
            return [*lines, "figures: they have no step in common"]
        if not self.first:
            return [*lines, f"figures: all {self.compared:,} are the same, up to step {self.last_common_step}"]
        lines.append(f"figures: the same before step {self.first[0].step}, where {_told(self.first)}")
        if not self.is_rounding:
            lines.append(f"by more than rounding ({self.tolerance:.0e})")
        elif self.by_more:
            step, (a, b) = self.by_more[0].step, (self.by_more[0].first, self.by_more[0].second)
            lines.append(
                f"by rounding at first (below {self.tolerance:.0e}); by more from step {step} on, as rounding grows to"
                f" ({self.by_more[0].tag}: {a:.6g} and {b:.6g})"
            )
        else:
            lines.append(f"by rounding only (below {self.tolerance:.0e})")
        return lines


def _told(differences: list[Difference]) -> str:
    """Name the first block or figure that differs, and by how much; the others are counted."""
    first = differences[0]
    others = f", and {len(differences) - 1} other figures" if len(differences) > 1 else ""
    return f"{first.tag} is {first.first:.7g} and {first.second:.7g} (by {first.size:.1e}){others}"


def compare(first: Record, second: Record, names: list[str]) -> Comparison:
    """Tell two runs apart."""
    known = set(first.flags) & set(second.flags)
    flags = {
        name: [first.flags[name], second.flags[name]]
        for name in first.flags
        if name in known - OF_THE_RUN and first.flags[name] != second.flags[name]
    }
    splits = dict.fromkeys([*first.data, *second.data]) or {"train": None}
    data = {
        split: first.data[split] == second.data[split] if split in first.data and split in second.data else None
        for split in splits
    }
    tags = [tag for tag in first.curves if tag in second.curves and not tag.startswith(NOT_COMPARED)]
    found: list[Difference] = []
    compared = last = 0
    for tag in tags:
        for step, value in first.curves[tag].items():
            other = second.curves[tag].get(step)
            if other is None:
                continue
            compared, last = compared + 1, max(last, step)
            if value != other and not (math.isnan(value) and math.isnan(other)):
                is_layer = tag.startswith("weights_at_start/")  # which has the numbers of blocks in place of steps
                found.append(Difference(*((0, f"{tag}/h{step:02}") if is_layer else (step, tag)), value, other))
    precisions = [str(record.flags.get("mixed_precision", "auto")) for record in (first, second)]
    tolerance = max(ROUNDING.get(precision, ROUNDING["bf16"]) for precision in precisions)
    result = Comparison(names, flags, data, compared, last, tolerance=tolerance)
    if found:
        result.first = _at_first_step(found)
        result.by_more = _at_first_step([each for each in found if each.size > tolerance])
    return result


def _at_first_step(found: list[Difference]) -> list[Difference]:
    """Return the differences at the first step that has any, in the order in which a step computes them."""
    step = min((each.step for each in found), default=0)
    return sorted((each for each in found if each.step == step), key=_order)


def _order(difference: Difference) -> tuple[int, str]:
    kind = next((number for number, name in enumerate(ORDER) if difference.tag.startswith(name)), len(ORDER))
    if difference.step == 0 and difference.tag.startswith(("weight_norm/", "weights_at_start/")):
        kind = -1  # they begin with other weights
    return kind, difference.tag


def compare_runs(config: GradientsConfig) -> Comparison:
    """Read two runs and tell them apart.

    Raises:
        UserError: a folder holds no run.
    """
    names = [config.run_dir, config.other_run]
    first, second = (read_record(Path(name)) for name in names)
    return compare(first, second, names)


def as_json(found: Comparison) -> dict[str, Any]:
    """Return a comparison as an object of JSON."""
    return {
        **asdict(found),
        "first": [{**asdict(each), "size": each.size} for each in found.first],
        "by_more": [{**asdict(each), "size": each.size} for each in found.by_more],
        "is_rounding": found.is_rounding,
    }
