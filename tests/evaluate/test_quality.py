import math

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.template import TextFormat
from emoft.distributed.world import World
from emoft.evaluate.independent import IndependentClassifier
from emoft.evaluate.judge import LanguageJudge
from emoft.evaluate.quality import (
    Judges,
    TrainingTexts,
    assess,
    distinct,
    format_quality,
    people,
    sample,
    self_bleu,
    self_repetition,
)
from emoft.model.attention import use_packed_attention
from emoft.model.generation import Generated
from emoft.model.loading import TextModel
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime

RUNTIME = Runtime(World(), Precision("no", torch.device("cpu")))
TRAIN = ["I walked along the river until the sun went down, alone.", "we laughed"]


def test_a_run_of_eight_words_is_a_copy() -> None:
    training = TrainingTexts(TRAIN)
    assert training.share_a_run("yes, along the river UNTIL the sun went down")
    assert not training.share_a_run("along the river until the sun went")  # seven
    assert not training.share_a_run("along the river until the moon went down alone")
    assert not training.share_a_run("down alone we laughed i walked along the river")  # of two texts
    assert training.hold("We laughed!")
    assert not training.hold("we laughed a lot")


def test_no_copy_is_missed() -> None:
    """Against a search for each run in each text."""
    random = np.random.default_rng(0)
    texts = [" ".join(random.choice(list("ab"), 20)) for _ in range(20)]
    training = TrainingTexts(texts)
    found = 0
    for _ in range(200):
        text = " ".join(random.choice(list("ab"), 12))
        parts = [text.split()[start : start + 8] for start in range(5)]
        copied = any(f" {' '.join(part)} " in f" {each} " for part in parts for each in texts)
        assert training.share_a_run(text) == copied
        found += copied
    assert 0 < found < 200


def test_variety_by_hand() -> None:
    assert distinct(["a b a", "b a"], 1) == 2 / 5
    assert distinct(["a b a", "b a"], 2) == 2 / 5  # "a b" and "b a"
    assert distinct(["a b a", "b a"], 3) == 1 / 5
    assert distinct([""], 1) == 0
    assert self_repetition("a b c d a b c d") == 1 - 4 / 5
    assert self_repetition("a b c d e") == 0
    assert math.isnan(self_repetition("a b c"))


@pytest.fixture(scope="module")
def parts(tiny_model) -> tuple[GPT2LMHeadModel, GPT2Tokenizer]:
    model = GPT2LMHeadModel.from_pretrained(tiny_model).eval()
    use_packed_attention(model)
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def test_figures_of_known_texts(parts) -> None:
    text_format = TextFormat("{label}: {text}", max_length=60, labels=["fear", "joy"])
    texts, labels = zip(*[row for row in SENTENCES * 3 if row[1] in ("joy", "fear")], strict=True)
    samples = {
        "joy": [
            Generated("joy:", "joy: i feel happy because my friends came to visit", 9, True),
            Generated("joy:", "joy: we laughed all evening", 9, True),
        ],
        "fear": [
            Generated("fear:", "fear: i feel happy because my friends came by", 9, False),
            Generated("fear:", "fear: the dark street the dark street the dark street", 9, True),
        ],
    }
    judge = LanguageJudge(TextModel(*parts, TextFormat("{text}")), RUNTIME, 4)
    judges = Judges(TrainingTexts(texts), {"tfidf": IndependentClassifier(texts, labels)}, judge)
    table = assess(TextModel(*parts, text_format), samples, RUNTIME, 4, judges)
    assert (table["joy"]["recognized_by_tfidf"], table["fear"]["recognized_by_tfidf"]) == (1, 0.5)
    assert [table[name]["ended"] for name in ("joy", "fear", "all")] == [1, 0.5, 0.75]
    assert [table[name]["copied"] for name in ("joy", "fear", "all")] == [0.5, 0, 0.25]
    assert table["joy"]["copied_whole"] == 1
    assert table["fear"]["self_repetition"] == pytest.approx((0 + (1 - 3 / 6)) / 2)
    assert table["joy"]["distinct_1"] == 1
    low, high = table["all"]["copied_interval"]
    assert low <= 0.25 <= high
    for label, (first, second) in samples.items():
        scores = judge.score(
            [each.text.removeprefix(f"{label}: ") for each in (first, second)],
            [each.finished for each in (first, second)],
        )
        assert table[label]["judge_perplexity"] == pytest.approx(math.exp(scores.nats.sum() / scores.tokens.sum()))
    low, high = table["all"]["judge_perplexity_interval"]
    assert low <= table["all"]["judge_perplexity"] <= high
    lines = {line.split()[0]: line.split()[1:] for line in format_quality(table).splitlines()}
    assert list(lines)[:2] == ["joy", "texts"] and lines["joy"] == ["fear", "all"]
    assert lines["texts"] == ["2", "2", "4"]
    assert lines["ended"][:3] == ["1.000", "0.500", "0.750"] and lines["ended"][3].startswith("[")


