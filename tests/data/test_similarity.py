import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from million import COPIES, make_file

from emoft.data import similarity
from emoft.data.duplicates import find_matches


def lines_of(folder: Path, count: int) -> list[str]:
    make_file(folder / f"{count}.txt", count)
    return (folder / f"{count}.txt").read_text().splitlines()


def test_many_lines_are_compared_in_little_memory_each(tmp_path: Path) -> None:
    """The short form of `python tests/million.py`, which takes a minute: what is found, and what a line takes."""
    peaks = {}
    for count in (3_000, 9_000):
        lines = lines_of(tmp_path, count)
        tracemalloc.start()
        matches = find_matches(lines).in_train
        peaks[count] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert matches.exact.sum() == len(lines) - len(set(lines))
        assert matches.near.mean() == pytest.approx(COPIES, abs=0.01)
    per_line = (peaks[9_000] - peaks[3_000]) / 6_000
    assert per_line < 2_000, "at a million lines it would not stay in 2 GiB"


def test_the_same_is_found_in_small_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is looked at together is bounded, and no bound alters what is found."""
    lines = [" ".join(line.split()[:16]) for line in lines_of(tmp_path, 1_500)] + ["a b c d e"] * 2 + ["a b c d f"] * 2
    whole = find_matches(lines[:1_000], [lines[1_000:]])
    monkeypatch.setattr(similarity, "AT_ONCE", 16)
    parts = find_matches(lines[:1_000], [lines[1_000:]])
    assert whole.in_train.near.sum() > 3
    assert np.array_equal(whole.in_train.near, parts.in_train.near)
    assert np.array_equal(whole.of_others[0].near, parts.of_others[0].near)
    assert np.array_equal(whole.held, parts.held)
