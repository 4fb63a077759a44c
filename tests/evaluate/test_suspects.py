"""Labels that may be wrong: planted ones are found, and counted as cleanlab counts them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from cleanlab.count import compute_confident_joint, estimate_joint
from conftest import ROOT, Result

from emoft.evaluate import suspects
from emoft.evaluate.suspects import confident_joint, cross_fitted, find_suspects, noise

SAMPLE = ROOT / "emoft" / "sample" / "train.csv"
Sample = tuple[list[str], list[str], list[str]]


@pytest.fixture(scope="module")
def sample() -> Sample:
    with SAMPLE.open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    labels = [row["label"] for row in rows]
    return [row["text"] for row in rows], labels, sorted(set(labels))


def flipped(sample: Sample, seed: int) -> tuple[list[str], set[int]]:
    """The labels with 5 % of them changed to another one, and the rows of those."""
    _, labels, names = sample
    random = np.random.default_rng(seed)
    wrong = set(random.choice(len(labels), len(labels) // 20, replace=False).tolist())
    return [
        str(random.choice([name for name in names if name != label])) if row in wrong else label
        for row, label in enumerate(labels)
    ], wrong


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_flipped_labels_stand_first(sample: Sample, seed: int) -> None:
    texts, _, names = sample
    labels, wrong = flipped(sample, seed)
    chances = cross_fitted(texts, labels, names, seed)
    found = find_suspects(texts, labels, names, chances, len(wrong), "")
    hits = sum(each.row in wrong for each in found.suspects)
    print(f"seed {seed}: {hits} of {len(wrong)} flipped labels among as many suspects; noise {found.noise:.3f}")
    assert hits / len(wrong) > 0.85  # precision and recall, which are the same here
    assert all(each.label == labels[each.row] != each.suggested_label for each in found.suspects)
    assert found.noise_interval[0] < found.noise < found.noise_interval[1]
    assert found.noise == pytest.approx(0.05, abs=0.025)
    assert found.figures()["best_accuracy"] == 1 - found.noise


def test_the_joint_is_cleanlabs(sample: Sample) -> None:
    texts, _, names = sample
    labels, _ = flipped(sample, 3)
    given = np.array([names.index(label) for label in labels])
    chances = cross_fitted(texts, labels, names, 3)
    counts = compute_confident_joint(given, chances, calibrate=False)
    oracle = estimate_joint(given, chances, confident_joint=counts)  # which rounds to whole rows
    assert np.allclose(confident_joint(given, chances), oracle, rtol=0, atol=1.01 / len(given))


def test_clean_labels_are_hardly_doubted(sample: Sample) -> None:
    texts, labels, names = sample
    given = np.array([names.index(label) for label in labels])
    assert noise(given, cross_fitted(texts, labels, names, 0))[0] < 0.01


def test_no_model_has_seen_the_text_or_a_copy_of_it() -> None:
    """The same text under both labels: had a model seen one copy, it would know the other's label."""
    texts = [f"word{n} thing{n % 3}" for n in range(40)]
    labels = ["a" if n % 2 else "b" for n in range(40)]
    chances = cross_fitted([*texts, *(text.upper() for text in texts)], labels * 2, ["a", "b"], 0)
    told = chances.argmax(1) == np.array([["a", "b"].index(label) for label in labels * 2])
    assert told.mean() < 0.75


def test_the_command_writes_what_train_file_takes_back(
    run: Callable[..., Result], sample: Sample, tmp_path: Path
) -> None:
    texts, _, _ = sample
    labels, wrong = flipped(sample, 0)
    with (tmp_path / "flipped.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text", "label"], *zip(texts[:600], labels[:600], strict=True)])
    model = ["--config=demo", "--config_overrides=n_layer=1,n_embd=16,n_head=2,n_positions=64", "--max_steps=2"]
    assert run("train.py", *model, "--validation_file=", "--output_dir=model").code == 0
    words = ["--model_name_or_path=model", "--test_file=flipped.csv", "--max_eval_samples=40", "--suspects=30"]
    result = run("-m", "emoft.evaluate", *words, "--train_file=flipped.csv", "--output_dir=out", "--json")
    assert result.code == 0, result.err
    found = json.loads(result.out)
    assert len(found["suspects"]) == 30 and found["label_noise_interval"][0] <= found["label_noise"]
    assert sum(each["row"] in wrong for each in found["suspects"]) > 15
    assert found["suspects"][0]["nearest_text"]
    with (tmp_path / "out" / "suspects.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["row"]) for row in rows[:30]] == [each["row"] for each in found["suspects"]]
    assert sorted((row["text"], row["label"]) for row in rows) == sorted(zip(texts[:600], labels[:600], strict=True))
    again = run("train.py", *model, "--train_file=out/suspects.csv", "--validation_file=", "--output_dir=again")
    assert again.code == 0 and "600 examples" in again.out
    # Without a train split the model judges the texts themselves.
    alone = run("-m", "emoft.evaluate", *words)
    assert alone.code == 0 and "labels judged by the model itself" in alone.out


def test_what_has_no_labels_is_refused(run: Callable[..., Result], tiny_model: Path, train_file: Path) -> None:
    words = ["--model_name_or_path", tiny_model, "--template={text}", "--test_file", train_file, "--max_length=16"]
    result = run("-m", "emoft.evaluate", *words, "--suspects=3")
    assert result.code == 2 and "--suspects judges labels" in result.err


def test_the_nearest_text_is_another_one(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["i feel sad today", "the sun is warm", "i feel sad again", "zebra", "warm sun"]
    expected = [2, 4, 0, None, 1]
    assert suspects._nearest(texts, np.arange(5)) == expected
    monkeypatch.setattr(suspects, "AT_ONCE", 2)
    assert suspects._nearest(texts, np.arange(5)) == expected
