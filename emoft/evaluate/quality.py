"""How good generated texts are: whether they show the emotion asked for, vary, end, and are not learned by heart.

Figures of a set of texts, by words as in `emoft.data.words`:

- recognized_by_model: share that the model itself takes for the emotion asked for (`emoft.evaluate.classification`).
- recognized_by_tfidf: share that an independent classifier takes for it: logistic regression over TF-IDF of words and
  pairs of words, fitted on the train split.
- distinct_1, _2, _3: different words, pairs and triples of words over all texts, by the number of words (Li et al.,
  2016). It falls as texts become more: compare only sets of the same size.
- self_repetition: 1 - different / all runs of four words within a text, the mean over texts that have any (seq-rep-4 of
  Welleck et al., 2020).
- self_bleu: how much the texts repeat each other (Zhu et al., 2018): the mean BLEU-4 of each against the others.
- ended: share that the model ended itself, rather than the limit of tokens.
- copied: share with a run of eight or more consecutive words that stands in one training text. Shorter texts cannot
  have one, so copied_whole is the share that, whatever their length, are a training text word by word.
"""

import math
from collections import Counter
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch

from emoft.data.words import runs, words
from emoft.evaluate.classification import Classification, compare, label_scores
from emoft.evaluate.intervals import interval_of_mean
from emoft.model.decoding import build_decoder
from emoft.model.generation import Generated, choose_generation_precision, generate_all
from emoft.model.loading import TextModel
from emoft.terminal import progress
from emoft.training.runtime import Runtime

COPIED = 8  # consecutive words
REPEATED = 4
SELF_BLEU_TEXTS = 200
SHARES = ("recognized_by_model", "recognized_by_tfidf", "ended", "copied", "copied_whole")


