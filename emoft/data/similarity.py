"""Which of many texts are nearly the same: all pairs that are similar enough, found without comparing all.

Texts are similar if the Jaccard similarity of their sets of `SHINGLE` consecutive words is at least `SIMILARITY`
(Broder, 1997). Of two sets that are so similar, the rarest few members of the one and of the other overlap, and only
texts that share one of those are compared (prefix filter; Bayardo, Ma and Srikant, 2007). Everything here is numbers
in arrays, so that a million texts take some hundred bytes each.
"""

from array import array
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from emoft.terminal import Bar

SHINGLE = 3  # consecutive words
SIMILARITY = Fraction(3, 5)  # a fraction, so that no rounding decides
AT_ONCE = 1 << 20  # members, or pairs, that are looked at together
FIRST = 32  # bits by which the first of two numbers that share an int64 is shifted
Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True)
class Sets:
    """The sets of S texts, of those members that another text has too; rarest members first."""

    sizes: Numbers  # (S,) int64, how many members each set has, those that no other text has among them
    starts: Numbers  # (S + 1,) int64, set s has the members starts[s] to starts[s + 1]
    members: Numbers  # (M,) int32
    prefixes: Numbers  # (S,) int64, how many of the first of these a set that is similar to s cannot all be without


def sets_of(words: "array[int]", lengths: Numbers) -> Sets:
    """Return the sets of texts.

    A text of fewer words than `SHINGLE` has no set: it is similar only to one of the same words.

    Args:
        words: (W,) int32, the number of each word of all texts, one text after another.
        lengths: (S,) int64, words of each text; no two texts have the same words.
    """
    pairs = _shingles(np.frombuffer(words, dtype=np.int32), lengths)
    pairs.sort()
    pairs = pairs[_is_new(pairs)]  # a set has each member once
    counts = np.bincount(pairs & (1 << FIRST) - 1)
    sizes = np.bincount(pairs >> FIRST, minlength=len(lengths))
    # A member that no other text has can be shared with none. It counts, and as the rarest it would stand first.
    pairs = pairs[counts[pairs & (1 << FIRST) - 1] > 1]
    shared = np.flatnonzero(counts > 1)
    ranks = np.zeros(len(counts), dtype=np.int32)
    ranks[shared[np.argsort(counts[shared], kind="stable")]] = np.arange(len(shared))
    pairs = np.sort(pairs >> FIRST << FIRST | ranks[pairs & (1 << FIRST) - 1])
    of_set = np.bincount(pairs >> FIRST, minlength=len(lengths))
    # Two sets that are similar enough share so many members that these of each cannot all be missing in the other.
    prefixes = sizes - -(-sizes * SIMILARITY.numerator // SIMILARITY.denominator) + 1
    prefixes = np.clip(prefixes - (sizes - of_set), 0, of_set)
    return Sets(sizes, np.concatenate([[0], np.cumsum(of_set)]), (pairs & (1 << FIRST) - 1).astype(np.int32), prefixes)


def _shingles(words: Numbers, lengths: Numbers) -> Numbers:
    """Return (R,) int64, for each run of words the number of its text and, in the lower half, one for its words."""
    ends = np.cumsum(lengths)
    begins = np.ones(len(words), dtype=bool)  # where a run of words begins: not in the last words of a text
    for back in range(1, SHINGLE):
        begins[(ends - back)[lengths >= back]] = False
    numbers = words[begins]
    for ahead in range(1, SHINGLE):
        numbers = _renumber(numbers.astype(np.int64) << FIRST | words[ahead:][begins[: len(words) - ahead]])
    texts = np.repeat(np.arange(len(lengths)), np.maximum(lengths - SHINGLE + 1, 0))
    texts <<= FIRST
    texts |= numbers
    return texts


def _renumber(values: Numbers) -> Numbers:
    """Return (R,) int32, the same number for the same value; as of `np.unique`, which takes twice the memory."""
    order = np.argsort(values)
    numbers = np.empty(len(values), dtype=np.int32)
    numbers[order] = np.cumsum(_is_new(values[order]), dtype=np.int32)
    return numbers


def _is_new(values: Numbers) -> Numbers:
    """Return (R,) bool, which of some sorted values are not as the one before."""
    is_new = np.ones(len(values), dtype=bool)
    np.not_equal(values[1:], values[:-1], out=is_new[1:])
    return is_new


def similar_to_earlier(sets: Sets, order: Numbers, asked: Numbers, known: Numbers) -> Numbers:
    """Return which sets are similar to one that stands before them.

    Args:
        sets: S of them.
        order: (S,) int32, what stands before what: a set is compared with those of a lower number.
        asked: (S,) bool, which sets are asked about.
        known: (S,) bool, with which they are compared.

    Returns:
        (S,) bool, False for those that are not asked about.
    """
    found = np.zeros(len(sets.sizes), dtype=bool)
    owners, members = _prefixes(sets, known)
    index = members << FIRST | order[owners]
    sequence = np.argsort(index)
    index, owners = index[sequence], owners[sequence]
    askers, members = _prefixes(sets, asked)
    first = np.searchsorted(index, members << FIRST)
    last = np.searchsorted(index, members << FIRST | order[askers])
    with Bar("Comparing texts", "texts", int(asked.sum())) as bar:
        bar.advance(int(asked.sum()) - len(np.unique(askers[first < last])))  # with nothing to compare them with
        # Who has found a similar one need not go on: at first each looks at one, then at four more, and so on.
        width = 1
        while (is_open := (first < last) & ~found[askers]).any():
            askers, first, last = askers[is_open], first[is_open], last[is_open]
            left = len(np.unique(askers))
            step = max(1, AT_ONCE // width)
            for start in range(0, len(askers), step):
                part = slice(start, start + step)
                counts = np.minimum(last[part] - first[part], width)
                _compare(sets, np.repeat(askers[part], counts), owners[_ranges(first[part], counts)], found)
            first, width = first + width, min(4 * width, AT_ONCE)
            bar.advance(left - len(np.unique(askers[(first < last) & ~found[askers]])))
    return found


def _prefixes(sets: Sets, chosen: Numbers) -> tuple[Numbers, Numbers]:
    """Return the members in the prefixes of chosen sets, (P,) int64, behind the set that each belongs to."""
    numbers = np.flatnonzero(chosen)
    counts = sets.prefixes[numbers]
    members = sets.members[_ranges(sets.starts[numbers], counts)]
    return np.repeat(numbers, counts), members.astype(np.int64)


def _ranges(starts: Numbers, counts: Numbers) -> Numbers:
    """Return the numbers of ranges, one range after another: of starts 5, 9 and counts 2, 1 those are 5, 6, 9."""
    ends = np.cumsum(counts)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + counts, counts)


def _compare(sets: Sets, first: Numbers, second: Numbers, found: Numbers) -> None:
    """Compare pairs of sets, and mark in `found` the first of each that is similar to the second."""
    smaller, larger = np.sort([sets.sizes[first], sets.sizes[second]], axis=0)
    may_be = (smaller * SIMILARITY.denominator >= larger * SIMILARITY.numerator) & ~found[first]
    pairs = np.unique(first[may_be] << FIRST | second[may_be])
    first, second = pairs >> FIRST, pairs & (1 << FIRST) - 1
    members = np.cumsum(np.diff(sets.starts)[first] + np.diff(sets.starts)[second])
    start = 0
    while start < len(pairs):  # so many that their members are no more than AT_ONCE, but at least one
        before = members[start - 1] if start else 0
        end = max(start + 1, int(np.searchsorted(members, before + AT_ONCE, side="right")))
        part = slice(start, end)
        shared = _shared(sets, first[part], second[part])
        sizes = sets.sizes[first[part]] + sets.sizes[second[part]]
        is_similar = shared * SIMILARITY.denominator >= (sizes - shared) * SIMILARITY.numerator
        found[first[part][is_similar]] = True
        start = end


def _shared(sets: Sets, first: Numbers, second: Numbers) -> Numbers:
    """Return how many members the sets of each pair share, (P,) int64."""
    both = np.stack([first, second], axis=1).ravel()
    counts = np.diff(sets.starts)[both]
    pairs = np.repeat(np.arange(len(both)) // 2, counts)
    members = np.sort(pairs << FIRST | sets.members[_ranges(sets.starts[both], counts)])
    twice = members[1:][members[1:] == members[:-1]]
    return np.bincount(twice >> FIRST, minlength=len(first))
