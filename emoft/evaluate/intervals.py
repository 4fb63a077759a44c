"""How sure a figure is: its 95 % interval by bootstrap over examples (Efron, 1979)."""

from collections.abc import Callable
from typing import Any

import numpy as np

RESAMPLES = 1_000
LEVELS = (2.5, 97.5)  # percentiles that hold 95 % between them
SEED = 0  # the same examples give the same interval
DRAWS = 1 << 21  # examples drawn at a time, which bounds the memory

Interval = tuple[float, float]


def intervals(statistics: Callable[[np.ndarray], list[np.ndarray]], examples: int, numbers: int = 1) -> list[Interval]:
    """Return the percentile interval of each of some statistics of the same examples.

    Examples are drawn, not tokens: the tokens of a text are right or wrong together.

    Args:
        statistics: gets (R, N) indices of examples, R resamples of N each, and returns the values (R,) of each
            statistic; a resample of which one is not defined has NaN.
        examples: N.
        numbers: that `statistics` holds for each resample, if more than N; bounds the memory.

    Returns:
        For each statistic (low, high); NaN if a single example tells nothing of how figures vary.
    """
    if examples < 2:
        return [(float("nan"), float("nan")) for _ in statistics(np.zeros((1, examples), dtype=np.int64))]
    random = np.random.default_rng(SEED)
    at_once = max(1, DRAWS // max(examples, numbers))
    parts = []
    for start in range(0, RESAMPLES, at_once):
        size = (min(at_once, RESAMPLES - start), examples)
        parts.append(np.stack(statistics(random.integers(examples, size=size))))
    values = np.concatenate(parts, axis=1)  # (statistics, RESAMPLES)
    return [_interval(each) for each in values]


def renamed(figures: dict[str, Any], suffix: str) -> dict[str, Any]:
    """Return figures under names with a suffix, which stands before the "_interval" of those that are intervals."""
    bases = {name: name.removesuffix("_interval") for name in figures}
    return {f"{base}{suffix}{name.removeprefix(base)}": figures[name] for name, base in bases.items()}


def interval_of_mean(values: np.ndarray) -> Interval:
    """Return the interval of the mean of a figure that each example has, such as whether it was right."""
    return intervals(lambda drawn: [values[drawn].mean(1)], len(values))[0]


def _interval(values: np.ndarray) -> Interval:
    values = values[~np.isnan(values)]
    if not len(values):
        return float("nan"), float("nan")
    # Of infinite values there is no value between two: the nearest ones are taken.
    low, high = np.percentile(values, LEVELS, method="nearest")
    return float(low), float(high)
