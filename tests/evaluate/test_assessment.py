"""`python -m emoft.evaluate` in real processes."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import SENTENCES, Result, WarmScripts
from PIL import Image
from test_train import flags

from emoft.evaluate.judge import mauve_is_available

EMOTIONS = sorted({label for _, label in SENTENCES})


@pytest.fixture(scope="module")
def trained(scripts: WarmScripts, tmp_path_factory, tiny_model, train_file, validation_file) -> Path:
    """A model with a template that names the emotion."""
    folder = tmp_path_factory.mktemp("assessed")
    words = flags(
        tiny_model,
        train_file,
        validation_file=validation_file,
        template="{label}: {text}",
        max_steps=12,
    )
    result = scripts("train.py", *words, "--test_file", validation_file, cwd=folder)
    assert result.code == 0, result.err
    return folder / "run"


@pytest.fixture
def evaluate(run: Callable[..., Result], trained: Path) -> Callable[..., Result]:
    def evaluate_with(*words: object) -> Result:
        return run("-m", "emoft.evaluate", "--model_name_or_path", trained, "--delimiter=;", *words)

    return evaluate_with


def test_its_figures_are_those_of_the_training(evaluate, trained, validation_file, train_file) -> None:
    result = evaluate("--test_file", validation_file, "--train_file", train_file, "--json")
    assert result.code == 0, result.err
    (line,) = result.out.splitlines()
    figures = json.loads(line)
    results = json.loads((trained / "all_results.json").read_text())
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert figures[name] == pytest.approx(results[f"test_{name}"], rel=1e-6)
        assert figures[f"{name}_interval"] == pytest.approx(results[f"test_{name}_interval"], rel=1e-6)
    for name in ("emotion_accuracy", "macro_f1"):
        assert figures[name] == results[name] == results[f"test_{name}"]
        low, high = figures[f"{name}_interval"]
        assert low <= figures[name] <= high
    assert figures["examples"] == len(SENTENCES)
    assert figures["bytes"] > sum(len(text) for text, _ in SENTENCES)
    matrix = figures["confusion_matrix"]
    assert matrix["labels"] == EMOTIONS
    assert sum(map(sum, matrix["counts"])) == len(SENTENCES)


def test_tables_and_files(evaluate, tmp_path, validation_file, train_file) -> None:
    result = evaluate(
        "--test_file",
        validation_file,
        "--train_file",
        train_file,
        "--generate",
        4,
        "--output_dir",
        "out",
        "--use_class_prior",
    )
    assert result.code == 0, result.err
    assert "perplexity" in result.out and "true \\ predicted" in result.out and "recognized_by_tfidf" in result.out
    figures = json.loads((tmp_path / "out/evaluation.json").read_text())
    assert set(figures["generation"]) == {*EMOTIONS, "all"}
    assert 0 <= figures["generation"]["all"]["copied"] <= 1
    assert figures["tfidf_emotion_accuracy"] > 0.5
    samples = [json.loads(line) for line in (tmp_path / "out/samples.jsonl").read_text().splitlines()]
    assert [row["emotion"] for row in samples] == [label for label in EMOTIONS for _ in range(4)]
    assert Image.open(tmp_path / "out/confusion.png").size[0] > 300


def test_what_train_holds_too_is_left_out_once(evaluate, tmp_path, train_file) -> None:
    lines = train_file.read_text().splitlines()
    (tmp_path / "test.txt").write_text("\n".join([*lines[:2], "quite another text;joy", "and one more;fear"]))
    figures = json.loads(evaluate("--test_file=test.txt", "--train_file", train_file, "--json").out)
    assert figures["overlap"] == 2
    (tmp_path / "others.txt").write_text("quite another text;joy\nand one more;fear\n")
    others = json.loads(evaluate("--test_file=others.txt", "--json").out)
    assert figures["loss_without_overlap"] == pytest.approx(others["loss"], rel=1e-6)


def test_another_model_judges_what_this_one_writes(evaluate, tiny_model, validation_file, train_file) -> None:
    words = ("--test_file", validation_file, "--train_file", train_file, "--generate", 2, "--judge_model", tiny_model)
    result = evaluate(*words, "--json")
    assert result.code == 0, result.err
    assert ("no MAUVE without the package mauve-text" in result.err) != mauve_is_available()
    figures = json.loads(result.out)
    for found in (figures["generation"]["all"], figures["people"]):
        for name in ("judge_perplexity", "judge_bits_per_byte", "recognized_by_letters"):
            low, high = found[f"{name}_interval"]
            assert low <= found[name] <= high
    assert figures["letters_emotion_accuracy"] > 0.5
    table = evaluate(*words).out
    assert "judge_perplexity" in table and "people" in table


def test_without_a_train_split_it_says_what_it_cannot_tell(evaluate, validation_file) -> None:
    result = evaluate("--test_file", validation_file, "--generate", 1, "--json")
    assert result.code == 0, result.err
    assert "give --train_file" in result.err
    everything = json.loads(result.out)["generation"]["all"]
    assert "copied" not in everything and "recognized_by_tfidf" not in everything


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["a text;joy", "another text;anger", "a blue one;blue"], ""),  # a label that the model does not know
        (["a text;joy", "another text;joy"], "cannot be fitted"),
        (["a;joy", "b;anger"], "cannot be fitted"),  # no word of two letters
    ],
    ids=range(3),
)
def test_train_data_that_the_independent_classifier_cannot_learn(
    evaluate, tmp_path, validation_file, lines, told
) -> None:
    (tmp_path / "train.txt").write_text("\n".join(lines) + "\n")
    result = evaluate("--test_file", validation_file, "--train_file=train.txt", "--generate=1", "--json")
    assert result.code == 0, result.err
    assert told in result.err
    assert ("tfidf_emotion_accuracy" in json.loads(result.out)) == (not told)


def test_a_data_set_in_a_folder(evaluate, tmp_path) -> None:
    for split in ("train", "test"):
        rows = "".join(f"{split} {text},{label}\n" for text, label in SENTENCES)
        (tmp_path / f"data/{split}.csv").parent.mkdir(exist_ok=True)
        (tmp_path / f"data/{split}.csv").write_text("text,label\n" + rows)
    result = evaluate("--dataset_name=./data", "--split=test", "--json", "--use_class_prior")
    assert result.code == 0, result.err
    assert json.loads(result.out)["examples"] == len(SENTENCES)
    refused = evaluate("--dataset_name=./data", "--split=nowhere")
    assert refused.code == 2
    assert "no split nowhere" in refused.error_lines[-1]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--test_file=nowhere.txt"], ["--test_file nowhere.txt", "check the path"]),
        (["--test_file=test.txt", "--use_class_prior"], ["--use_class_prior", "--train_file"]),
        (["--test_file=test.txt", "--template={text}", "--generate=2"], ["--generate 2", "{label}"]),
        (["--test_file=test.txt", "--max_length=200"], ["--max_length 200", "128 positions"]),
        (["--test_file=test.txt", "--output_dir=test.txt"], ["--output_dir test.txt"]),
        (["--test_file=test.txt", "--generate=-1"], ["--generate -1"]),
        (["--model_name_or_path=bare", "--test_file=test.txt"], ["emoft.json", "--template"]),
        (["--model_name_or_path=nowhere", "--test_file=test.txt"], ["nowhere: no such folder", "name a local folder"]),
        (["--test_file=test.txt", "--template={text} ({label})", "--generate=2"], ["--generate 2", "before {text}"]),
        (["--test_file=test.txt", "--judge_model=bare"], ["--judge_model bare", "--generate N"]),
        (["--test_file=test.txt", "--judge_model=./nowhere", "--generate=2"], ["--judge_model ./nowhere: no such"]),
        (["--test_file=test.txt", "--judge_model=empty", "--generate=2"], ["--judge_model empty"]),
        (["--test_file=plain.csv", "--delimiter=,"], ["no column 'label'", "--template without {label}"]),
    ],
    ids=range(13),
)
def test_errors_take_one_line(evaluate, tmp_path, tiny_model, words: list[str], parts: list[str]) -> None:
    (tmp_path / "test.txt").write_text("a text;joy\n")
    (tmp_path / "plain.csv").write_text("text\na text\n")
    (tmp_path / "bare").symlink_to(tiny_model)
    (tmp_path / "empty").mkdir()
    result = evaluate(*words)
    assert result.code == 2
    (line,) = result.error_lines
    assert line.startswith("emoft.evaluate: error: ")
    assert all(part in line for part in parts), line
