"""The language model as its own classifier: of all emotions, the one under which it finds a text likeliest.

By Bayes' rule p(label | text) is proportional to p(text | label) p(label). The model gives p(text | label): the product
of the probabilities of the tokens that follow the label in the filled template. The label's own tokens do not count,
lest a label of one token win over one of three; nor does what stands between label and text. Where a token holds the
template's last character and the text's first, as " i" in "joy: i feel" does, it counts. So does end-of-text, where the
format appends it: whether a text ends here may depend on the emotion. Without a class prior all labels are taken for
equally frequent. If the template names the label after the text, the text's tokens are the same for all labels, and
p(label | text) is read from the label on, prior included; of a text that is too long, the beginning is left out then.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import GPT2Tokenizer

from emoft.data.batching import split_loader
from emoft.data.duplicates import overlap
from emoft.data.template import TextFormat
from emoft.data.tokens import make_tokens, most_characters
from emoft.errors import warn
from emoft.evaluate.intervals import Interval, intervals, renamed
from emoft.evaluate.scoring import score_examples
from emoft.model.loading import TextModel
from emoft.training.runtime import Runtime

PAIRS = 6_000  # of a text and a label, tokenized at a time
UNKNOWN = "(unknown)"  # of a confusion matrix, the row of the texts whose emotion the model does not know
MOST_LABELS = 100  # each costs another evaluation


@dataclass(frozen=True)
class Classification:
    """How often the likeliest label is the right one, with 95 % intervals of a bootstrap over examples.

    macro_f1 is the mean of the F1 scores of all labels that occur, in truth or prediction: rare emotions weigh as much
    as frequent ones.
    """

    labels: list[str]
    cells: np.ndarray  # (N,) int64, true label x number of labels + predicted label
    accuracy: float
    accuracy_interval: Interval
    macro_f1: float
    macro_f1_interval: Interval
    without_overlap: "Classification | None" = None  # over the texts that train does not hold too, if both kinds occur

    @property
    def confusion(self) -> np.ndarray:
        """(L, L) int64: texts by true label (rows) and predicted label (columns)."""
        size = len(self.labels)
        return np.bincount(self.cells, minlength=size**2).reshape(size, size)

    def figures(self) -> dict[str, Any]:
        """Return the figures by name, each with its interval beside it, as [low, high], and the number of texts."""
        figures = {
            "emotion_accuracy": self.accuracy,
            "emotion_accuracy_interval": list(self.accuracy_interval),
            "macro_f1": self.macro_f1,
            "macro_f1_interval": list(self.macro_f1_interval),
            "classified": len(self.cells),
        }
        if UNKNOWN in self.labels:
            figures["unknown_emotions"] = int(self.confusion[self.labels.index(UNKNOWN)].sum())
        return figures | (renamed(self.without_overlap.figures(), "_without_overlap") if self.without_overlap else {})

    def table(self) -> str:
        """Return the confusion matrix as text: a row for each true label, a column for each predicted one."""
        first = max(map(len, ["true \\ predicted", *self.labels]))
        widths = [max(len(label), 6) for label in self.labels]
        lines = [("true \\ predicted", self.labels), *zip(self.labels, self.confusion.tolist(), strict=True)]
        return "\n".join(
            f"{name:{first}}  " + "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, widths, strict=True))
            for name, cells in lines
        )


def conditioned_rows(
    tokenizer: GPT2Tokenizer, text_format: TextFormat, texts: Sequence[str], ended: Sequence[bool] | None = None
) -> Dataset:
    """Return the rows whose losses `label_scores` compares: each text under each label, labels changing fastest.

    A row is "input_ids", and "first_target", the place of the first token that counts. A text that is too long is cut
    to the same tokens under all labels, at its end: a long label must not spare its text the last words. If the label
    stands after the text, the text is cut at its beginning.

    Args:
        tokenizer: the model's.
        text_format: its template and labels.
        texts: N of them.
        ended: (N,) whether end-of-text follows; all or none by the format, if not given.
    """
    end = [tokenizer.eos_token_id]
    most = most_characters(tokenizer, text_format.max_length)
    ids: list[list[int]] = []
    firsts: list[int] = []
    pairs = [(text, label) for text in texts for label in text_format.labels]
    for start in range(0, len(pairs), PAIRS):
        part = pairs[start : start + PAIRS]
        encoded = make_tokens(tokenizer, [text_format.fill(*pair)[:most] for pair in part])
        for pair, (tokens, places) in zip(part, encoded, strict=True):
            place = text_format.conditioned_from(*pair)
            ids.append(tokens)
            firsts.append(max(1, next((n for n, stop in enumerate(places) if stop > place), len(places))))
    size = len(text_format.labels)
    for number in range(len(texts)):
        ends = text_format.append_eos if ended is None else ended[number]
        group = range(number * size, (number + 1) * size)
        for row in group:
            ids[row] += end * ends
        if text_format.label_first:
            room = max(0, text_format.max_length - max(firsts[row] for row in group))
            for row in group:
                ids[row] = ids[row][: firsts[row] + room]
        else:
            excess = max(0, max(len(ids[row]) for row in group) - text_format.max_length)
            for row in group:
                ids[row], firsts[row] = ids[row][excess:], max(1, firsts[row] - excess)
    return Dataset.from_dict({"input_ids": ids, "first_target": firsts})


def label_scores(
    text_model: TextModel,
    texts: Sequence[str],
    runtime: Runtime,
    batch_size: int,
    ended: Sequence[bool] | None = None,
) -> np.ndarray | None:
    """Return log p(text | label) in nats for each text and label, (N, L) float64; None if a signal ended it.

    Args:
        text_model: with packed attention, in either mode.
        texts: N of them.
        runtime: all ranks, each of which scores its share. A signal ends this at the next batch.
        batch_size: filled templates computed at once.
        ended: see `conditioned_rows`.
    """
    tokenizer, text_format = text_model.tokenizer, text_model.text_format
    rows = conditioned_rows(tokenizer, text_format, texts, ended)
    loader = split_loader(rows, batch_size, tokenizer.eos_token_id, runtime.device, "packed", runtime.world)
    scores = score_examples(text_model.model, loader, runtime, description="Classifying")
    return None if scores is None else -scores.nats.reshape(len(texts), len(text_format.labels))


def log_prior(labels: Sequence[str], text_format: TextFormat) -> np.ndarray:
    """Return the log of each label's share among those of a train split, (L,); one more of each, so that none is 0."""
    occurrences = Counter(labels)
    counts = np.array([1 + occurrences[label] for label in text_format.labels])
    return np.log(counts / counts.sum())


