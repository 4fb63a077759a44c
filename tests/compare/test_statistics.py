"""Differences and their intervals, against other implementations and by simulation."""

import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import f1_score

from emoft.compare import statistics
from emoft.compare.statistics import accuracy, compare, macro_f1, mcnemar, ratio


def coverage(draws: int, texts: int, seed: int, models: int = 1) -> float:
    """The share of simulated comparisons whose interval holds the true difference, which is known here.

    Nats of a text vary with its length and, in both models alike, with how hard it is.
    """
    random = np.random.default_rng(seed)
    true, held = 0.05, 0
    for _ in range(draws):
        tokens = random.integers(3, 60, size=texts)
        hard = random.normal(3.0, 0.5, size=texts)
        luck = random.normal(0, 0.02, size=(2, models, 1)) * (models > 1)  # of a seed
        nats = tokens * (hard + np.array([0.0, true])[:, None, None] + luck + random.normal(0, 0.3, (2, models, texts)))
        a, b = (ratio(each, tokens) for each in nats)
        low, high = compare(a, b, texts).interval
        held += low <= true <= high
    return held / draws


@pytest.mark.parametrize("models", [1, 3])
def test_intervals_hold_the_truth_as_often_as_they_say(monkeypatch: pytest.MonkeyPatch, models: int) -> None:
    """The short form of tests/coverage.py; four standard errors of 200 draws are 0.06."""
    monkeypatch.setattr(statistics, "RESAMPLES", 500)
    assert 0.89 < coverage(200, 200, seed=0, models=models) < 1.0


def test_a_pair_is_surer_than_two_strangers() -> None:
    random = np.random.default_rng(0)
    tokens = np.full(400, 20)
    hard = random.normal(3, 1, 400)
    a, b = ((hard + shift + random.normal(0, 0.05, 400))[None] * tokens for shift in (0.0, 0.03))
    paired = compare(ratio(a, tokens), ratio(b, tokens), 400)
    strangers = compare(ratio(a, tokens), ratio(random.permutation(b, axis=1), tokens), 400)
    assert paired.is_sure and paired.difference == pytest.approx(0.03, abs=0.01)
    assert not strangers.is_sure and strangers.least > 5 * paired.least


def test_seeds_widen_the_interval() -> None:
    random = np.random.default_rng(1)
    tokens = np.full(300, 10)
    base = random.normal(30, 1, 300)
    luck = np.array([-1.0, 0.0, 1.0])[:, None]
    a, b = base + luck, base + luck + 0.1
    alone = compare(ratio(a.mean(0, keepdims=True), tokens), ratio(b.mean(0, keepdims=True), tokens), 300)
    grouped = compare(ratio(a, tokens), ratio(b, tokens), 300)
    assert alone.is_sure and not grouped.is_sure
    assert grouped.difference == pytest.approx(alone.difference)


def test_figures_are_those_of_others() -> None:
    random = np.random.default_rng(2)
    true, told = random.integers(4, size=500), random.integers(4, size=(2, 500))
    f1, right = macro_f1(true, told, 4), accuracy(told == true)
    once = np.ones((1, 500))
    for model in range(2):
        assert f1(once)[0, model] == pytest.approx(f1_score(true, told[model], average="macro"))
        assert right(once)[0, model] == pytest.approx((told[model] == true).mean())
    # A text that is drawn twice counts twice.
    drawn = random.integers(500, size=500)
    twice = np.bincount(drawn, minlength=500)[None].astype(float)
    assert f1(twice)[0, 0] == pytest.approx(f1_score(true[drawn], told[0][drawn], average="macro"))


@pytest.mark.parametrize(("only_a", "only_b"), [(0, 0), (1, 0), (3, 9), (40, 40), (700, 620), (75, 8)])
def test_mcnemar_is_the_binomial_test(only_a: int, only_b: int) -> None:
    expected = binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    assert mcnemar(only_a, only_b) == pytest.approx(expected)
