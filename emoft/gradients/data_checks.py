"""Checks of what the run is trained and evaluated on."""

import math

from emoft.gradients.finding import Finding
from emoft.gradients.record import CannotCheckError, Record
from emoft.gradients.thresholds import CLASSIFIED, CUT_SHARE, DISTINCT_SHARE, EPOCHS, LEAST_ALIGNED, OVERLAP

DATA = "looks at the data", "they are taken at the first log entry"


def check_labels(record: Record) -> list[Finding]:
    """Targets that are not the next token."""
    tag = "train/label_alignment"
    points = record.points(tag, how="the loop does not call emoft's cross_entropy")
    bad = [(step, share) for step, share in points if share < LEAST_ALIGNED]
    if len(bad) <= len(points) / 2:
        return []
    step, share = bad[0]
    text = (
        f"only {share:.0%} of the targets that the loss is given are the token right after the place that predicts them"
        f" (must be above {LEAST_ALIGNED:.0%}), from step {step} on: labels are not shifted, shifted twice, or"
        " a first token or padding is a target. Shift them once, as shift_labels does"
    )
    return [Finding("labels_misaligned", text, tag, [step for step, _ in bad], share, LEAST_ALIGNED)]


def check_repetition(record: Record) -> list[Finding]:
    """The same texts again and again."""
    tag = "data/distinct_texts"
    share = record.values(tag, unit=DATA[0], how=DATA[1])[0]
    if share >= DISTINCT_SHARE:
        return []
    text = (
        f"only {share:.1%} of train's examples are different from each other (expected at least {DISTINCT_SHARE:.0%}):"
        " the model learns them by heart. Look for how the file came to hold texts many times; --drop_duplicates leaves"
        " repetitions out"
    )
    return [Finding("texts_repeated", text, tag, figure=share, threshold=DISTINCT_SHARE)]


def check_cut(record: Record) -> list[Finding]:
    """Texts of which only the beginning is trained on."""
    tag = "data/cut_texts"
    share = record.values(tag, unit=DATA[0], how=DATA[1])[0]
    if share <= CUT_SHARE:
        return []
    text = (
        f"{share:.0%} of train's texts are cut by --max_length (expected at most {CUT_SHARE:.0%}): their ends are never"
        " learned, and no end-of-text stands behind them. Raise --max_length, shorten what --template puts around the"
        " text, or split the texts"
    )
    return [Finding("texts_cut", text, tag, figure=share, threshold=CUT_SHARE)]


def check_emotions(record: Record) -> list[Finding]:
    """A single emotion, where the template names them."""
    tag = "data/emotions"
    count = record.values(tag, unit=DATA[0], how=DATA[1])[0]
    if count != 1:
        return []
    text = (
        "all of train has one emotion: the model cannot learn what the word in the template means. Check"
        " --label_column and how the file was made"
    )
    return [Finding("one_emotion", text, tag, figure=count, threshold=2)]


def check_label_information(record: Record) -> list[Finding]:
    """Labels that have nothing to do with their texts."""
    tag = "data/emotion_by_words"
    told = record.values(tag, unit=DATA[0], how="a template with {label}")[0]
    largest, asked = (record.values(f"data/{name}")[0] for name in ("largest_emotion", "emotions_asked"))
    if asked < CLASSIFIED:
        raise CannotCheckError(f"{asked:.0f} labelled texts, {CLASSIFIED} needed")
    chance = _chance(largest, asked)
    if largest == 1 or told > chance:
        return []
    text = (
        f"labels have nothing to do with their texts: naive Bayes over the words of one half of train tells {told:.0%}"
        f" of the other half's, no more than chance ({largest:.0%} have the most frequent label, by chance up to"
        f" {chance:.0%}). Read a few lines of the file: labels are shuffled, or of another column"
    )
    return [Finding("labels_do_not_fit", text, tag, figure=told, threshold=chance)]


def _chance(largest: float, texts: float) -> float:
    """Return the share that who always says the most frequent label gets right, two standard errors above the mean."""
    return largest + 2 * math.sqrt(largest * (1 - largest) / texts)


def check_overlap(record: Record) -> list[Finding]:
    """An evaluation on texts that the model is trained on."""
    tag = "eval/overlap"
    share = record.values(tag, unit="evaluations", how="--validation_file, --dataset_name")[-1]
    if share < OVERLAP:
        return []
    text = (
        f"{share:.0%} of the validation texts are in train too, or nearly so (expected below {OVERLAP:.0%}):"
        " the evaluation says how well texts are known by heart. Give --validation_file other texts"
    )
    return [Finding("evaluated_on_train", text, tag, figure=share, threshold=OVERLAP)]


def check_recognition(record: Record) -> list[Finding]:
    """Emotions that the model tells no better than somebody who always says the most frequent one."""
    tag = "eval/emotion_accuracy"
    points = record.points(tag, unit="classifications", how="a template with {label}, and --validation_file")
    largest = record.values("eval/largest_emotion", unit="classifications")[-1]
    texts = record.values("eval/classified", unit="classifications")[-1]
    if points[-1][0] == 0:
        raise CannotCheckError("the trained model has not been asked for emotions yet: at the end of the run it is")
    if texts < CLASSIFIED:
        raise CannotCheckError(f"{texts:.0f} texts with an emotion, {CLASSIFIED} needed: --max_eval_samples")
    epochs = record.values("train/epoch")[-1]
    if epochs < EPOCHS:
        raise CannotCheckError(f"{epochs:.1f} epochs, {EPOCHS} needed: emotions are learned later than words")
    accuracy, chance = points[-1][1], _chance(largest, texts)
    if accuracy > chance:
        return []
    text = (
        f"of {texts:.0f} validation texts {accuracy:.0%} are given their emotion, no better than always saying the most"
        f" frequent one ({largest:.0%}, by chance up to {chance:.0%}). Words depend little on the label:"
        " --label_contrast 0.2 asks for it, or train more epochs"
    )
    return [Finding("emotions_not_learned", text, tag, [points[-1][0]], accuracy, chance)]
