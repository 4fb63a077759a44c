import json
import random

import numpy as np
import pytest
from conftest import read_scalars
from datasets import Dataset
from test_train import flags

from emoft.data.duplicates import IN_TRAIN, find_matches, mark_duplicates, overlap
from emoft.data.similarity import SIMILARITY
from emoft.data.words import runs, words
from emoft.errors import UserError

LONG = "i feel as though the rain would never stop and all my friends had gone away"


def test_words() -> None:
    assert words("I DIDN’T say: “no”, did I? ﬁne") == ["i", "didnt", "say", "no", "did", "i", "fine"]
    assert words("  ") == []
    assert (words(" :) "), words(":( :("), words("no :(")) == ([":)"], [":(", ":("], ["no"]), (
        "signs, where nothing else is"
    )
    assert words("ខ្ញុំសប្បាយ ចិត្ត") == ["ខ្ញុំសប្បាយ", "ចិត្ត"]
    assert runs(["a", "b", "c"], 2) == ["a b", "b c"]
    assert runs(["a"], 2) == []


def test_exact_and_near_duplicates() -> None:
    train = [LONG, "we laughed", LONG.upper() + "!", LONG.replace("friends", "dogs"), "we  laughed.", "we cried"]
    found = find_matches(train, [["We laughed", LONG + " again today", "something else", "we cry"]])
    in_train, (in_other,) = found.in_train, found.of_others
    assert in_train.exact.tolist() == [False, False, True, False, True, False]
    assert in_train.near.tolist() == [False, False, False, True, False, False]
    assert in_other.exact.tolist() == [True, False, False, False]
    assert in_other.near.tolist() == [False, True, False, False]


def test_no_pair_is_missed_nor_invented() -> None:
    """Against every pair compared with every other, over texts of few words, which are often similar."""
    chance = random.Random(0)
    texts = [" ".join(chance.choices("abc", k=chance.randint(1, 14))) for _ in range(300)]
    found = find_matches(texts[:200], [texts[200:]])
    in_train, (in_other,) = found.in_train, found.of_others
    sets = [set(runs(text.split(), 3) or [text]) for text in texts]

    def similar(first: int, second: int) -> bool:
        shared = len(sets[first] & sets[second])
        return shared >= SIMILARITY * len(sets[first] | sets[second])

    for number in range(300):
        earlier = range(min(number, 200))
        exact = any(texts[number] == texts[other] for other in earlier)
        near = not exact and any(similar(number, other) for other in earlier)
        found = (in_train, number) if number < 200 else (in_other, number - 200)
        assert found[0].exact[found[1]] == exact, texts[number]
        assert found[0].near[found[1]] == near, texts[number]
    assert in_train.near.sum() > 10 and in_other.near.sum() > 5


def test_dropping_leaves_no_copy_and_no_overlap(capsys: pytest.CaptureFixture[str]) -> None:
    splits = {
        "train": Dataset.from_dict({"text": ["a b c d", LONG, LONG, "x y z", LONG.replace("friends", "dogs")]}),
        "validation": Dataset.from_dict({"text": ["X, y, z!", "new words here"]}),
    }
    kept, found = mark_duplicates(splits, advice="; drop them")
    assert found == "duplicates: 1 exact and 1 near in train, 1 and 0 of validation in train; drop them"
    assert len(kept["train"]) == 5
    assert overlap(kept["validation"]).tolist() == [True, False]
    dropped, found = mark_duplicates(splits, drop=True)
    assert found.endswith("dropped 3 of 5 from train")
    assert dropped["train"]["text"][:] == ["a b c d", LONG]
    assert not any(dropped["validation"][IN_TRAIN])
    found = find_matches(dropped["train"]["text"], [dropped["validation"]["text"]])
    assert not found.in_train.any.any() and not found.of_others[0].any.any()
    again, found = mark_duplicates({"train": dropped["train"]}, drop=True)
    assert again["train"]["text"][:] == ["a b c d", LONG]
    assert found == "", "nothing to tell"


def test_something_must_be_left_to_train_on() -> None:
    texts = Dataset.from_dict({"text": ["a b c d", LONG]})
    with pytest.raises(UserError, match="nothing of the 2 texts"):
        mark_duplicates({"train": texts, "validation": texts}, drop=True)


def test_a_run_states_its_evaluation_with_and_without_them(run, tiny_model, tmp_path, train_file) -> None:
    train_lines = train_file.read_text().splitlines()
    (tmp_path / "other.txt").write_text("\n".join([*train_lines[:3], "a new text;joy", "one more of them;fear"]))
    words = flags(tiny_model, train_file, validation_file="other.txt", max_steps=2, template="{label}: {text}")
    result = run("train.py", *words)
    assert result.code == 0, result.err
    assert "3 and 0 of validation in train" in result.out
    results = json.loads((tmp_path / "run/all_results.json").read_text())
    assert results["eval_overlap"] == 3
    assert results["eval_loss_without_overlap"] != results["eval_loss"]
    low, high = results["eval_loss_without_overlap_interval"]
    assert low <= results["eval_loss_without_overlap"] <= high
    assert results["emotion_accuracy_interval"][0] <= results["emotion_accuracy"] <= 1
    assert "eval_loss_without_overlap" in result.out
    curves = read_scalars(tmp_path / "run")
    before, after = (pytest.approx(results[name]) for name in ("emotion_accuracy_before", "emotion_accuracy"))
    assert curves["eval/emotion_accuracy"] == {0: before, 2: after}
    assert curves["eval/overlap"] == {step: pytest.approx(3 / 5) for step in (0, 2)}, "a share, as the curve says"
    assert 0 <= results["emotion_accuracy_without_overlap"] <= 1
    assert results["macro_f1_before_interval"][0] <= results["macro_f1_before"]
    assert curves["eval/loss"][0] == pytest.approx(results["eval_loss_before"])
    assert curves["eval/bits_per_byte"][2] == pytest.approx(results["bits_per_byte"])
    assert curves["eval/loss_without_overlap"][2] == pytest.approx(results["eval_loss_without_overlap"])
    resumed = run("train.py", *words, "--resume_from_checkpoint=latest", "--drop_duplicates")
    assert resumed.code == 2
    assert "--drop_duplicates False, not True" in resumed.error_lines[-1]
    dropped = run("train.py", *words, "--drop_duplicates", "--output_dir=dropped")
    assert dropped.code == 0, dropped.err
    results = json.loads((tmp_path / "dropped/all_results.json").read_text())
    assert results["eval_overlap"] == 0
    assert np.isfinite(results["macro_f1"])


def test_a_second_look_is_taken_from_the_cache(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("emoft.data.duplicates.cache_dir", lambda: str(tmp_path))
    splits = {
        "train": Dataset.from_dict({"text": [LONG, LONG, "x y z"]}),
        "test": Dataset.from_dict({"text": ["x y z", "new words here"]}),
    }
    kept, found = mark_duplicates(splits, drop=True)
    monkeypatch.setattr("emoft.data.duplicates.words", lambda text: pytest.fail("looked again"))
    again, found_again = mark_duplicates(splits, drop=True)
    assert found_again == found != ""
    assert again["train"]["text"][:] == kept["train"]["text"][:] == [LONG]
    (file,) = tmp_path.glob("emoft-duplicates-*.npz")
    file.write_bytes(file.read_bytes()[:40])
    monkeypatch.undo()
    monkeypatch.setattr("emoft.data.duplicates.cache_dir", lambda: str(tmp_path))
    assert mark_duplicates(splits, drop=True)[1] == found, "one that is damaged is made again"
