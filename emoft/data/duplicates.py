"""Texts that a split holds twice, or that the train split shares with the texts it is evaluated on.

Two texts are exact duplicates if their words are the same (`emoft.data.words`), and near duplicates if the Jaccard
similarity of their sets of three consecutive words is at least 0.6 (Broder, 1997): a text of 14 words or more of which
one was exchanged, or one that goes on for up to two thirds of its length again. All such pairs are found, none is
estimated: of two sets that are so similar, the rarest few members of the one and of the other overlap, and only texts
that share one of those are compared (prefix filter; Bayardo, Ma and Srikant, 2007).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain

import numpy as np
from datasets import Dataset

from emoft.data.words import runs, words
from emoft.errors import UserError
from emoft.terminal import Bar

SHINGLE = 3  # consecutive words
SIMILARITY = Fraction(3, 5)  # a fraction, so that no rounding decides
IN_TRAIN = "in_train"  # the column that says of a text of another split whether the train split holds it too


@dataclass(frozen=True)
class Matches:
    """Of each text, whether an earlier one is the same or nearly so; (N,) bool each, and no text is both."""

    exact: np.ndarray
    near: np.ndarray

    @property
    def any(self) -> np.ndarray:
        """(N,) bool, either of the two."""
        return self.exact | self.near


def distinct_share(rows: Dataset) -> float:
    """Return the share of tokenized examples that are not the same, token by token, as one before them."""
    parts = (part["input_ids"].to_pylist() for part in rows.with_format("arrow").iter(1000))
    return len({tuple(ids) for part in parts for ids in part}) / max(1, len(rows))


def find_matches(train: Sequence[str], others: Sequence[Sequence[str]] = ()) -> tuple[Matches, list[Matches]]:
    """Return which texts occur before.

    Args:
        train: each is compared with those before it.
        others: splits; each of their texts is compared with all of `train`.

    Returns:
        The matches of `train`, and those of each of `others`.
    """
    splits = [train, *others]
    with Bar("Looking for duplicates", total=4 * sum(map(len, splits))) as bar:  # it goes over the texts four times
        return _find_matches(splits, bar)


def _find_matches(splits: Sequence[Sequence[str]], bar: Bar) -> tuple[Matches, list[Matches]]:
    train = splits[0]
    spoken = [words(text) for text in bar.over(chain(*splits))]
    counts = Counter(shingle for text in bar.over(spoken) for shingle in set(_shingles(text)))
    # Rarest first, and the same order for all.
    sets = [sorted(set(_shingles(text)), key=lambda shingle: (counts[shingle], shingle)) for text in bar.over(spoken)]
    exact, near = np.zeros(len(spoken), dtype=bool), np.zeros(len(spoken), dtype=bool)
    seen: set[str] = set()
    index: dict[str, list[int]] = {}  # texts of train by each of their rarest shingles
    for number, (text, shingles) in enumerate(bar.over(zip(spoken, sets, strict=True))):
        joined = " ".join(text)
        # Two sets that are similar enough share so many members that these of each cannot all be missing in the other.
        rarest = shingles[: len(shingles) - -(-len(shingles) * SIMILARITY // 1) + 1]
        if joined in seen:
            exact[number] = True
        else:
            candidates = (other for shingle in rarest for other in index.get(shingle, ()))
            near[number] = any(_similar(shingles, sets[other]) for other in candidates)
        if number < len(train) and not exact[number]:
            seen.add(joined)
            for shingle in rarest:
                index.setdefault(shingle, []).append(number)
    ends = np.cumsum([len(split) for split in splits])[:-1]
    matches = [Matches(*parts) for parts in zip(np.split(exact, ends), np.split(near, ends), strict=True)]
    return matches[0], matches[1:]


def _shingles(text: list[str]) -> list[str]:
    return runs(text, SHINGLE) or [" ".join(text)]


def _similar(first: list[str], second: list[str]) -> bool:
    smaller, larger = sorted((len(first), len(second)))
    if smaller < SIMILARITY * larger:
        return False
    shared = len(set(first).intersection(second))
    return shared >= SIMILARITY * (len(first) + len(second) - shared)


def mark_duplicates(splits: dict[str, Dataset], drop: bool = False, advice: str = "") -> tuple[dict[str, Dataset], str]:
    """Find duplicates, and mark the texts of other splits that the train split holds too.

    Args:
        splits: "train" and others, with the column "text".
        drop: leave out of train the later copies, and the texts that another split holds too.
        advice: what to do about them, if they are not dropped.

    Returns:
        The splits, those other than "train" with the column `IN_TRAIN`, which is False throughout after dropping; and
        what was found in one line, empty if there was nothing.

    Raises:
        UserError: nothing is left of train.
    """
    others = [name for name in splits if name != "train"]
    train = list(splits["train"]["text"])
    in_train, in_others = find_matches(train, [list(splits[name]["text"]) for name in others])
    told = [f"{in_train.exact.sum():,} exact and {in_train.near.sum():,} near in train"] if in_train.any.any() else []
    for name, matches in zip(others, in_others, strict=True):
        if matches.any.any():
            told.append(f"{matches.exact.sum():,} and {matches.near.sum():,} of {name} in train")
    kept = dict(splits)
    if told and drop:
        dropped = in_train.any.copy()
        for name in others:
            # The other way round: which texts of train does this split hold?
            dropped |= find_matches(list(splits[name]["text"]), [train])[1][0].any
        if dropped.all():
            raise UserError(
                f"--drop_duplicates leaves nothing of the {len(train):,} texts to train on: the evaluation splits hold"
                " all of them, name other files or drop the flag"
            )
        kept["train"] = splits["train"].select(np.flatnonzero(~dropped))
        told.append(f"dropped {dropped.sum():,} of {len(train):,} from train")
    line = f"duplicates: {', '.join(told)}{'' if drop else advice}" if told else ""
    for name, matches in zip(others, in_others, strict=True):
        kept[name] = splits[name].add_column(IN_TRAIN, matches.any & (not drop))
    return kept, line


def overlap(rows: Dataset) -> np.ndarray | None:
    """Return which texts of a split the train split holds too, (N,) bool; None if nobody has looked."""
    return np.array(rows[IN_TRAIN], dtype=bool) if IN_TRAIN in rows.column_names else None
