"""What --help prints."""

import os
import shlex
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest
from conftest import ROOT

from emoft.benchmark.config import BenchmarkConfig
from emoft.command_line import HasFlags, parse_config
from emoft.compare.config import CompareConfig
from emoft.config import EvaluateConfig, GenerateConfig, GradientsConfig, TrainConfig
from emoft.export.config import ExportConfig
from emoft.flags import Command, flags_of, option
from emoft.share.config import ShareConfig
from emoft.step.config import StepConfig

ALL = [
    TrainConfig,
    GenerateConfig,
    EvaluateConfig,
    GradientsConfig,
    BenchmarkConfig,
    StepConfig,
    CompareConfig,
    ShareConfig,
    ExportConfig,
]


@pytest.fixture
def shown(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    def ask(config_class: type[HasFlags], columns: int = 80, word: str = "--help") -> str:
        monkeypatch.setenv("COLUMNS", str(columns))
        with pytest.raises(SystemExit) as exit_:
            parse_config(config_class, [word])
        assert exit_.value.code == 0
        return capsys.readouterr().out

    return ask


@pytest.mark.parametrize("command", [["train.py"], ["generate.py"], *(["-m", each.command.name] for each in ALL[2:])])
def test_every_script_and_command_prints_it(command: list[str]) -> None:
    environment = {**os.environ, "COLUMNS": "80"}
    words = [sys.executable, *command, "--help"]
    result = subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=100)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"usage: python {' '.join(command)} ")
    assert max(map(len, result.stdout.splitlines())) <= 80


@pytest.mark.parametrize("columns", [50, 80, 300])
@pytest.mark.parametrize("config_class", ALL)
def test_lines_are_as_wide_as_the_terminal_and_not_hard_to_read(config_class, columns: int, shown) -> None:
    assert max(map(len, shown(config_class, columns).splitlines())) <= min(columns, 100)


@pytest.mark.parametrize("config_class", ALL)
def test_each_flag_has_its_line_its_sentence_and_its_default(config_class, shown) -> None:
    text = shown(config_class)
    assert text == shown(config_class, word="-h")
    together = " ".join(text.split())
    for flag in flags_of(config_class):
        assert flag.help.removesuffix(")") in together, flag.name
        lines = [line for line in text.splitlines() if line.startswith((f"  --{flag.name}", f"  {flag.name.upper()}"))]
        assert len([line for line in lines if line.split()[0].lower().strip("-") == flag.name]) == 1, flag.name
        assert f"--{flag.name.replace('_', '-')} " not in text or "_" not in flag.name
    assert "default: )" not in text and "[]" not in text and "None" not in text


def test_groups_and_defaults_of_train(shown) -> None:
    text = shown(TrainConfig)
    titles = ["Model", "Data", "Steps", "Optimization", "Speed", "Output", "Debugging", "Devices", "Examples"]
    assert [line for line in text.splitlines() if line in titles] == titles
    assert text.index("--config ") < text.index("\nModel\n") < text.index("--model_name_or_path")
    assert "a preset (conditional, conditional_small, demo) or a YAML file" in " ".join(text.split())
    assert "(default: 'Emotion: {text}')" in text
    assert "--mixed_precision auto | no | bf16 | fp16\n" in text
    assert "(0: off; default: 10000)" in text


def test_a_negated_flag_says_what_it_does(shown) -> None:
    together = " ".join(shown(TrainConfig).split())
    assert "--append_eos | --no_append_eos end each text" in together
    assert "--no_load_best_model_at_end: end with that of the last step (default: on)" in together
    assert "--no_use_cpu" not in together
    assert "--append_eos | --no_append_eos end each text" in " ".join(shown(EvaluateConfig).split())


@pytest.mark.parametrize("config_class", ALL)
def test_the_examples_are_command_lines_that_work(config_class) -> None:
    command = config_class.command
    assert 1 <= len(command.examples) <= 3
    for example in command.examples:
        assert example.startswith(command.launch) and len(example) <= 78, example
        words = shlex.split(example.partition(" > ")[0])
        assert parse_config(config_class, words[len(command.launch.split()) :])


def test_any_text_can_stand_in_it(shown) -> None:
    @dataclass
    class Odd:
        command: ClassVar[Command] = Command("odd.py", "100 % of %s", {"python odd.py": "%(prog)s"})
        share: float = option(0.5, "a 95 % interval of %(default)s and {text}")
        word: str = option("%d", "any % at all")

    text = shown(Odd)
    for part in ("100 % of %s", "%(prog)s", "a 95 % interval of %(default)s and {text} (default: 0.5)", "default: %d"):
        assert part in text
