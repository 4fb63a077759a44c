from dataclasses import asdict, fields
from pathlib import Path

import pytest

from emoft.command_line import parse_config, preset_names
from emoft.config import PRESETS, GenerateConfig, TrainConfig, save_config
from emoft.errors import UserError


def test_without_flags_it_is_the_tutorials_job() -> None:
    config = parse_config(TrainConfig, [])
    assert config == TrainConfig()
    tutorial = {
        "model_name_or_path": "gpt2",
        "dataset_name": "dair-ai/emotion",
        "template": "Emotion: {text}",
        "max_length": 64,
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 5e-5,
        "weight_decay": 0,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 1,
        "seed": 42,
        "save_total_limit": 2,
        "save_steps": 10_000,
        "append_eos": True,
    }
    assert {name: getattr(config, name) for name in tutorial} == tutorial


def test_underscores_and_dashes_are_the_same() -> None:
    assert parse_config(TrainConfig, ["--max-length", "9"]) == parse_config(TrainConfig, ["--max_length=9"])
    assert not parse_config(TrainConfig, ["--no-append-eos"]).append_eos
    assert not parse_config(TrainConfig, ["--append_eos", "false"]).append_eos


def test_a_prompt_may_repeat() -> None:
    assert parse_config(GenerateConfig, ["--prompt", "a", "--prompt", "b c"]).prompt == ["a", "b c"]
    assert parse_config(GenerateConfig, []).prompt == []


