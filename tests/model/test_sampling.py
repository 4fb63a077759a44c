from collections import Counter

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from emoft.model.sampling import Sampling, ban_repeats

DRAWS = 40_000


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, 50, 1.0), (0.7, 5, 1.0), (1.5, 0, 1.0), (1.0, 0, 0.6), (0.8, 7, 0.7)]
)
def test_draws_are_those_of_the_library(temperature: float, top_k: int, top_p: float) -> None:
    """Its own rules, in its own order, over all tokens."""
    torch.manual_seed(1)
    scores = torch.randn(1, 20) * 2
    rules = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        rules.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        rules.append(TopPLogitsWarper(top_p))
    expected = rules(torch.zeros(1, 1), scores.clone()).softmax(-1)[0]  # type: ignore[arg-type]
    chosen = Sampling(True, temperature, top_k, top_p).choose(scores.expand(DRAWS, -1))
    found = Counter(chosen.tolist())
    assert set(found) <= {n for n, chance in enumerate(expected.tolist()) if chance > 0}
    for token, chance in enumerate(expected.tolist()):
        assert found[token] / DRAWS == pytest.approx(chance, abs=4 * (0.25 / DRAWS) ** 0.5)


def test_without_draws_the_likeliest_is_taken() -> None:
    scores = torch.tensor([[0.0, 3.0, 1.0], [5.0, -1.0, 2.0]])
    assert Sampling(False, temperature=9.0, top_k=1, top_p=0.1).choose(scores).tolist() == [1, 0]


@pytest.mark.parametrize("top_k", [0, 2])
def test_what_is_not_a_number_ends_nothing(top_k: int) -> None:
    scores = torch.full((3, 8), torch.nan)
    assert all(0 <= token < 8 for token in Sampling(True, top_k=top_k).choose(scores).tolist())
    assert all(0 <= token < 8 for token in Sampling().choose(scores).tolist())


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_no_sequence_occurs_twice(size: int) -> None:
    """The library's own rule, for rows without padding; with padding, what each row gets without it."""
    random = torch.Generator().manual_seed(size)
    library = NoRepeatNGramLogitsProcessor(size)
    for length in range(1, 30):
        ids = torch.randint(4, (5, length), generator=random)
        scores = torch.randn(5, 6, generator=random)
        expected = library(ids, scores.clone())
        assert torch.equal(ban_repeats(ids, torch.zeros(5), size, scores), expected)
        padding = torch.tensor([0, 1, length // 2, length - 1, length // 3])
        rows = [library(row[start:][None], each[None]) for row, start, each in zip(ids, padding, scores, strict=True)]
        assert torch.equal(ban_repeats(ids, padding, size, scores), torch.cat(rows))
