"""From the words of a command line to a configuration, and what is said of those that are not understood."""

from pathlib import Path

import pytest

from emoft.benchmark.config import BenchmarkConfig
from emoft.command_line import parse_config
from emoft.config import EvaluateConfig, GenerateConfig, GradientsConfig, TrainConfig
from emoft.errors import UserError


def said(config_class, *words: str) -> str:
    with pytest.raises(UserError) as error:
        parse_config(config_class, words)
    return str(error.value)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--append_eos"], True),
        (["--append_eos", "true"], True),
        (["--append-eos=yes"], True),
        (["--append_eos=false"], False),
        (["--append_eos", "0"], False),
        (["--no_append_eos"], False),
        (["--no-append-eos"], False),
        (["--no_append_eos", "--append_eos"], True),
        (["--append_eos", "--no_append_eos"], False),
    ],
)
@pytest.mark.parametrize("config_class", [TrainConfig, EvaluateConfig])
def test_what_is_on_or_off(config_class, words: list[str], value: bool) -> None:
    assert parse_config(config_class, words).append_eos is value
    assert parse_config(config_class, []).append_eos is config_class.append_eos


def test_lists() -> None:
    words = ["--column_names", "a", "b c", "--max_steps", "-1", "--column-names", "d"]
    assert parse_config(TrainConfig, words).column_names == ["d"]
    assert parse_config(GenerateConfig, ["--prompt", "a", "b", "--seed", "1", "--prompt=-c"]).prompt == ["a", "b", "-c"]
    assert parse_config(BenchmarkConfig, ["--batch_sizes", "2", "8"]).batch_sizes == [2, 8]
    assert parse_config(GenerateConfig, ["--prompts_file", "-"]).prompts_file == "-"


def test_the_last_one_counts_and_nothing_is_abbreviated() -> None:
    assert parse_config(TrainConfig, ["--max_steps", "3", "--max-steps=4"]).max_steps == 4
    assert said(TrainConfig, "--max_step", "3").startswith("unknown flag --max_step,")


def test_bytes_that_the_locale_hides_are_read_as_utf_8() -> None:
    hidden = "ភាសា".encode().decode("ascii", errors="surrogateescape")
    assert parse_config(GenerateConfig, ["--text", hidden, "--emotion=\udcff"]).text == "ភាសា"
    assert parse_config(GenerateConfig, ["--emotion=\udcff"]).emotion == "\ufffd"


def test_a_run_folder_is_given_by_itself() -> None:
    for words in (["run"], ["--json", "run"], ["run", "--json"], ["--", "run"]):
        assert parse_config(GradientsConfig, words) == GradientsConfig("run", json="--json" in words)
    assert parse_config(GradientsConfig, ["a", "--json", "b"]) == GradientsConfig("a", "b", json=True)
    assert said(GradientsConfig, "a", "b", "c") == "emoft.gradients takes RUN_DIR and OTHER_RUN only, not c: see --help"
    assert "RUN_DIR stands without one" in said(GradientsConfig, "--logdir", "run")
    assert "--json" in said(GradientsConfig, "run", "--json=yes")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate"], "--learning_rate needs a value, such as --learning_rate 5e-05"),
        (["--learning-rate", "--use_cpu"], "--learning-rate needs a value, such as --learning_rate 5e-05"),
        (["--learning_rate", "-1e-3"], "one that begins with a dash is written --learning_rate=-..."),
        (["--max_steps"], "--max_steps needs a value, such as --max_steps -1"),
        (["--train_file"], "--train_file needs a value, such as --train_file FILE"),
        (["--template"], "--template needs a value, such as --template 'Emotion: {text}'"),
        (["--column_names"], "--column_names needs a value, such as --column_names NAME"),
        (["--config"], "--config needs a value, such as --config NAME_OR_FILE"),
        (["--no_append_eos=true"], "--no_append_eos takes no value: leave true away, or give --append_eos true"),
        (["--no_append_eos", "no"], "--no_append_eos takes no value: leave no away, or give --append_eos true"),
        (["--use_cpu", "data.csv"], "--use_cpu data.csv is neither true nor false"),
        (["-help"], "unknown flag -help, see --help"),
    ],
)
def test_a_value_that_is_missing_or_too_many(words: list[str], message: str) -> None:
    assert message in said(TrainConfig, *words)


@pytest.mark.parametrize(
    ("config_class", "words", "meant"),
    [
        (TrainConfig, ["data.csv"], "--train_file data.csv"),
        (TrainConfig, ["--max_steps", "3", "my data.JSONL"], "--train_file 'my data.JSONL'"),
        (TrainConfig, ["demo"], "--config demo"),
        (TrainConfig, ["run.yaml"], "--config run.yaml"),
        (TrainConfig, ["learning_rate=1e-3"], "--learning_rate=1e-3"),
        (TrainConfig, ["--template", "Emotion:", "{text}", "!"], "--template 'Emotion: {text} !'"),
        (EvaluateConfig, ["data.csv"], "--test_file data.csv"),
        (GenerateConfig, ["prompts.txt"], "--prompts_file prompts.txt"),
        (GenerateConfig, ["i", "feel"], "--prompt 'i feel'"),
        (GenerateConfig, ["--emotion", "joy", "--text", "i", "feel"], "--text 'i feel'"),
        (BenchmarkConfig, ["data.csv"], "--train_file data.csv"),
    ],
)
def test_words_that_belong_to_no_flag(config_class, words: list[str], meant: str) -> None:
    message = said(config_class, *words)
    assert message.startswith(f"{config_class.command.name} takes flags only, not ")
    assert message.endswith(f": did you mean {meant}?")


def test_a_word_that_means_nothing_gets_no_guess(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for word in ("gpt2", "-", "---", "-3"):
        assert said(TrainConfig, word) == f"train.py takes flags only, not {word}: see --help"
    assert said(TrainConfig, "--", "x") == "train.py takes flags only, not x: see --help"
    # What lies there tells more than a name.
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    (tmp_path / "texts").write_text("i feel\n")
    assert said(EvaluateConfig, "model").endswith("did you mean --model_name_or_path model?")
    assert said(TrainConfig, "texts").endswith("did you mean --train_file texts?")


def test_help_wins_over_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(TrainConfig, ["--lr", "3", "--max_steps", "x", "-h"])
    assert exit_.value.code == 0
    assert capsys.readouterr().out.startswith("usage: python train.py")
