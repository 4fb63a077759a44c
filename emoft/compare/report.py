"""Two models, or two groups of them, on the same texts: the figures of each, and the sentence that they come to."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from emoft.compare.config import CompareConfig
from emoft.compare.statistics import Difference, Statistic, accuracy, compare, macro_f1, mcnemar, ratio
from emoft.data.batching import split_loader
from emoft.data.reading import read_evaluation_splits
from emoft.data.template import TextFormat
from emoft.data.tokenized import tokenize
from emoft.data.tokens import byte_lengths
from emoft.device import choose_device
from emoft.distributed.world import World
from emoft.errors import UserError
from emoft.evaluate.classification import MOST_LABELS, label_scores
from emoft.evaluate.saved import load_text_model, read_format
from emoft.evaluate.scoring import score_examples
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime

LOSS, BITS, ACCURACY, MACRO_F1 = "loss (nats a token)", "bits per byte", "emotion accuracy", "macro F1"
LONGEST = 80  # characters of a text that are shown


@dataclass(frozen=True)
class Side:
    """What the models of one side make of the texts; (S, N) of each of S models and N texts."""

    names: list[str]
    nats: np.ndarray
    tokens: np.ndarray
    text_bytes: np.ndarray
    predicted: np.ndarray | None  # numbers of labels; None if the models tell no emotions
    vocabulary: tuple[str, ...]  # what must be the same for losses to be compared


@dataclass(frozen=True)
class Comparison:
    """The result."""

    texts: int
    differences: dict[str, Difference]
    told_alone: tuple[int, int, float] | None  # texts that only A, only B tells rightly, and McNemar's p
    better_by_a: list[dict[str, Any]]
    better_by_b: list[dict[str, Any]]
    groups: tuple[int, int]
    verdict: str


def compare_models(config: CompareConfig) -> Comparison:
    """Compare the models that the flags name.

    Raises:
        UserError: models or texts that cannot be compared.
    """
    first, second = config.groups()
    formats = [read_format(config.of_evaluation(name)) for name in (*first, *second)]
    forms = {(each.template, each.append_eos) for each in formats}
    if len(forms) > 1:
        told = ", ".join(f"{template!r} {'with' if eos else 'without'} end-of-text" for template, eos in sorted(forms))
        raise UserError(
            f"the models were trained on different forms of a text ({told}), so that their figures are not of the same:"
            " compare models of one template"
        )
    with_labels = next((each for each in formats if each.labels), formats[0])
    splits, _ = read_evaluation_splits(config.of_evaluation(first[0]), with_labels)
    rows = splits["test"]
    a = _side(config, first, rows, formats[: len(first)])
    b = _side(config, second, rows, formats[len(first) :])
    labels = list(rows["label"]) if "label" in rows.column_names else []
    return judge(a, b, list(rows["text"]), labels, config.texts)


def _side(config: CompareConfig, names: list[str], rows: Any, formats: list[TextFormat]) -> Side:
    runtime = Runtime(World(), Precision(config.mixed_precision, choose_device(config.use_cpu)))
    nats, tokens, text_bytes, predicted, vocabularies = [], [], [], [], set()
    batch_size = config.per_device_eval_batch_size
    for name, text_format in zip(names, formats, strict=True):
        text_model = load_text_model(name, "main", text_format, runtime.device)
        tokenizer = text_model.tokenizer
        ids = tokenize(rows, tokenizer, text_format, "test").select_columns("input_ids")
        loader = split_loader(ids, batch_size, tokenizer.eos_token_id, runtime.device, "packed", runtime.world)
        sizes = byte_lengths(tokenizer, text_model.model.config.vocab_size)
        scores = score_examples(text_model.model, loader, runtime, sizes, f"Scoring by {name}")
        assert scores
        nats.append(scores.nats)
        tokens.append(scores.tokens)
        text_bytes.append(scores.text_bytes)
        vocabularies.add((tokenizer.backend_tokenizer.to_str(), str(text_format.max_length)))
        if text_format.has_label and 2 <= len(text_format.labels) <= MOST_LABELS:
            found = label_scores(text_model, list(rows["text"]), runtime, batch_size)
            assert found is not None
            predicted.append([text_format.labels[number] for number in found.argmax(1)])
    if len(vocabularies) > 1:
        raise UserError(f"the models {', '.join(names)} have different tokenizers: a group is of one recipe")
    known = len(predicted) == len(names)
    return Side(
        names, np.array(nats), tokens[0], text_bytes[0], np.array(predicted) if known else None,
        vocabularies.pop(),
    )  # fmt: skip


def judge(a: Side, b: Side, texts: list[str], labels: list[str], shown: int) -> Comparison:
    """Return the comparison of two sides over the same texts.

    Args:
        a: the models of the first side.
        b: those of the second.
        texts: N of them.
        labels: their true labels, (N,); empty if nobody knows them.
        shown: texts on which each side is better by most.
    """
    count, groups = len(texts), (len(a.names), len(b.names))

    def difference(of_a: Statistic, of_b: Statistic) -> Difference:
        return compare(of_a, of_b, count)

    differences: dict[str, Difference] = {}
    if a.vocabulary == b.vocabulary:  # otherwise a token is something else on each side
        differences[LOSS] = difference(ratio(a.nats, a.tokens), ratio(b.nats, b.tokens))
    differences[BITS] = difference(ratio(a.nats / np.log(2), a.text_bytes), ratio(b.nats / np.log(2), b.text_bytes))
    told_alone = None
    if labels and a.predicted is not None and b.predicted is not None:
        names = sorted({*labels, *a.predicted.flat, *b.predicted.flat})
        number = {name: n for n, name in enumerate(names)}
        true = np.array([number[label] for label in labels])
        told_a, told_b = (np.vectorize(number.__getitem__)(side.predicted) for side in (a, b))
        right_a, right_b = told_a == true, told_b == true
        differences[ACCURACY] = difference(accuracy(right_a), accuracy(right_b))
        differences[MACRO_F1] = difference(macro_f1(true, told_a, len(names)), macro_f1(true, told_b, len(names)))
        if groups == (1, 1):
            only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
            told_alone = only_a, only_b, mcnemar(only_a, only_b)
    # By byte, so that long texts do not stand first for their length.
    gain = (a.nats.mean(0) / np.maximum(1, a.text_bytes) - b.nats.mean(0) / np.maximum(1, b.text_bytes)) / np.log(2)
    order = np.argsort(gain)

    def told_of(places: np.ndarray) -> list[dict[str, Any]]:
        return [
            {"row": int(n), "text": texts[n], "label": labels[n] if labels else "", "bits_per_byte": float(gain[n])}
            for n in places
        ]

    by_a, by_b = told_of(order[gain[order] < 0][:shown]), told_of(order[::-1][gain[order[::-1]] > 0][:shown])
    return Comparison(count, differences, told_alone, by_a, by_b, groups, verdict(differences, count))


def verdict(differences: dict[str, Difference], texts: int) -> str:
    """Return what the differences over so many texts come to, in a sentence."""
    name = LOSS if LOSS in differences else BITS
    main = differences[name]
    if main.is_sure:
        low, high = sorted(abs(each) for each in main.interval)
        better = "B" if main.difference < 0 else "A"
        sentence = f"{better} is better by {abs(main.difference):.3f} [{low:.3f}, {high:.3f}], {name}"
    else:
        sentence = f"no difference in {name} that {texts:,} texts could show; one of {main.least:.3f} they would"
    if ACCURACY in differences:
        told = differences[ACCURACY]
        interval = f"{told.difference:+.3f} [{told.interval[0]:+.3f}, {told.interval[1]:+.3f}]"
        sentence += f"; emotion accuracy {'differs' if told.is_sure else 'does not surely differ'}: {interval}"
    return sentence


def describe(found: Comparison, a: str, b: str) -> str:
    """Return the comparison as text."""
    lines = [f"A: {a}", f"B: {b}", f"{found.texts:,} texts; differences are B - A, with their 95 % intervals", ""]
    width = max(map(len, found.differences))
    lines.append(f"{'':{width}}  {'A':>8}  {'B':>8}  {'B - A':>8}  {'interval':>20}  {'least shown':>11}")
    for name, each in found.differences.items():
        interval = f"[{each.interval[0]:+.4f}, {each.interval[1]:+.4f}]"
        lines.append(
            f"{name:{width}}  {each.a:8.4f}  {each.b:8.4f}  {each.difference:+8.4f}  {interval:>20}  {each.least:11.4f}"
        )
    if found.told_alone:
        only_a, only_b, chance = found.told_alone
        lines += ["", f"only A tells {only_a:,} texts rightly, only B {only_b:,}: p = {chance:.3g} (McNemar's test)"]
    if 1 in found.groups:
        lines.append("one model a side: what another seed would change is in no interval; give several as A1,A2,A3")
    for title, texts in (("A", found.better_by_a), ("B", found.better_by_b)):
        if texts:
            lines += ["", f"where {title} is better by most, in bits a byte:"]
            lines += [f"  {abs(t['bits_per_byte']):.2f}  row {t['row']}  {_short(t)}" for t in texts]
    return "\n".join([*lines, "", found.verdict])


def _short(text: dict[str, Any]) -> str:
    shown = f"{text['label']}: {text['text']}" if text["label"] else str(text["text"])
    return shown if len(shown) <= LONGEST else shown[: LONGEST - 3] + "..."


def as_json(found: Comparison) -> dict[str, Any]:
    """Return the comparison as what JSON can hold."""
    return asdict(found)