@pytest.mark.parametrize("config_class", [TrainConfig, GenerateConfig])
def test_every_flag_has_a_sentence(config_class: type, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        parse_config(config_class, ["--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for field in fields(config_class):
        assert f"--{field.name}" in shown
        assert field.metadata["help"][:20] in shown


class TestYaml:
    def test_flags_win_over_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text("learning_rate: 1e-3\nmax_length: 9\nappend_eos: false\ntest_file: null\nmixed_precision: no\n")
        config = parse_config(TrainConfig, ["--config", str(path), "--max_length", "10"])
        assert (config.learning_rate, config.max_length, config.append_eos) == (1e-3, 10, False)
        assert (config.test_file, config.mixed_precision) == ("", "no")
        # Also where the flag repeats the default.
        assert parse_config(TrainConfig, ["--config", str(path), "--max_length", "64"]).max_length == 64

    def test_files_are_looked_for_beside_it(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text("train_file: a/b.csv\n")
        config = parse_config(TrainConfig, ["--config", str(tmp_path / "run.yaml")])
        assert config.train_file == str(tmp_path / "a" / "b.csv")

    def test_all_paths_are_looked_for_beside_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """And ~ is the home folder, on the command line too; names of the Hub and presets are left as they are."""
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        (tmp_path / "models" / "small").mkdir(parents=True)
        (tmp_path / "run.yaml").write_text(
            "output_dir: out\nmodel_name_or_path: models/small\ntokenizer_name: ./tokens\nvalidation_file: ~/v.csv\n"
            "dataset_name: dair-ai/emotion\nresume_from_checkpoint: latest\n"
        )
        config = parse_config(TrainConfig, ["--config", str(tmp_path / "run.yaml"), "--test_file=~/t.csv"])
        assert config.output_dir == str(tmp_path / "out")
        assert config.model_name_or_path == str(tmp_path / "models" / "small")
        assert config.tokenizer_name == str(tmp_path / "tokens")
        assert (config.dataset_name, config.resume_from_checkpoint) == ("dair-ai/emotion", "latest")
        assert config.validation_file == str(tmp_path / "home" / "v.csv")
        assert config.test_file == str(tmp_path / "home" / "t.csv")
        for flag in ("train_file", "output_dir", "model_name_or_path", "dataset_name", "resume_from_checkpoint"):
            words = [f"--{flag}=~/a b"]
            assert getattr(parse_config(TrainConfig, words), flag) == str(tmp_path / "home" / "a b"), flag
        assert parse_config(GenerateConfig, ["--prompts_file", "-"]).prompts_file == "-"
        assert parse_config(TrainConfig, ["--config", "demo"]).output_dir == "emoft-demo"

    def test_no_folder_is_not_the_current_one(self) -> None:
        with pytest.raises(UserError, match="--output_dir '' must name a folder"):
            parse_config(TrainConfig, ["--output_dir", ""])

    def test_what_a_run_saves_is_taken_back(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        words = [
            "--train_file=x.csv",
            "--column_names",
            "a",
            "b",
            "--template={label}: {text} # ភាសា",
            "--max_steps=-1",
            "--model_name_or_path=base",
            "--resume_from_checkpoint=latest",
        ]
        config = parse_config(TrainConfig, words)
        (tmp_path / "out").mkdir()
        (tmp_path / "base").mkdir()
        save_config(config, tmp_path / "out" / "train_config.yaml")
        monkeypatch.chdir("/")
        again = parse_config(TrainConfig, ["--config", str(tmp_path / "out" / "train_config.yaml")])
        whole = {"train_file": "x.csv", "output_dir": config.output_dir, "model_name_or_path": "base"}
        assert asdict(again) == {
            **asdict(config),
            **{name: str(tmp_path / path) for name, path in whole.items()},
            "resume_from_checkpoint": "",
        }

    @pytest.mark.parametrize("name", preset_names(PRESETS))
    def test_presets_are_complete(self, name: str) -> None:
        config = parse_config(TrainConfig, ["--config", name])
        for path in (config.train_file, config.validation_file):
            assert not path or Path(path).is_file()

    def test_an_error_names_the_file(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text("max_lenght: 3\n")
        with pytest.raises(UserError, match=r"run\.yaml: unknown flag --max_lenght, did you mean --max_length"):
            parse_config(TrainConfig, ["--config", str(tmp_path / "run.yaml")])

    def test_words_are_read_as_a_command_line_s_are(self, tmp_path: Path) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(
            "max-length: 9\nuse_cpu: yes\nappend_eos: 0\ncolumn_names: [text, -x]\nlearning_rate: null\nseed: ~\n"
            "template: '{text} 100 %'\ntrain_file: ''\n"
        )
        config = parse_config(TrainConfig, ["--config", str(path)])
        assert (config.max_length, config.use_cpu, config.append_eos) == (9, True, False)
        assert (config.column_names, config.template, config.train_file) == (["text", "-x"], "{text} 100 %", "")
        assert (config.learning_rate, config.seed) == (TrainConfig.learning_rate, TrainConfig.seed)
        path.write_text("column_names: text\nmax_steps: [3]\n")
        assert parse_config(TrainConfig, ["--config", str(path)]) == TrainConfig(column_names=["text"], max_steps=3)
        for nothing in ("", "# a comment\n", "column_names: []\nmax_steps: []\n"):
            path.write_text(nothing)
            assert parse_config(TrainConfig, ["--config", str(path)]) == TrainConfig()

    def test_a_list_of_the_command_line_replaces_the_file_s(self, tmp_path: Path) -> None:
        (tmp_path / "run.yaml").write_text("column_names: [a, b]\n")
        words = ["--config", str(tmp_path / "run.yaml"), "--column_names", "c"]
        assert parse_config(TrainConfig, words).column_names == ["c"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("lr: 3\n", "unknown flag --lr, did you mean --learning_rate?"),
            ("device: cpu\n", "--use_cpu stays on the CPU"),
            ("no_append_eos: true\n", "unknown flag --no_append_eos, did you mean --append_eos false?"),
            ("config: demo\n", "--config cannot stand in a file"),
            ("max_steps: many\n", "--max_steps many is no whole number"),
            ("max_length: 1\n", "--max_length 1 must be at least 2"),
            ("batching: pakced\n", "--batching pakced: choose packed or padded, did you mean packed?"),
            ("append_eos:\n", "--append_eos '' is neither true nor false"),
            ("template: {text}\n", "--template takes one value: put a text in quotes"),
            ("max_steps: [3, 4]\n", "--max_steps takes one value"),
            ("column_names: [[a]]\n", "--column_names takes words"),
            ("- max_steps\n", "must hold lines of the form flag: value"),
            ("template: {label}: {text}\n", "not a readable YAML file"),
            ("a: 'b\n", "not a readable YAML file"),
        ],
    )
    def test_a_mistake_in_it_names_file_and_key(self, tmp_path: Path, content: str, message: str) -> None:
        path = tmp_path / "run.yaml"
        path.write_text(content)
        with pytest.raises(UserError) as error:
            parse_config(TrainConfig, ["--config", str(path)])
        assert str(error.value).startswith(f"{path}: ") and message in str(error.value)

    def test_a_preset_that_is_not_there(self, tmp_path: Path) -> None:
        choice = "no such preset or file, choose conditional, conditional_small, demo or a file"
        for name, end in (("demmo", ", did you mean demo?"), (str(tmp_path), ""), ("x.yaml", "")):
            with pytest.raises(UserError) as error:
                parse_config(TrainConfig, ["--config", name])
            assert str(error.value) == f"--config {name}: {choice}{end}"
