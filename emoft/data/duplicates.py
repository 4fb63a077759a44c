"""Texts that a split holds twice, or that the train split shares with the texts it is evaluated on.

Two texts are exact duplicates if their words are the same (`emoft.data.words`), and near duplicates if the Jaccard
similarity of their sets of three consecutive words is at least 0.6 (`emoft.data.similarity`): a text of 14 words or
more of which one was exchanged, or one that goes on for up to two thirds of its length again. All such pairs are found,
none is estimated.
"""

import hashlib
import tempfile
import unicodedata
import zipfile
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset

from emoft.data.cache import cache_dir, cache_in_use, content_hash, fingerprint
from emoft.data.similarity import sets_of, similar_to_earlier
from emoft.data.words import words
from emoft.errors import UserError
from emoft.private import fingerprint_of
from emoft.terminal import progress

IN_TRAIN = "in_train"  # the column that says of a text of another split whether the train split holds it too
HOW = ("duplicates.py", "similarity.py", "words.py")  # what a result in the cache depends on besides the texts
PART = 1000  # rows that are taken from a split at a time


@dataclass(frozen=True)
class Matches:
    """Of each text, whether an earlier one is the same or nearly so; (N,) bool each, and no text is both."""

    exact: np.ndarray
    near: np.ndarray

    @property
    def any(self) -> np.ndarray:
        """(N,) bool, either of the two."""
        return self.exact | self.near


@dataclass(frozen=True)
class Duplicates:
    """What was found among the texts of train and of other splits."""

    in_train: Matches  # of train
    of_others: list[Matches]  # of each other split, in train
    held: np.ndarray  # (N,) bool, of each text of train, whether another split holds it, exactly or nearly


def find_matches(train: Sequence[str], others: Sequence[Sequence[str]] = ()) -> Duplicates:
    """Return which texts occur before.

    Args:
        train: each is compared with those before it.
        others: splits; each of their texts is compared with all of `train`.
    """
    return _find([train, *others], [len(train), *map(len, others)])


def _find(splits: Sequence[Iterable[str]], sizes: Sequence[int]) -> Duplicates:
    texts = (text for split in splits for text in split)
    numbers, spoken, lengths = _number(progress(texts, "Looking for duplicates", "texts", sum(sizes)))
    train, *others = np.split(numbers, np.cumsum(sizes)[:-1])
    sets = sets_of(spoken, lengths)
    del spoken
    # Of texts with the same words, the first one stands for all; of texts of train it is the lowest number.
    later = len(train)
    first = np.full(len(lengths), later, dtype=np.int64)
    np.minimum.at(first, train, np.arange(len(train)))
    is_of_train = first < later
    exact = first[train] < np.arange(len(train))
    near = similar_to_earlier(sets, first, is_of_train, is_of_train)
    in_train = Matches(exact, near[train] & ~exact)
    held = np.zeros(len(lengths), dtype=bool)
    of_others = []
    for other in others:
        is_of_other = np.zeros(len(lengths), dtype=bool)
        is_of_other[other] = True
        near = similar_to_earlier(sets, first, is_of_other & ~is_of_train, is_of_train)
        of_others.append(Matches(is_of_train[other], near[other]))
        # The other way round: which texts of train does this split hold?
        asked = is_of_train & ~is_of_other & ~held
        held |= is_of_other | similar_to_earlier(sets, np.where(is_of_other, 0, 1), asked, is_of_other)
    return Duplicates(in_train, of_others, held[train])


def _number(texts: Iterable[str]) -> tuple[np.ndarray, "array[int]", np.ndarray]:
    """Number the texts, so that those of the same words have the same number, and the words of each.

    Returns:
        The number of each text, (N,) int64; of each number, one after another, its words, (W,) int32; and how many
        they are, (S,) int64.
    """
    numbers, spoken, lengths = array("q"), array("i"), array("q")
    of_word: dict[str, int] = {}
    of_text: dict[bytes, int] = {}
    for text in texts:
        found = array("i", [of_word.setdefault(word, len(of_word)) for word in words(text)])
        # A million texts are many bytes; 16 of a hash stand for each, which are never the same for two.
        digest = hashlib.blake2b(found, digest_size=16).digest()
        number = of_text.setdefault(digest, len(of_text))
        numbers.append(number)
        if number == len(lengths):
            spoken.extend(found)
            lengths.append(len(found))
    return np.frombuffer(numbers, dtype=np.int64), spoken, np.frombuffer(lengths, dtype=np.int64)


def _find_or_remember(splits: dict[str, Dataset]) -> Duplicates:
    """Look for duplicates among splits, "train" first, or take from the cache what was found before."""
    how = [content_hash(Path(__file__).with_name(name)) for name in HOW]
    parts = [
        *how,
        unicodedata.unidata_version,
        *(part for name in splits for part in (name, fingerprint_of(splits[name]))),
    ]
    path = Path(cache_dir()) / f"emoft-duplicates-{fingerprint(*parts)}.npz"
    try:
        with np.load(path, allow_pickle=False) as saved:
            arrays = [saved[f"arr_{number}"] for number in range(3 + 2 * (len(splits) - 1))]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        found = _find([_texts(rows) for rows in splits.values()], [len(rows) for rows in splits.values()])
        arrays = [found.in_train.exact, found.in_train.near, found.held]
        arrays += [array for matches in found.of_others for array in (matches.exact, matches.near)]
        with cache_in_use(), tempfile.NamedTemporaryFile(dir=path.parent, suffix=".npz", delete=False) as file:
            np.savez_compressed(file, *arrays)
        Path(file.name).replace(path)  # whole or not at all, whoever else writes the same
        return found
    exact, near, held, *of_others = arrays
    pairs = zip(of_others[::2], of_others[1::2], strict=True)
    return Duplicates(Matches(exact, near), [Matches(*pair) for pair in pairs], held)


def _texts(rows: Dataset) -> Iterator[str]:
    for part in rows.select_columns("text").with_format("arrow").iter(PART):
        yield from part["text"].to_pylist()


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
    ordered = {"train": splits["train"], **{name: splits[name] for name in others}}
    found = _find_or_remember(ordered)
    in_train, in_others, size = found.in_train, found.of_others, len(splits["train"])
    told = [f"{in_train.exact.sum():,} exact and {in_train.near.sum():,} near in train"] if in_train.any.any() else []
    for name, matches in zip(others, in_others, strict=True):
        if matches.any.any():
            told.append(f"{matches.exact.sum():,} and {matches.near.sum():,} of {name} in train")
    kept = dict(splits)
    if told and drop:
        dropped = in_train.any | found.held
        if dropped.all():
            raise UserError(
                f"--drop_duplicates leaves nothing of the {size:,} texts to train on: the evaluation splits hold"
                " all of them, name other files or drop the flag"
            )
        kept["train"] = splits["train"].select(np.flatnonzero(~dropped))
        told.append(f"dropped {dropped.sum():,} of {size:,} from train")
    line = f"duplicates: {', '.join(told)}{'' if drop else advice}" if told else ""
    for name, matches in zip(others, in_others, strict=True):
        kept[name] = splits[name].add_column(IN_TRAIN, matches.any & (not drop))
    return kept, line


def overlap(rows: Dataset) -> np.ndarray | None:
    """Return which texts of a split the train split holds too, (N,) bool; None if nobody has looked."""
    return np.array(rows[IN_TRAIN], dtype=bool) if IN_TRAIN in rows.column_names else None
