"""Another language model as judge, against the evaluation of a split and against the library's own hidden states."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset

from emoft.data.template import TextFormat
from emoft.data.tokenized import tokenize
from emoft.data.tokens import encode_whole
from emoft.distributed.world import World
from emoft.errors import UserError
from emoft.evaluate.judge import FEWEST, LanguageJudge, load_judge, mauve, mauve_beside_people, mauve_is_available
from emoft.evaluate.saved import load_text_model
from emoft.evaluate.scoring import evaluate, summarize
from emoft.model.loading import TextModel
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime

RUNTIME = Runtime(World(), Precision("no", torch.device("cpu")))
TEXTS = [text for text, _ in SENTENCES]
needs_mauve = pytest.mark.skipif(not mauve_is_available(), reason="the package mauve-text is not installed")


@pytest.fixture(scope="module")
def judge(tiny_model) -> LanguageJudge:
    text_format = TextFormat("Emotion: {text}", max_length=20)
    return LanguageJudge(load_text_model(str(tiny_model), "main", text_format, RUNTIME.device), RUNTIME, 4)


def test_its_figures_are_those_of_an_evaluation(judge: LanguageJudge) -> None:
    found = summarize(judge.score(TEXTS, [True] * len(TEXTS)))
    model = judge.text_model
    rows = tokenize(Dataset.from_dict({"text": TEXTS}), model.tokenizer, model.text_format, "test")
    expected = evaluate(model, rows, RUNTIME, 3)
    assert expected and found.tokens == expected.tokens and found.text_bytes == expected.text_bytes
    for name, value in expected.figures().items():
        assert found.figures()[name] == pytest.approx(value, rel=1e-6), name


def test_only_what_ended_is_judged_for_its_end(judge: LanguageJudge) -> None:
    tokenizer, text_format = judge.text_model.tokenizer, judge.text_model.text_format
    (whole,) = encode_whole(tokenizer, ["Emotion: so"], text_format)
    assert whole[-1] == tokenizer.eos_token_id
    assert judge.rows(["so", "so", "so " * 50], [True, False, True])[:2] == [whole, whole[:-1]]
    assert len(judge.rows(["so " * 50], [True])[0]) == 20
    assert judge.score(["so", "so"], [True, False]).tokens.tolist() == [len(whole) - 1, len(whole) - 2]


def test_an_empty_text_has_nothing_to_predict(judge: LanguageJudge) -> None:
    same = judge.text_model
    bare = LanguageJudge(TextModel(same.model, same.tokenizer, TextFormat("{text}")), RUNTIME, 4)
    scores = bare.score(["", "we laughed"], [False, True])
    assert scores.tokens[0] == 0 and scores.nats[0] == 0 and scores.tokens[1] > 1
    assert bare.features(["", "we laughed"]).shape[0] == 2


def test_features_are_the_last_hidden_state_of_the_last_token(judge: LanguageJudge) -> None:
    features = judge.features(TEXTS)
    model = judge.text_model.model
    for text, found in zip(TEXTS, features, strict=True):
        (ids,) = judge.rows([text], [False])
        with torch.no_grad():
            hidden = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
        assert np.allclose(found, hidden[0, -1].numpy(), atol=1e-5)


def test_a_judge_is_not_told_the_emotion(tiny_model, tmp_path) -> None:
    for path in Path(tiny_model).iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert load_judge(str(tmp_path), RUNTIME, 4).text_model.text_format.template == "{text}"
    TextFormat("{label}: {text}", labels=["joy"]).save(tmp_path)
    with pytest.raises(UserError, match=r"--judge_model .* has the template '{label}: {text}'"):
        load_judge(str(tmp_path), RUNTIME, 4)
    TextFormat("so: {text}", max_length=9).save(tmp_path)
    assert load_judge(str(tmp_path), RUNTIME, 4).text_model.text_format.max_length == 9


@needs_mauve
def test_mauve_is_high_for_texts_of_one_kind(capfd: pytest.CaptureFixture[str]) -> None:
    random = np.random.default_rng(0)
    same, other = random.normal(size=(2, 200, 8)), random.normal(size=(200, 8)) + 2
    assert mauve(same[0], same[1]) > 0.8 > 0.2 > mauve(same[0], other)
    assert capfd.readouterr().err == ""


@needs_mauve
def test_mauve_compares_as_many_texts_of_each_emotion(judge: LanguageJudge) -> None:
    class Counting(LanguageJudge):
        seen: list[list[str]] = []

        def features(self, texts) -> np.ndarray:
            self.seen.append(list(texts))
            return super().features(texts)

    counting = Counting(judge.text_model, RUNTIME, 64)
    human = {"joy": [f"we laughed {n} times" for n in range(81)], "fear": ["the dark street", "no way home"]}
    written = {"joy": [f"i cried {n} times" for n in range(60)], "fear": ["what now"] * 9, "love": ["my dear"]}
    pair = mauve_beside_people(counting, written, human)
    own, first, second = counting.seen
    assert [len(own), len(first), len(second)] == [41] * 3 and own[-1] == "what now"
    assert (first[0], second[0], first[-1], second[-1]) == (
        "we laughed 0 times",
        "we laughed 1 times",
        "the dark street",
        "no way home",
    )
    assert pair is not None and all(0 <= value <= 1 + 1e-9 for value in pair)


def test_of_few_texts_mauve_says_nothing(judge: LanguageJudge) -> None:
    few = [f"text {n}" for n in range(FEWEST - 1)]
    assert mauve_beside_people(judge, {"joy": few}, {"joy": few * 2}) is None
