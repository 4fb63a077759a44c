"""What must agree in a step, and how far two numbers may be apart."""

from emoft.step.numbers import Agreement, Cut, Numbers
from emoft.step.texts import Shown

# As a share of the larger number.
SAME_LOSS = 1e-3  # computed in the step's precision in two ways
SAME_STEP = 1e-4  # of float32, whose sums are taken in another order
SAME_GRADIENT = 2e-3  # of float32, against a difference quotient in float64
SAME_UPDATE = 1e-3  # of float32, against the formula in float64
ROUNDING = 2.4e-7  # of a weight in float32, which the update is added to: two units in the last place


def compare(numbers: Numbers, shown: Shown) -> list[Agreement]:
    """Return all that must agree, in the order of the story."""
    weight = numbers.weight
    return [
        _exact("sight", float(shown.seen_wrongly), 0.0),
        _exact("targets", shown.aligned_share, 1.0),
        Agreement("losses", shown.largest_difference, 0.0, shown.largest_difference, SAME_LOSS),
        _share("mean", numbers.loss_sum / numbers.tokens, numbers.loss, SAME_LOSS),
        _share("gradient", weight.finite_difference, weight.gradient_float32, SAME_GRADIENT),
        *(_cut(cut, numbers.cuts[0]) for cut in numbers.cuts[1:]),
        Agreement(
            "update",
            weight.update,
            weight.optimizer_update,
            abs(weight.update - weight.optimizer_update),
            SAME_UPDATE * abs(weight.update) + ROUNDING * abs(weight.before),
        ),
    ]


def _exact(name: str, one: float, other: float) -> Agreement:
    return Agreement(name, one, other, abs(one - other), 0.0)


def _cut(cut: Cut, first: Cut) -> Agreement:
    """Compare a way to cut the step to the first one, by its loss and by all gradients."""
    difference = max(cut.difference, abs(cut.loss - first.loss) / (first.loss or 1.0))
    return Agreement(f"cut_{cut.micro_batches}x{cut.size}", cut.loss, first.loss, difference, SAME_STEP)


def _share(name: str, one: float, other: float, tolerance: float) -> Agreement:
    return Agreement(name, one, other, abs(one - other) / (max(abs(one), abs(other)) or 1.0), tolerance)