def classify(
    text_model: TextModel, rows: Dataset, runtime: Runtime, batch_size: int, prior: np.ndarray | None = None
) -> Classification | None:
    """Classify the texts of a split and compare with their labels.

    A text whose label the model does not know cannot be told: it counts as wrong, with a warning. There is no result,
    with a warning, if the model knows less than two labels, none of the texts', or more than `MOST_LABELS`, or if it
    computes infinite or NaN values.

    Args:
        text_model: see `label_scores`.
        rows: with the string columns "text" and "label"; with the column of `duplicates.mark_duplicates`, also without
            what train holds too.
        runtime: all ranks, each of which scores its share. A signal ends this at the next batch.
        batch_size: filled templates computed at once.
        prior: (L,) of `log_prior`; none: all labels are equally frequent.

    Returns:
        The result; None if there is none, or if a signal ended it.
    """
    text_format = text_model.text_format
    if len(text_format.labels) > MOST_LABELS:
        warn(f"{len(text_format.labels)} labels, each of which costs an evaluation: texts are not classified")
        return None
    if len(text_format.labels) < 2:
        warn(f"the model knows one emotion, {', '.join(text_format.labels)}: there is nothing to tell apart")
        return None
    known = {label: number for number, label in enumerate(text_format.labels)}
    which = np.array([label in known for label in rows["label"]], dtype=bool)
    if not which.all():
        unknown = sorted(set(rows["label"]) - set(known))
        warn(
            f"{(~which).sum()} of {len(rows)} texts have emotions that the model does not know"
            f" ({', '.join(unknown[:5])}): they count as wrong"
        )
    if not which.any():
        warn("the model knows none of the texts' emotions: they are not classified")
        return None
    scores = label_scores(text_model, list(rows["text"]), runtime, batch_size)
    if scores is None:
        return None
    if not np.isfinite(scores).all():
        warn("the model computes infinite or NaN values: texts are not classified")
        return None
    predicted = (scores if prior is None else scores + prior).argmax(1)
    true = np.array([known.get(label, len(known)) for label in rows["label"]])
    labels = text_format.labels if which.all() else [*text_format.labels, UNKNOWN]
    return compare(labels, true, predicted, overlap(rows))


def compare(
    labels: list[str], true: np.ndarray, predicted: np.ndarray, in_train: np.ndarray | None = None
) -> Classification:
    """Return the result of predictions.

    Args:
        labels: L names.
        true: (N,) numbers of labels.
        predicted: (N,) likewise.
        in_train: (N,) bool, which of the texts train holds too; None if nobody has looked.
    """
    size = len(labels)
    cells = true * size + predicted

    def statistics(drawn: np.ndarray) -> list[np.ndarray]:
        resamples = len(drawn)
        places = cells[drawn] + np.arange(resamples)[:, None] * size**2
        confusion = np.bincount(places.ravel(), minlength=resamples * size**2).reshape(resamples, size, size)
        return [_accuracy(confusion), _macro_f1(confusion)]

    accuracy, macro_f1 = (float(each[0]) for each in statistics(np.arange(len(cells))[None]))
    accuracy_interval, f1_interval = intervals(statistics, len(cells), numbers=size**2)
    others = None
    if in_train is not None and in_train.any() and not in_train.all():
        others = compare(labels, true[~in_train], predicted[~in_train])
    return Classification(labels, cells, accuracy, accuracy_interval, macro_f1, f1_interval, others)


def _accuracy(confusion: np.ndarray) -> np.ndarray:
    """(R, L, L) -> (R,)."""
    return confusion.trace(axis1=1, axis2=2) / confusion.sum((1, 2))


def _macro_f1(confusion: np.ndarray) -> np.ndarray:
    """(R, L, L) -> (R,): of each label F1 = 2 right / (true + predicted), the mean over labels that occur."""
    right = confusion.diagonal(axis1=1, axis2=2)
    total = confusion.sum(1) + confusion.sum(2)
    f1 = np.divide(2 * right, total, out=np.full(total.shape, math.nan), where=total > 0)
    return np.nanmean(f1, axis=1)
