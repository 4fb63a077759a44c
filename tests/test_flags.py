"""What the fields of a dataclass say of flags, and how words become values."""

import subprocess
import sys
from dataclasses import fields

import pytest
from conftest import ROOT

from emoft.benchmark.config import BenchmarkConfig
from emoft.config import INPUT_FILES, EvaluateConfig, GenerateConfig, GradientsConfig, TrainConfig
from emoft.errors import UserError
from emoft.flags import Flag, flags_of, flags_on_resume, read_value, shown_default
from emoft.step.config import StepConfig

ALL = [TrainConfig, GenerateConfig, EvaluateConfig, GradientsConfig, BenchmarkConfig, StepConfig]
TRAIN = {flag.name: flag for flag in flags_of(TrainConfig)}


def test_nothing_slow_is_imported_for_them() -> None:
    code = "import sys, emoft.config, emoft.command_line, emoft.benchmark.config; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "emoft.flags" in loaded.split()
    slow = {"torch", "transformers", "datasets", "numpy", "tensorboard", "tqdm", "huggingface_hub", "pyarrow", "PIL"}
    assert slow & set(loaded.split()) == set()


@pytest.mark.parametrize("config_class", ALL)
def test_every_default_is_one_that_could_be_given(config_class: type) -> None:
    for flag in flags_of(config_class):
        values = flag.default if flag.is_list else [flag.default]
        for value in values:
            if not (value is None or value == "" or flag.positional):
                assert read_value(flag, str(value)) == value, flag.name


@pytest.mark.parametrize("config_class", ALL)
def test_they_say_what_the_help_needs(config_class: type) -> None:
    for flag in flags_of(config_class):
        assert flag.help and not flag.help.endswith("."), flag.name
        assert bool(flag.negation) == (flag.kind is bool and flag.default is not False), flag.name
        assert flag.kind in (str, int, float, bool), flag.name


def test_the_input_files_are_the_flags_that_name_files() -> None:
    assert tuple(flag.name for flag in TRAIN.values() if flag.value_name == "FILE") == INPUT_FILES


def test_which_flags_a_resumed_run_may_change() -> None:
    """These are what checkpoints of earlier versions were compared by: a change here changes what they resume with."""
    free = {
        *("output_dir", "overwrite_output_dir", "plan", "resume_from_checkpoint", "save_steps", "save_total_limit"),
        *(
            "use_cpu",
            "num_threads",
            "parallel",
            "gradient_checkpointing",
            "torch_compile",
            "per_device_eval_batch_size",
            "push_to_hub",
        ),
        *("early_stopping_patience", "load_best_model_at_end", "log_gradients_every", "sample_every", "on_nonfinite"),
        *("model_name_or_path", "config_overrides", "vocab_size", "tokenizer_name", "validation_file", "test_file"),
        *("model_revision", "on_spike", "log_gradients_of"),
    }
    data = {
        *("train_file", "dataset_name", "dataset_config_name", "delimiter", "text_column", "label_column"),
        *("column_names", "drop_duplicates", "max_train_samples", "dataset_revision"),
    }
    step_size = ("per_device_train_batch_size", "gradient_accumulation_steps")
    assert set(flags_on_resume(TrainConfig, "free")) == free
    assert set(flags_on_resume(TrainConfig, "data")) == data
    assert flags_on_resume(TrainConfig, "step_size") == step_size
    everything = flags_on_resume(TrainConfig, "free", "data", "step_size", "fixed")
    assert everything == tuple(field.name for field in fields(TrainConfig))
    for name in ("learning_rate", "template", "max_length", "seed", "mixed_precision", "logging_steps"):
        assert name in flags_on_resume(TrainConfig, "fixed")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("max_length", "9", 9),
        ("max_steps", "-1", -1),
        ("learning_rate", "1e-3", 1e-3),
        ("use_cpu", "Yes", True),
        ("use_cpu", "FALSE", False),
        ("use_cpu", "0", False),
        ("batching", "padded", "padded"),
        ("train_file", "", ""),
        ("template", "100 % {text}", "100 % {text}"),
    ],
)
def test_words_become_values(name: str, text: str, value: object) -> None:
    found = read_value(TRAIN[name], text)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("max_steps", "3.5", "--max_steps 3.5 is no whole number"),
        ("max_steps", "1e4", "--max_steps 1e4 is no whole number, write 10000"),
        ("max_steps", "1e400", "--max_steps 1e400 is no whole number"),
        ("max_steps", "", "--max_steps '' is no whole number"),
        ("learning_rate", "fast", "--learning_rate fast is no number"),
        ("learning_rate", "nan", "--learning_rate nan must be a number above 0"),
        ("max_length", "1", "--max_length 1 must be at least 2, a token and the next one"),
        ("batching", "pakced", "--batching pakced: choose packed or padded, did you mean packed?"),
        ("mixed_precision", "fp32", "--mixed_precision fp32: choose auto, no, bf16 or fp16, did you mean no?"),
        ("mixed_precision", "x", "--mixed_precision x: choose auto, no, bf16 or fp16"),
        ("use_cpu", "", "--use_cpu '' is neither true nor false: give one of them, or --use_cpu alone for true"),
    ],
)
def test_a_wrong_value_is_told_with_its_flag(name: str, text: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read_value(TRAIN[name], text)
    assert str(error.value) == message


def test_each_value_of_a_list_is_checked() -> None:
    batch_sizes = next(flag for flag in flags_of(BenchmarkConfig) if flag.name == "batch_sizes")
    assert (batch_sizes.kind, batch_sizes.is_list, batch_sizes.default) == (int, True, [4, 16])
    with pytest.raises(UserError, match="--batch_sizes 0 must be at least 1"):
        read_value(batch_sizes, "0")
    assert BenchmarkConfig().batch_sizes is not BenchmarkConfig().batch_sizes


@pytest.mark.parametrize(
    ("default", "shown"), [(True, "on"), (False, "off"), (None, ""), ("", ""), ([], ""), ([4, 16], "4 16"), (3.0, "3")]
)
def test_defaults_are_shown_as_one_would_type_them(default: object, shown: str) -> None:
    assert shown_default(Flag("x", default, "help")) == shown
