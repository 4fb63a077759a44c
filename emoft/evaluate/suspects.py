"""Labels that may be wrong: rows whose label a model doubts that has not seen them, and how many there are in all.

Confident learning (Northcutt, Jiang and Chuang, 2021): a label counts as doubted where another one is at least as
likely as it is, on average, for the rows that carry that other label. Nothing is dropped: a person decides.
"""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from emoft.data.words import words
from emoft.evaluate.independent import IndependentClassifier
from emoft.evaluate.intervals import Interval, intervals

FOLDS = 5
AT_ONCE = 256  # texts whose neighbours are looked for
LONGEST = 70  # characters of a text that are shown in a line


@dataclass(frozen=True)
class Suspect:
    """A row whose label may be wrong."""

    row: int  # of the split, from 0
    text: str
    label: str
    suggested_label: str
    probability: float  # of the suggested one
    probability_of_label: float
    nearest_text: str = ""  # of the other rows, by words
    nearest_label: str = ""


@dataclass(frozen=True)
class Suspicion:
    """What is known of the labels of a split."""

    judged_by: str
    suspects: list[Suspect]  # the most doubted first
    noise: float  # the share of labels that are wrong
    noise_interval: Interval

    @property
    def best_accuracy(self) -> float:
        """The accuracy that a faultless model would have against these labels."""
        return 1 - self.noise

    def figures(self) -> dict[str, Any]:
        """Return the figures by name."""
        low, high = self.noise_interval
        return {
            "label_noise": self.noise,
            "label_noise_interval": [low, high],
            "best_accuracy": self.best_accuracy,
            "best_accuracy_interval": [1 - high, 1 - low],
        }

    def describe(self) -> list[str]:
        """Return the figures and the suspects, each with what speaks against its label."""
        low, high = self.noise_interval
        lines = [
            f"labels judged by {self.judged_by}: about {self.noise:.1%} [{low:.1%}, {high:.1%}] of them are wrong, so"
            f" that a faultless model would be right for {self.best_accuracy:.1%} of them"
        ]
        for each in self.suspects:
            lines.append(
                f"row {each.row}  {each.label} -> {each.suggested_label}? ({each.probability:.2f}, its label"
                f" {each.probability_of_label:.2f})  {_short(each.text)}"
            )
            if each.nearest_text:
                lines.append(f"    nearest: {each.nearest_label}: {_short(each.nearest_text)}")
        return lines


def cross_fitted(texts: Sequence[str], labels: Sequence[str], names: Sequence[str], seed: int) -> np.ndarray:
    """Return (N, L) the chance of each label for each text, by a model that has not seen the text, nor a copy of it.

    A logistic regression over TF-IDF, `independent.IndependentClassifier`, for each of five parts of the rows, fitted
    on the four others.

    Raises:
        ValueError: there are too few texts.
    """
    # Here, since it need not be installed.
    from sklearn.model_selection import StratifiedGroupKFold

    place = {name: number for number, name in enumerate(names)}
    rows, given = np.array(texts, dtype=object), np.array(labels)
    copies = {key: n for n, key in enumerate(dict.fromkeys(" ".join(words(text)) for text in texts))}
    groups = np.array([copies[" ".join(words(text))] for text in texts])
    found = np.zeros((len(texts), len(names)))
    parts = StratifiedGroupKFold(min(FOLDS, len(copies)), shuffle=True, random_state=seed)
    for seen, held in parts.split(rows, given, groups):
        model = IndependentClassifier(rows[seen].tolist(), given[seen].tolist()).pipeline
        chances = model.predict_proba(rows[held])
        for column, name in enumerate(model.classes_):
            found[held, place[str(name)]] = chances[:, column]
    return found