def test_peoples_texts_are_cut_as_the_models(parts) -> None:
    text_model = TextModel(*parts, TextFormat("{label}: {text}", max_length=12, labels=["fear", "joy"]))
    texts = ["so it is", "and on and on and on and on and on and on and on and on", "more", "of others"]
    found = people(text_model, texts, ["joy", "joy", "joy", "blue"], 2)
    (short, long) = found.pop("joy")
    assert found == {}
    assert (short.text, short.finished) == ("joy: so it is", True)
    assert not long.finished and "joy: and on and on".startswith(long.text[:10])
    assert len(parts[1](long.text)["input_ids"]) <= 12 < len(parts[1](f"joy: {texts[1]}")["input_ids"])


def test_samples_are_of_the_emotion_asked_for(parts) -> None:
    text_model = TextModel(*parts, TextFormat("{label}: {text}", max_length=30, labels=["fear", "joy"]))
    samples = sample(text_model, 3, "no", 4, seed=1)
    assert {label: len(texts) for label, texts in samples.items()} == {"fear": 3, "joy": 3}
    assert all(text.text.startswith(f"{label}:") for label, texts in samples.items() for text in texts)
    assert sample(text_model, 3, "no", 4, seed=1) == samples
    assert sample(text_model, 3, "no", 4, seed=2) != samples


def test_the_text_is_taken_out_of_the_template() -> None:
    text_format = TextFormat("{label}: {text} [end]", labels=["joy"])
    assert text_format.extract("joy: so it is [end] and more", "joy") == "so it is"
    assert text_format.extract("joy: so it", "joy") == "so it"
    assert text_format.extract("joy:", "joy") == ""
    assert TextFormat("{text}").extract("any text") == "any text"


def test_self_bleu_is_high_where_texts_repeat_each_other() -> None:
    same, other = ["i feel so happy today"] * 5, ["i feel so happy", "the bus was late again", "nobody called me back"]
    assert self_bleu(same) == pytest.approx(1.0)
    assert self_bleu(other) < 0.3 < self_bleu([*other, "i feel so happy now"])
    assert self_bleu(["alone"]) == 0.0


def test_self_bleu_by_hand() -> None:
    """Of "a b c" against "a b d": 2 of 3 words, then, each smoothed by 1, (1 + 1) / (2 + 1), 1 / 2 and 1 / 1."""
    expected = (2 / 3 * 2 / 3 * 1 / 2 * 1) ** 0.25
    assert self_bleu(["a b c", "a b d"]) == pytest.approx(expected)


def test_self_bleu_takes_texts_of_all_kinds() -> None:
    """Of many texts it takes some at even distances, since they stand in the order of their emotions."""
    texts = [f"a{n} b{n} c{n} d{n}" for n in range(4)] + ["the same as ever"] * 4
    assert self_bleu(texts, most=4) == self_bleu(texts[::2])
