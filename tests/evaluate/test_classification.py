import resource

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset
from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.batching import IGNORED, pack, pad
from emoft.data.template import TextFormat
from emoft.distributed.world import World
from emoft.evaluate.classification import classify, compare, conditioned_rows, label_scores, log_prior
from emoft.model.attention import use_packed_attention
from emoft.model.loading import TextModel
from emoft.training.loss import shift_labels
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime

RUNTIME = Runtime(World(), Precision("no", torch.device("cpu")))
LABELS = ["joy", "sadness", "a very long emotion", "ភ័យ"]
TEXTS = [text for text, _ in SENTENCES] + ["ខ្ញុំ", "i"]


@pytest.fixture(scope="module")
def parts(tiny_model) -> tuple[GPT2LMHeadModel, GPT2Tokenizer]:
    model = GPT2LMHeadModel.from_pretrained(tiny_model).eval()
    use_packed_attention(model)
    return model, GPT2Tokenizer.from_pretrained(tiny_model)


def log_probability(model: GPT2LMHeadModel, ids: list[int], first: int) -> float:
    with torch.no_grad():
        logits = GPT2LMHeadModel(model.config).eval()
        logits.load_state_dict(model.state_dict())
        values = logits(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return sum(float(values[place - 1, ids[place]]) for place in range(first, len(ids)))


@pytest.mark.parametrize(("append_eos", "batch_size"), [(True, 3), (False, 64)])
def test_a_score_is_that_of_the_tokens_after_the_label(parts, append_eos: bool, batch_size: int) -> None:
    model, tokenizer = parts
    text_format = TextFormat("{label}: {text}", append_eos, 100, LABELS)
    scores = label_scores(TextModel(model, tokenizer, text_format), TEXTS, RUNTIME, batch_size)
    assert scores.shape == (len(TEXTS), len(LABELS))
    end = [tokenizer.eos_token_id] * append_eos
    for row, text in enumerate(TEXTS):
        for column, label in enumerate(LABELS):
            prefix, rest = tokenizer(f"{label}:")["input_ids"], tokenizer(f" {text}")["input_ids"]
            blank = parts[1].convert_ids_to_tokens(rest)[0] == "Ġ"  # a token that holds nothing of the text
            expected = log_probability(model, prefix + rest + end, len(prefix) + blank)
            assert scores[row, column] == pytest.approx(expected, rel=1e-5)


def test_a_label_after_the_text_is_scored_itself(parts) -> None:
    model, tokenizer = parts
    text_format = TextFormat("{text} => {label}", True, 100, LABELS)
    scores = label_scores(TextModel(model, tokenizer, text_format), TEXTS[:2], RUNTIME, 8)
    prefix, rest = tokenizer(f"{TEXTS[1]} =>")["input_ids"], tokenizer(" sadness")["input_ids"]
    expected = log_probability(model, prefix + rest + [tokenizer.eos_token_id], len(prefix))
    assert scores[1, 1] == pytest.approx(expected, rel=1e-5)


def test_a_long_label_does_not_spare_its_text_the_last_words(parts) -> None:
    """Cut to 20 tokens: under each label the same tokens of the text are left."""
    text_format = TextFormat("{label}: {text}", True, 20, LABELS)
    rows = conditioned_rows(parts[1], text_format, TEXTS)
    assert max(map(len, rows["input_ids"])) == 20
    scored = [ids[first:] for ids, first in zip(rows["input_ids"], rows["first_target"], strict=True)]
    assert len(set(rows["first_target"])) > 1
    for place in range(0, len(scored), len(LABELS)):
        assert all(each == scored[place] for each in scored[place : place + len(LABELS)])
    ends = [ids[-1] == parts[1].eos_token_id for ids in scored]
    assert any(ends) and not all(ends)


def test_a_label_after_a_long_text_is_scored_whole(parts) -> None:
    """Of the text, which is too long, the beginning is left out; the label and end-of-text stand as they are."""
    model, tokenizer = parts
    text_format = TextFormat("{text} => {label}", True, 16, LABELS)
    rows = conditioned_rows(tokenizer, text_format, TEXTS)
    assert max(map(len, rows["input_ids"])) == 16
    for ids, first, label in zip(rows["input_ids"], rows["first_target"], LABELS * len(TEXTS), strict=True):
        assert tokenizer.decode(ids[first:]).strip() == f"{label}<|endoftext|>"
    scores = label_scores(TextModel(model, tokenizer, text_format), TEXTS, RUNTIME, 8)
    ids, first = rows[1]["input_ids"], rows[1]["first_target"]
    assert scores[0, 1] == pytest.approx(log_probability(model, ids, first), rel=1e-5)


def test_a_template_that_glues_label_and_text(parts) -> None:
    """A token that holds the end of the label and the beginning of the text counts."""
    rows = conditioned_rows(parts[1], TextFormat("{label}{text}", True, 50, ["i f", "i"]), ["eel happy"])
    glued = [parts[1].convert_ids_to_tokens(ids) for ids in rows["input_ids"]]
    assert glued[0][: rows["first_target"][0] + 1][-1].startswith("Ġfe"), "the tokenizer was meant to merge them"
    assert rows["first_target"] == [1, 1]


@pytest.mark.parametrize("collate", [pack, pad])
def test_a_batch_has_the_targets_that_its_rows_name(collate) -> None:
    rows = [{"input_ids": [1, 2, 3, 4], "first_target": 2}, {"input_ids": [5, 6]}, {"input_ids": [7]}]
    batch = collate(rows, pad_id=0, multiple=8)
    assert batch.target_tokens == 3
    targets = shift_labels(batch.labels)
    assert targets.flatten()[batch.predicting].tolist() == [3, 4, 6, *[IGNORED] * 5]
    assert sorted(targets[targets != IGNORED].tolist()) == [3, 4, 6]
    assert batch.aligned_share(targets.flatten()[batch.predicting], batch.predicting) == 1


def test_accuracy_and_f1_are_scikit_learns() -> None:
    random = np.random.default_rng(0)
    labels = [str(number) for number in range(6)]
    true = random.choice(5, 400, p=[0.5, 0.3, 0.1, 0.05, 0.05])  # the sixth never occurs, in truth or prediction
    predicted = np.where(random.random(400) < 0.7, true, random.integers(5, size=400))
    result = compare(labels, true, predicted)
    assert result.accuracy == pytest.approx(accuracy_score(true, predicted))
    assert result.macro_f1 == pytest.approx(f1_score(true, predicted, average="macro"))
    assert result.confusion.tolist() == confusion_matrix(true, predicted, labels=range(6)).tolist()
    low, high = result.accuracy_interval
    error = 1.96 * (result.accuracy * (1 - result.accuracy) / 400) ** 0.5
    assert (low, high) == pytest.approx((result.accuracy - error, result.accuracy + error), abs=0.01)
    low, high = result.macro_f1_interval
    assert low < result.macro_f1 < high
    assert result.table().splitlines()[1].split() == ["0", *map(str, result.confusion[0])]


def test_a_prior_can_decide(parts) -> None:
    model, tokenizer = parts
    text_format = TextFormat("{label}: {text}", True, 100, ["joy", "anger"])
    rows = Dataset.from_dict({"text": TEXTS, "label": ["joy", "anger"] * 5})
    plain = classify(TextModel(model, tokenizer, text_format), rows, RUNTIME, 8)
    assert plain.confusion.sum() == 10
    sure = classify(TextModel(model, tokenizer, text_format), rows, RUNTIME, 8, prior=np.array([0.0, -1e9]))
    assert sure.confusion[:, 0].tolist() == [5, 5]
    shares = np.exp(log_prior(["joy"] * 7 + ["anger"], text_format))
    assert shares == pytest.approx([0.8, 0.2])


def test_unknown_labels_count_as_wrong(parts, capsys: pytest.CaptureFixture[str]) -> None:
    text_model = TextModel(*parts, TextFormat("{label}: {text}", True, 100, ["joy", "anger"]))
    rows = Dataset.from_dict({"text": TEXTS[:3], "label": ["joy", "envy", "joy"]})
    found = classify(text_model, rows, RUNTIME, 8)
    assert "1 of 3 texts have emotions that the model does not know (envy)" in capsys.readouterr().err
    assert found.labels == ["joy", "anger", "(unknown)"]
    assert found.confusion.sum(1).tolist() == [2, 0, 1]
    assert found.accuracy == found.confusion[0, 0] / 3
    figures = found.figures()
    assert (figures["classified"], figures["unknown_emotions"]) == (3, 1)
    known = classify(text_model, rows.select([0, 2]), RUNTIME, 8).figures()
    assert "unknown_emotions" not in known
    assert known["emotion_accuracy"] == pytest.approx(1.5 * figures["emotion_accuracy"])
    assert classify(text_model, rows.select([1]), RUNTIME, 8) is None
    assert "none of the texts' emotions" in capsys.readouterr().err


def test_with_and_without_what_train_holds_too() -> None:
    true, predicted = np.array([0, 0, 1, 1]), np.array([0, 1, 1, 1])
    figures = compare(["joy", "fear"], true, predicted, in_train=np.array([True, False, False, True])).figures()
    assert (figures["emotion_accuracy"], figures["classified"]) == (0.75, 4)
    assert (figures["emotion_accuracy_without_overlap"], figures["classified_without_overlap"]) == (0.5, 2)
    assert "macro_f1_without_overlap_interval" in figures
    assert "emotion_accuracy_without_overlap" not in compare(["joy", "fear"], true, predicted).figures()


def test_the_overlap_is_that_of_the_texts_that_are_classified(parts) -> None:
    rows = Dataset.from_dict({"text": TEXTS[:3], "label": ["envy", "joy", "joy"], "in_train": [True, True, False]})
    text_format = TextFormat("{label}: {text}", True, 100, ["joy", "anger"])
    figures = classify(TextModel(*parts, text_format), rows, RUNTIME, 8).figures()
    assert (figures["classified"], figures["classified_without_overlap"]) == (3, 1)


def test_what_is_not_classified_says_why(parts, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = parts
    rows = Dataset.from_dict({"text": TEXTS[:1], "label": ["joy"]})
    many = TextFormat("{label}: {text}", True, 100, ["joy", *map(str, range(100))])
    assert classify(TextModel(model, tokenizer, many), rows, RUNTIME, 8) is None
    assert "101 labels" in capsys.readouterr().err
    single = TextFormat("{label}: {text}", True, 100, ["joy"])
    assert classify(TextModel(model, tokenizer, single), rows, RUNTIME, 8) is None
    assert "one emotion, joy: there is nothing to tell apart" in capsys.readouterr().err
    broken = GPT2LMHeadModel(model.config).eval()
    use_packed_attention(broken)
    broken.transformer.ln_f.weight.data[0] = np.nan
    text_format = TextFormat("{label}: {text}", True, 100, ["joy", "anger"])
    assert classify(TextModel(broken, tokenizer, text_format), rows, RUNTIME, 8) is None
    assert "NaN" in capsys.readouterr().err


def test_many_labels_take_no_more_memory_than_few() -> None:
    """A resample of 400 labels counts 160,000 cells: a thousand of them at once would be gigabytes."""
    random = np.random.default_rng(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = compare([str(n) for n in range(400)], random.integers(400, size=100), random.integers(400, size=100))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024 < 500, "MB"
    assert 0 <= result.accuracy < 0.1
