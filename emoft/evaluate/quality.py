"""How good generated texts are: whether they show the emotion asked for, vary, end, and are not learned by heart.

Figures of a set of texts, by words as in `emoft.data.words`:

- recognized_by_model: share that the model itself takes for the emotion asked for (`emoft.evaluate.classification`).
- recognized_by_tfidf, recognized_by_letters: share that linear models take for it, over words and over runs of letters,
  fitted on the train split (`emoft.evaluate.independent`).
- judge_perplexity, judge_bits_per_byte: by another language model (`emoft.evaluate.judge`).
- mauve: how near the texts come to people's by that model's features; for people's, how near one half of them comes to
  the other.
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
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from emoft.data.tokens import decode, encode_whole
from emoft.data.words import runs, words
from emoft.evaluate.classification import label_scores
from emoft.evaluate.independent import KINDS, IndependentClassifier
from emoft.evaluate.intervals import interval_of_mean
from emoft.evaluate.judge import LanguageJudge
from emoft.evaluate.scoring import summarize
from emoft.model.decoding import build_decoder
from emoft.model.generation import Generated, choose_generation_precision, generate_all
from emoft.model.loading import TextModel
from emoft.terminal import progress
from emoft.training.runtime import Runtime

COPIED = 8  # consecutive words
REPEATED = 4
SELF_BLEU_TEXTS = 200
RECOGNIZED = ("recognized_by_model", *(f"recognized_by_{kind}" for kind in KINDS))
SHARES = (*RECOGNIZED, "ended", "copied", "copied_whole")
JUDGED = ("perplexity", "bits_per_byte")  # by another language model


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


@dataclass(frozen=True)
class Judges:
    """All that judges texts beside the model that wrote them; of what is missing nothing is said."""

    training: TrainingTexts | None = None  # tells copies
    independent: dict[str, IndependentClassifier] = field(default_factory=dict)  # by kind, tell what they recognize
    language: LanguageJudge | None = None


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

    They are cut where the model must stop, at its `max_length`, and have ended by themselves if they are not.

    Args:
        text_model: knows the labels.
        texts: that it was not trained on.
        labels: of the texts.
        count: most of each emotion.
    """
    tokenizer, text_format = text_model.tokenizer, text_model.text_format
    chosen: dict[str, list[str]] = {}
    for text, label in zip(texts, labels, strict=True):
        if label in text_format.labels and len(chosen.setdefault(label, [])) < count:
            chosen[label].append(text_format.fill(text, label))
    found = {}
    for label, filled in chosen.items():
        whole = encode_whole(tokenizer, filled, text_format)
        fits = [len(ids) <= text_format.max_length for ids in whole]
        found[label] = [
            Generated(
                text_format.prompt(label), text if fit else decode(tokenizer, ids[: text_format.max_length]), 0, fit
            )
            for text, ids, fit in zip(filled, whole, fits, strict=True)
        ]
    return found


def bare_texts(text_model: TextModel, samples: dict[str, list[Generated]]) -> dict[str, list[str]]:
    """Return the texts of samples by emotion, without the template."""
    return {
        label: [text_model.text_format.extract(result.text, label) for result in results]
        for label, results in samples.items()
    }


def self_bleu(texts: Sequence[str], most: int = SELF_BLEU_TEXTS) -> float:
    """Return how much texts repeat each other: the mean BLEU-4 of each against all others (Zhu et al., 2018).

    Counts are smoothed by 1 from pairs of words on (Lin and Och, 2004, method 2), since many texts are short. It costs
    the square of the number of texts: of more than `most`, so many at even distances are taken.
    """
    few = texts if len(texts) <= most else [texts[n * len(texts) // most] for n in range(most)]
    spoken = [words(text) for text in few]
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
    judges: Judges,
) -> dict[str, dict[str, Any]]:
    """Return the figures of samples by emotion, and of all together under "all", there with intervals.

    Args:
        text_model: with packed attention.
        samples: by emotion, of `sample` or `people`.
        runtime: of the scoring.
        batch_size: filled templates scored at once.
        judges: what else there is to judge them by.
    """
    text_format = text_model.text_format
    labels = [label for label, results in samples.items() for _ in results]
    texts = [text for texts in bare_texts(text_model, samples).values() for text in texts]
    ended = [result.finished for results in samples.values() for result in results]
    scores = label_scores(text_model, texts, runtime, batch_size, ended)
    assert scores is not None
    predicted = {"model": [text_format.labels[best] for best in scores.argmax(1)]}
    predicted |= {kind: judge.predict(texts) for kind, judge in judges.independent.items()}
    each: dict[str, np.ndarray] = {
        f"recognized_by_{name}": np.array([a == b for a, b in zip(found, labels, strict=True)])
        for name, found in predicted.items()
    }
    each["ended"] = np.array(ended)
    each["self_repetition"] = np.array([self_repetition(text) for text in texts])
    if judges.training:
        each["copied"] = np.array([judges.training.share_a_run(text) for text in texts])
        each["copied_whole"] = np.array([judges.training.hold(text) for text in texts])
    judged = judges.language.score(texts, ended) if judges.language else None

    def _figures(which: np.ndarray, with_intervals: bool = False) -> dict[str, Any]:
        chosen = [texts[number] for number in np.flatnonzero(which)]
        found: dict[str, Any] = {"texts": len(chosen)}
        for name in SHARES:
            if name in each:
                found[name] = float(each[name][which].mean())
                if with_intervals:
                    found[f"{name}_interval"] = list(interval_of_mean(each[name][which]))
        if judged:
            of_judge = summarize(judged[which]).figures()
            for name in JUDGED:
                found[f"judge_{name}"] = of_judge[name]
                if with_intervals:
                    found[f"judge_{name}_interval"] = of_judge[f"{name}_interval"]
        repetition = each["self_repetition"][which]
        found["self_repetition"] = float(np.nanmean(repetition)) if not np.isnan(repetition).all() else 0.0
        found |= {f"distinct_{length}": distinct(chosen, length) for length in (1, 2, 3)}
        return found | {"self_bleu": self_bleu(chosen)}

    table = {label: _figures(np.array([other == label for other in labels])) for label in samples}
    return {**table, "all": _figures(np.ones(len(texts), dtype=bool), with_intervals=True)}


def format_quality(table: dict[str, dict[str, Any]]) -> str:
    """Return the figures as a table: a line for each figure, a column for each set of texts, intervals where known."""
    names = [name for name in table["all"] if not name.endswith("_interval")]
    columns = {"": names} | {title: [_cell(found, name) for name in names] for title, found in table.items()}
    widths = [max(map(len, (title, *cells))) for title, cells in columns.items()]
    lines = [tuple(columns), *zip(*columns.values(), strict=True)]
    return "\n".join(
        "  ".join(f"{cell:{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def _cell(figures: dict[str, Any], name: str) -> str:
    if name not in figures:
        return ""
    if isinstance(figures[name], int):
        return f"{figures[name]:,}"
    numbers = [figures[name], *figures.get(f"{name}_interval", [])]
    value, *interval = (f"{number:,.1f}" if abs(number) >= 10 else f"{number:.3f}" for number in numbers)
    return f"{value} [{', '.join(interval)}]" if interval else value