class IndependentClassifier:
    """TF-IDF of words and pairs of words, and logistic regression, by scikit-learn."""

    def __init__(self, texts: Sequence[str], labels: Sequence[str]) -> None:
        """Fit it.

        Raises:
            ValueError: fewer than two labels, or texts without words.
        """
        # Here, since it need not be installed.
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline

        # C = 10 is right for 0.877 of the validation messages of dair-ai/emotion, the default of 1 for 0.804.
        self.pipeline = make_pipeline(TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000))
        self.pipeline.fit(list(texts), list(labels))

    @staticmethod
    def is_available() -> bool:
        """Whether scikit-learn is installed."""
        return find_spec("sklearn") is not None

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Return the likeliest label of each text."""
        return [str(label) for label in self.pipeline.predict(list(texts))]

    def classify(self, texts: Sequence[str], labels: Sequence[str], names: list[str]) -> Classification:
        """Return how it does on texts whose labels are known, all of them among the names."""
        numbers = {label: number for number, label in enumerate(names)}
        true, predicted = (np.array([numbers[label] for label in each]) for each in (labels, self.predict(texts)))
        return compare(names, true, predicted)


class TrainingTexts:
    """What must not be repeated word by word."""

    def __init__(self, texts: Sequence[str]) -> None:
        spoken = [words(text) for text in texts]
        self.whole = {" ".join(text) for text in spoken}
        self.runs = {run for text in spoken for run in runs(text, COPIED)}

    def share_a_run(self, text: str) -> bool:
        """Whether eight or more consecutive words of a text stand in one training text."""
        return not self.runs.isdisjoint(runs(words(text), COPIED))

    def hold(self, text: str) -> bool:
        """Whether one of them is this text."""
        return " ".join(words(text)) in self.whole


def distinct(texts: Sequence[str], length: int) -> float:
    """Return the number of different runs of so many words by the number of all words."""
    spoken = [words(text) for text in texts]
    return len({run for text in spoken for run in runs(text, length)}) / max(1, sum(map(len, spoken)))


def self_repetition(text: str) -> float:
    """Return 1 - different / all runs of four words in a text; NaN if there is none."""
    found = runs(words(text), REPEATED)
    return 1 - len(set(found)) / len(found) if found else float("nan")


def sample(
    text_model: TextModel, count: int, precision: str, batch_size: int, seed: int, **options: Any
) -> dict[str, list[Generated]]:
    """Return so many sampled texts for each emotion.

    Args:
        text_model: in evaluation mode.
        count: texts for each emotion.
        precision: as of --mixed_precision.
        batch_size: texts computed at once.
        seed: of the random draws.
        options: of `generate_batch`.
    """
    model, tokenizer, text_format = text_model.model, text_model.tokenizer, text_model.text_format
    prompts = [text_format.prompt(label) for label in text_format.labels]
    chosen = choose_generation_precision(precision, model.device, min(batch_size, count * len(prompts)))
    torch.manual_seed(seed)
    results = generate_all(
        build_decoder(model, chosen),
        tokenizer,
        prompts,
        batch_size,
        count,
        max_length=text_format.max_length,
        do_sample=True,
        **options,
    )
    bar = progress(results, "Sampling", "emotions", len(prompts))
    return dict(zip(text_format.labels, bar, strict=True))


def people(
    text_model: TextModel, texts: Sequence[str], labels: Sequence[str], count: int
) -> dict[str, list[Generated]]:
    """Return texts that people wrote as if the model had: what the figures of its own are to be compared with.

    Args:
        text_model: knows the labels.
        texts: that it was not trained on.
        labels: of the texts.
        count: most of each emotion, as many as the model wrote, since some figures fall as texts become more.
    """
    text_format, found = text_model.text_format, dict[str, list[Generated]]()
    for text, label in zip(texts, labels, strict=True):
        chosen = found.setdefault(label, []) if label in text_format.labels else None
        if chosen is not None and len(chosen) < count:
            chosen.append(Generated(text_format.prompt(label), text_format.fill(text, label), 0, True))
    return found


def self_bleu(texts: Sequence[str], most: int = SELF_BLEU_TEXTS) -> float:
    """Return how much texts repeat each other: the mean BLEU-4 of each against all others (Zhu et al., 2018).

    Counts are smoothed by 1 from pairs of words on (Lin and Och, 2004, method 2), since many texts are short. It costs
    the square of the number of texts: of more than `most`, the first ones are taken.
    """
    spoken = [words(text) for text in texts[:most]]
    grams = [[Counter(runs(text, length)) for length in range(1, 5)] for text in spoken]
    scores = []
    for number, text in enumerate(spoken):
        others = [n for n in range(len(spoken)) if n != number]
        if not text or not others:
            continue
        logs = 0.0
        for order in range(4):
            most_often: Counter[str] = Counter()
            for other in others:
                most_often |= grams[other][order]
            own = grams[number][order]
            matched, total, smoothed = (own & most_often).total(), own.total(), order > 0
            logs += math.log(max(matched + smoothed, 1e-9) / max(total + smoothed, 1e-9)) / 4
        nearest = min((len(spoken[n]) for n in others), key=lambda length: (abs(length - len(text)), length))
        scores.append(math.exp(logs + min(0.0, 1 - nearest / len(text))))
    return sum(scores) / max(1, len(scores))


def assess(
    text_model: TextModel,
    samples: dict[str, list[Generated]],
    runtime: Runtime,
    batch_size: int,
    training: TrainingTexts | None = None,
    independent: IndependentClassifier | None = None,
) -> dict[str, dict[str, Any]]:
    """Return the figures of samples by emotion, and of all together under "all", there with intervals of the shares.

    Args:
        text_model: with packed attention.
        samples: by emotion, of `sample`.
        runtime: of the scoring.
        batch_size: filled templates scored at once.
        training: the train split; without it nothing is said of copies.
        independent: without it nothing is said of what it recognizes.
    """
    text_format = text_model.text_format
    labels = [label for label, results in samples.items() for _ in results]
    results = [result for results in samples.values() for result in results]
    texts = [text_format.extract(result.text, label) for result, label in zip(results, labels, strict=True)]
    ended = [result.finished for result in results]
    scores = label_scores(text_model, texts, runtime, batch_size, ended)
    assert scores is not None
    each: dict[str, np.ndarray] = {
        "recognized_by_model": np.array(
            [text_format.labels[best] == label for best, label in zip(scores.argmax(1), labels, strict=True)]
        ),
        "ended": np.array(ended),
        "self_repetition": np.array([self_repetition(text) for text in texts]),
    }
    if independent:
        predicted = independent.predict(texts)
        each["recognized_by_tfidf"] = np.array([a == b for a, b in zip(predicted, labels, strict=True)])
    if training:
        each["copied"] = np.array([training.share_a_run(text) for text in texts])
        each["copied_whole"] = np.array([training.hold(text) for text in texts])

    def figures(which: np.ndarray) -> dict[str, Any]:
        chosen = [texts[number] for number in np.flatnonzero(which)]
        found: dict[str, Any] = {name: float(each[name][which].mean()) for name in SHARES if name in each}
        repetition = each["self_repetition"][which]
        found["self_repetition"] = float(np.nanmean(repetition)) if not np.isnan(repetition).all() else 0.0
        found |= {f"distinct_{length}": distinct(chosen, length) for length in (1, 2, 3)}
        return found | {"self_bleu": self_bleu(chosen)}

    table = {label: figures(np.array([other == label for other in labels])) for label in samples}
    everything = figures(np.ones(len(texts), dtype=bool))
    for name in SHARES:
        if name in each:
            everything[f"{name}_interval"] = list(interval_of_mean(each[name]))
    return {**table, "all": everything}


def format_quality(table: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a table, a line for each emotion."""
    names = [name for name in table["all"] if not name.endswith("_interval")]
    first = max(map(len, table))
    lines = [f"{'':{first}}  " + "  ".join(names)]
    for label, figures in table.items():
        lines.append(f"{label:{first}}  " + "  ".join(f"{figures[name]:>{len(name)}.3f}" for name in names))
    return "\n".join(lines)
