"""Differences between models on the same texts, and how sure they are.

Both models meet the same texts, so that what makes a text hard for both falls out of the difference: texts are drawn
anew in pairs (paired bootstrap: Efron, 1979; Koehn, 2004). Of several seeds a side the interval also holds what other
seeds would change: as much as the models of a side differ beyond what these texts explain. Of one model it does not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from emoft.evaluate.intervals import LEVELS, SEED, Interval

RESAMPLES = 2_000
AT_ONCE = 1 << 23  # weights of texts in memory
POWER = 2.80  # standard errors: a true difference so large is found in 80 % of samples, at 95 % (Cohen, 1988)

Array = np.ndarray
# From how often each text is drawn, (R, N), the figure of each model of a side, (R, S).
Statistic = Callable[[Array], Array]


@dataclass(frozen=True)
class Difference:
    """A figure of both sides and the difference B - A, with its 95 % interval."""

    a: float
    b: float
    difference: float
    interval: Interval
    least: float  # the smallest difference that so many texts would show in 80 % of cases

    @property
    def is_sure(self) -> bool:
        """Whether the interval leaves out 0."""
        return not self.interval[0] <= 0 <= self.interval[1]


def ratio(above: Array, below: Array) -> Statistic:
    """Return the statistic "sum of one figure by the sum of another", such as nats by tokens.

    Args:
        above: (S, N), of each model and text.
        below: (N,).
    """
    return lambda drawn: drawn @ above.T / np.maximum(drawn @ below, 1e-12)[:, None]


def accuracy(right: Array) -> Statistic:
    """Return the statistic "share of texts told rightly", of (S, N) bool."""
    return ratio(right.astype(float), np.ones(right.shape[1]))


def macro_f1(true: Array, predicted: Array, labels: int) -> Statistic:
    """Return the statistic "mean over labels of F1", of (N,) true and (S, N) predicted numbers below `labels`."""
    cells = np.eye(labels**2)[true * labels + predicted]  # (S, N, L * L)

    def of_draws(drawn: Array) -> Array:
        confusion = np.stack([drawn @ each for each in cells], axis=1).reshape(len(drawn), -1, labels, labels)
        right = confusion.diagonal(axis1=2, axis2=3)
        total = confusion.sum(2) + confusion.sum(3)
        f1 = np.divide(2 * right, total, out=np.full(total.shape, math.nan), where=total > 0)
        return np.asarray(np.nanmean(f1, axis=2))

    return of_draws


def compare(a: Statistic, b: Statistic, texts: int) -> Difference:
    """Return the difference of a figure between two sides over the same texts.

    Args:
        a: the figure of side A.
        b: of side B.
        texts: how many there are.
    """
    sides = [statistic(np.ones((1, texts)))[0] for statistic in (a, b)]  # (S,) each
    random = np.random.default_rng(SEED)
    found: tuple[list[Array], list[Array]] = [], []
    at_once = max(1, AT_ONCE // texts)
    for start in range(0, RESAMPLES, at_once):
        size = min(at_once, RESAMPLES - start)
        drawn = random.multinomial(texts, np.full(texts, 1 / texts), size=size).astype(float)
        for side, statistic in zip(found, (a, b), strict=True):
            side.append(statistic(drawn))
    of_a, of_b = (np.concatenate(parts) for parts in found)  # (R, S) each
    variance = sum(_variance_of_seeds(side, resampled) for side, resampled in zip(sides, (of_a, of_b), strict=True))
    # So few models know their own variance badly: Student's t distribution has the heavier tails, by the degrees of
    # freedom of the smaller side (Hsu, 1938).
    freedom = max(1, min(len(side) for side in sides) - 1)
    of_seeds = random.standard_t(freedom, RESAMPLES) * math.sqrt(variance) if variance else np.zeros(RESAMPLES)
    differences = of_b.mean(1) - of_a.mean(1) + of_seeds
    low, high = np.percentile(differences, LEVELS)
    mean_a, mean_b = (float(side.mean()) for side in sides)
    least = POWER * math.sqrt(float((of_b.mean(1) - of_a.mean(1)).var()) + variance)
    return Difference(mean_a, mean_b, mean_b - mean_a, (float(low), float(high)), least)


def _variance_of_seeds(figures: Array, resampled: Array) -> float:
    """Return the variance of the mean of a side that another choice of seeds would bring, beyond that of the texts.

    Args:
        figures: (S,) of each model.
        resampled: (R, S) likewise, over texts drawn anew.
    """
    count = len(figures)
    if count == 1:
        return 0.0
    apart = resampled - resampled.mean(1, keepdims=True)
    by_texts = apart.var(0).mean() * count / (count - 1)
    return max(0.0, float(figures.var(ddof=1) - by_texts)) / count


def mcnemar(only_a: int, only_b: int) -> float:
    """Return the chance of so unequal numbers if both models were as often right (McNemar, 1947; exact, two-sided).

    Args:
        only_a: texts that A alone tells rightly.
        only_b: texts that B alone does.
    """
    total, fewer = only_a + only_b, min(only_a, only_b)
    logs = [math.lgamma(total + 1) - math.lgamma(k + 1) - math.lgamma(total - k + 1) for k in range(fewer + 1)]
    tail = sum(math.exp(log - total * math.log(2)) for log in logs)
    return min(1.0, 2 * tail)