def confident_joint(given: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Return (L, L) the share of rows by given label (down) and by the label that is confidently theirs (across).

    Args:
        given: (N,) numbers of labels.
        chances: (N, L) of each label, by a model that has not seen the row.
    """
    count = chances.shape[1]
    sizes = np.bincount(given, minlength=count)
    thresholds = np.array([chances[given == n, n].mean() if sizes[n] else np.inf for n in range(count)])
    confident = np.where(chances >= thresholds, chances, -1.0)
    sure = confident.max(1) >= 0
    counts = np.zeros((count, count))
    np.add.at(counts, (given[sure], confident[sure].argmax(1)), 1)
    counts[counts.sum(1) == 0] += np.eye(count)[counts.sum(1) == 0]  # of a label that is sure nowhere: as it is given
    joint = counts / counts.sum(1, keepdims=True) * sizes[:, None]
    return joint / joint.sum()


def noise(given: np.ndarray, chances: np.ndarray) -> tuple[float, Interval]:
    """Return the share of labels that are wrong, and its 95 % interval by bootstrap over rows."""

    def statistics(drawn: np.ndarray) -> list[np.ndarray]:
        return [np.array([1 - np.trace(confident_joint(given[rows], chances[rows])) for rows in drawn])]

    share = float(1 - np.trace(confident_joint(given, chances)))
    return share, intervals(statistics, len(given), numbers=chances.size)[0]


def find_suspects(
    texts: Sequence[str],
    labels: Sequence[str],
    names: Sequence[str],
    chances: np.ndarray,
    count: int,
    judged_by: str,
) -> Suspicion:
    """Return the rows whose labels are doubted most.

    Args:
        texts: N of them.
        labels: given, each one of the names.
        names: L labels.
        chances: (N, L), by a model that has not seen the text.
        count: of suspects.
        judged_by: that model, in words.
    """
    place = {name: number for number, name in enumerate(names)}
    given = np.array([place[label] for label in labels])
    rows = np.arange(len(given))
    own = chances[rows, given]
    rivals = chances.copy()
    rivals[rows, given] = -1.0
    best = rivals.argmax(1)
    margin = rivals[rows, best] - own
    order = np.argsort(-margin, kind="stable")[:count]
    nearest = _nearest(texts, order)
    suspects = [
        Suspect(
            int(n), texts[n], labels[n], names[best[n]], float(rivals[n, best[n]]), float(own[n]),
            *((texts[near], labels[near]) if near is not None else ("", "")),
        )
        for n, near in zip(order, nearest, strict=True)
    ]  # fmt: skip
    return Suspicion(judged_by, suspects, *noise(given, chances))


def _nearest(texts: Sequence[str], places: np.ndarray) -> list[int | None]:
    """Return for each of some texts the place of the other one nearest to it by TF-IDF; None if none shares a word.

    Args:
        texts: N of them.
        places: of those whose neighbours are looked for.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer  # here, as above

    vectors = TfidfVectorizer(ngram_range=(1, 2)).fit_transform(texts)
    found: list[int | None] = []
    for start in range(0, len(places), AT_ONCE):
        some = places[start : start + AT_ONCE]
        shared = (vectors[some] @ vectors.T).toarray()
        shared[np.arange(len(some)), some] = 0.0  # a text is not its own neighbour
        found += [int(n) if row[n] > 0 else None for n, row in zip(shared.argmax(1), shared, strict=True)]
    return found


def write_suspects(path: Path, found: Suspicion, texts: Sequence[str], labels: Sequence[str]) -> None:
    """Write all rows as a CSV that --train_file takes: the suspects first, with what is known of them.

    Raises:
        OSError: it cannot be written.
    """
    with path.open("w", encoding="utf-8", newline="") as file:
        table = csv.writer(file)
        table.writerow(["text", "label", "row", "suggested_label", "probability", "nearest_text", "nearest_label"])
        for each in found.suspects:
            table.writerow(
                [each.text, each.label, each.row, each.suggested_label, f"{each.probability:.4f}", each.nearest_text,
                 each.nearest_label]
            )  # fmt: skip
        first = {each.row for each in found.suspects}
        table.writerows(
            [text, label, row, "", "", "", ""]
            for row, (text, label) in enumerate(zip(texts, labels, strict=True))
            if row not in first
        )


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 3] + "..."
