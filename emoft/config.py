"""Every flag: its meaning, unit, default and check. The names are those of `TrainingArguments` and `run_clm.py`."""

import argparse
import difflib
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, TypeVar, get_type_hints

import yaml
from transformers import HfArgumentParser

from emoft.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

PRESETS = Path(__file__).parent / "presets"
INPUT_FILES = ("train_file", "validation_file", "test_file")


@dataclass(frozen=True)
class Check:
    """What a value must satisfy, and how to say so."""

    holds: Callable[[Any], bool]
    text: str


Count = Annotated[int, Check(lambda value: value >= 1, "must be at least 1")]
CountOrOff = Annotated[int, Check(lambda value: value >= 0, "must be 0 (off) or more")]
Positive = Annotated[float, Check(lambda value: 0 < value < float("inf"), "must be above 0")]
NotNegative = Annotated[float, Check(lambda value: 0 <= value < float("inf"), "must be 0 or more")]
Share = Annotated[float, Check(lambda value: 0 <= value < 1, "must be at least 0 and below 1")]
Seed = Annotated[int, Check(lambda value: 0 <= value < 2**32, "must be at least 0 and below 2**32")]
Length = Annotated[int, Check(lambda value: value >= 2, "must be at least 2, a token and the next one")]


def option(default: Any, help: str) -> Any:
    """A dataclass field with the sentence that --help shows."""
    return field(default=default, metadata={"help": help})


@dataclass
class TrainConfig:
    """The flags of train.py."""

    # Model
    model_name_or_path: str = option(
        "gpt2", "a GPT-2 on the Hub or in a folder; empty: a fresh model with a tokenizer trained on the train split"
    )
    config_overrides: str = option("", "for a fresh model: GPT2Config values, such as n_layer=4,n_embd=256,n_head=4")
    vocab_size: Annotated[
        int, Check(lambda value: value >= 257, "must hold 256 bytes and end-of-text: 257 or more")
    ] = option(8000, "for a fresh model: size of its byte-level BPE vocabulary, in tokens")
    tokenizer_name: str = option("", "a tokenizer on the Hub or in a folder, if it is not the model's own")

    # Data
    dataset_name: str = option("dair-ai/emotion", "a data set on the Hub or in a folder; train_file goes before it")
    dataset_config_name: str = option(
        "", "the configuration of dataset_name (empty: its only one; split of dair-ai/emotion)"
    )
    train_file: str = option("", "a .csv, .tsv, .json, .jsonl, .parquet or .txt file to train on")
    validation_file: str = option("", "a file to evaluate on")
    test_file: str = option("", "a file to evaluate the final model on, once")
    delimiter: str = option(
        "", "separates the columns of .csv (default ,) and .txt (there: text;label, the last counts)"
    )
    column_names: list[str] = field(
        default_factory=list, metadata={"help": "names of the columns of a .csv or .tsv file without a header line"}
    )
    text_column: str = option("text", "the column that holds the messages")
    label_column: str = option("label", "the column that holds the emotions; read only if the template has {label}")
    template: str = option("Emotion: {text}", "the text of an example; may hold {label} before {text}")
    append_eos: bool = option(True, "end each text with the end-of-text token, which teaches the model to stop")
    max_length: Length = option(64, "longest text in tokens, end-of-text included; the rest is cut")
    drop_duplicates: bool = option(
        False, "leave out of train what it holds twice, exactly or nearly, and what the evaluation splits hold too"
    )
    max_train_samples: CountOrOff = option(0, "train on the first so many examples (0: all)")
    max_eval_samples: CountOrOff = option(0, "evaluate on the first so many examples of each split (0: all)")

    # Steps
    num_train_epochs: Positive = option(3.0, "passes over the train split")
    max_steps: int = option(-1, "optimizer steps, instead of num_train_epochs (-1: by epochs)")
    per_device_train_batch_size: Count = option(4, "examples in a micro-batch")
    per_device_eval_batch_size: Count = option(16, "examples in a batch of an evaluation")
    gradient_accumulation_steps: Count = option(1, "micro-batches in an optimizer step")
    batching: Literal["packed", "padded"] = option(
        "packed", "how a batch lies in memory: packed end to end without padding, or padded to its longest text"
    )

    # Optimization
    learning_rate: Positive = option(5e-5, "highest learning rate of AdamW")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option("linear", "how it decays after the warmup")
    warmup_steps: NotNegative = option(0.0, "steps in which it rises from 0; below 1: that share of all steps")
    weight_decay: NotNegative = option(0.0, "AdamW's weight decay, of matrices only")
    adam_beta1: Share = option(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: Share = option(0.999, "AdamW's decay of the mean of squared gradients")
    adam_epsilon: Positive = option(1e-8, "AdamW's term against division by zero")
    label_contrast: NotNegative = option(
        0.0, "weight of telling each text's label from wrong ones by the likelihood of the text under each (0: off)"
    )
    contrast_labels: Count = option(
        3, "with label_contrast: wrong labels tried for each text and step, each as much work as the text itself"
    )
    max_grad_norm: NotNegative = option(1.0, "clip the gradient to this norm (0: off)")
    seed: Seed = option(42, "of the weights of a fresh model, the order of the data, dropout and samples")

    # Speed
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "type of the matrix products; auto: bf16 where the device computes in it, else fp16 on a GPU, else no"
    )
    torch_compile: bool = option(
        False, "compile the model first, which takes minutes and does not pay on a few CPU cores"
    )
    gradient_checkpointing: bool = option(False, "keep fewer activations and compute them again: less memory, slower")

    # Output
    output_dir: str = option("gpt2-emotion-finetuned", "folder of the model, checkpoints and logs")
    overwrite_output_dir: bool = option(False, "delete the run that output_dir holds and start anew")
    logging_steps: Count = option(50, "optimizer steps between two log entries")
    eval_steps: CountOrOff = option(0, "optimizer steps between two evaluations (0: at the end of each epoch)")
    save_steps: CountOrOff = option(10_000, "optimizer steps between two checkpoints (0: off)")
    save_total_limit: CountOrOff = option(2, "checkpoints kept, the best among them (0: all)")
    load_best_model_at_end: bool = option(True, "end with the model of the lowest evaluation loss")
    early_stopping_patience: CountOrOff = option(0, "stop after so many evaluations without a new best (0: off)")
    resume_from_checkpoint: str = option("", "go on from this checkpoint folder, or from the `latest` of output_dir")

    # Debugging
    log_gradients_every: CountOrOff = option(
        0, "optimizer steps between two looks at weights, gradients, updates and activations of each block (0: off)"
    )
    sample_every: CountOrOff = option(0, "optimizer steps between two rounds of sample texts (0: at the end only)")
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop", "when a loss or gradient is infinite or NaN: stop, or skip that step (ten in a row stop)"
    )

    # Devices
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "under torchrun: a copy of the model on each device, or its weights spread over them"
    )


@dataclass
class GenerateConfig:
    """The flags of generate.py."""

    model_name_or_path: str = option("gpt2-emotion-finetuned", "a folder that train.py wrote, or a GPT-2 on the Hub")
    prompt: list[str] = field(
        default_factory=list, metadata={"help": "text to continue, as it is; may repeat", "action": "extend"}
    )
    emotion: str = option("", "an emotion, put into the template saved with the model")
    text: str = option("", "with --emotion: how the message begins")
    prompts_file: str = option("", "a file with a prompt a line; - reads standard input")
    interactive: bool = option(False, "ask for a prompt at a time and print its continuation token by token")

    max_length: Length = option(100, "longest result in tokens, prompt included")
    max_new_tokens: CountOrOff = option(0, "most tokens after the prompt, instead of max_length (0: by max_length)")
    no_repeat_ngram_size: CountOrOff = option(2, "let no sequence of so many tokens occur twice (0: off)")
    do_sample: bool = option(False, "draw each token at random instead of taking the likeliest")
    temperature: Positive = option(1.0, "with do_sample: below 1 safer, above 1 wilder")
    top_k: CountOrOff = option(50, "with do_sample: draw from the so many likeliest tokens (0: all)")
    top_p: Annotated[float, Check(lambda value: 0 < value <= 1, "must be above 0 and at most 1")] = option(
        1.0, "with do_sample: draw from the likeliest tokens that hold this probability together"
    )
    num_return_sequences: Count = option(1, "results for each prompt")
    seed: Seed = option(42, "of the random draws")
    batch_size: Count = option(64, "texts generated at once, which bounds the memory")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "as for train.py, but no for few texts on a CPU; no gives a prompt the same text beside any other"
    )
    json: bool = option(False, "print a line of JSON for each result")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")


@dataclass
class EvaluateConfig:
    """The flags of emoft.evaluate.scoring."""

    model_name_or_path: str = option("gpt2-emotion-finetuned", "a folder that train.py wrote, or a GPT-2 on the Hub")

    # Data
    dataset_name: str = option("dair-ai/emotion", "a data set on the Hub or in a folder; test_file goes before it")
    dataset_config_name: str = option(
        "", "the configuration of dataset_name (empty: its only one; split of dair-ai/emotion)"
    )
    split: str = option("test", "the split of dataset_name to evaluate on")
    test_file: str = option("", "a file to evaluate on, of the kinds that train.py reads")
    train_file: str = option(
        "",
        "what the model was trained on: tells copies, counts labels, and fits the independent classifier",
    )
    delimiter: str = option("", "as for train.py")
    column_names: list[str] = field(default_factory=list, metadata={"help": "as for train.py"})
    text_column: str = option("text", "the column that holds the messages")
    label_column: str = option("label", "the column that holds the emotions; read only if the template has {label}")
    template: str = option("", "the text of an example (empty: the one saved with the model)")
    append_eos: bool | None = option(None, "end each text with end-of-text (not given: as the model was trained)")
    max_length: Annotated[int, Check(lambda value: value == 0 or value >= 2, "must be 0 or at least 2")] = option(
        0, "longest text in tokens, end-of-text included; the rest is cut (0: as the model was trained)"
    )
    max_eval_samples: CountOrOff = option(0, "evaluate on the first so many examples (0: all)")

    # Emotions
    use_class_prior: bool = option(False, "weigh each emotion by its share of the train split when classifying")
    generate: CountOrOff = option(0, "sample so many texts for each emotion, and tell how good they are (0: off)")
    temperature: Positive = option(1.0, "of these texts: below 1 safer, above 1 wilder")
    top_k: CountOrOff = option(50, "of these texts: draw from the so many likeliest tokens (0: all)")
    top_p: Annotated[float, Check(lambda value: 0 < value <= 1, "must be above 0 and at most 1")] = option(
        1.0, "of these texts: draw from the likeliest tokens that hold this probability together"
    )
    no_repeat_ngram_size: CountOrOff = option(
        0, "of these texts: no sequence of so many tokens occurs twice (0: off, so that repetition can be measured)"
    )
    seed: Seed = option(42, "of these texts")

    # Output and speed
    json: bool = option(False, "print one JSON object, each number with its 95 % interval beside it")
    output_dir: str = option("", "write evaluation.json, confusion.png and samples.jsonl there (empty: nothing)")
    per_device_eval_batch_size: Count = option(32, "texts computed at once")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "no", "as for train.py; no gives the same figures on every machine"
    )
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")


Config = TypeVar("Config", bound="DataclassInstance")


class OneLineParser(argparse.ArgumentParser):
    """Ends with one line instead of a page of usage."""

    def error(self, message: str) -> NoReturn:
        """Raise the message; argparse's own would print a page and exit."""
        unknown, _, rest = message.partition("unrecognized arguments: ")
        if not unknown and rest.startswith("--"):
            flag = rest.split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=1)
            message = f"unknown flag {flag}" + (f", did you mean {near[0]}?" if near else ", see --help")
        raise UserError(message)


class _Parser(OneLineParser, HfArgumentParser):
    """Makes flags of a dataclass."""


def parse_config(config_class: type[Config], argv: Sequence[str] | None = None) -> Config:
    """Read a configuration from the command line and, below it, from the preset or YAML file of --config.

    Args:
        config_class: the dataclass to fill.
        argv: the words after the script's name; `sys.argv` by default.

    Raises:
        UserError: an unknown flag, or a value that is of the wrong type or out of range.
    """
    parser = _Parser(config_class, allow_abbrev=False)  # type: ignore[arg-type]
    if config_class is TrainConfig:
        parser.add_argument("--config", help=f"a preset ({', '.join(preset_names())}) or a YAML file of flags")
    # Python hides bytes that its locale cannot read in surrogates, which no tokenizer takes.
    words = [os.fsencode(word).decode("utf-8", errors="replace") for word in (sys.argv[1:] if argv is None else argv)]
    values = argparse.Namespace()
    yaml_file = getattr(parser.parse_args(words), "config", None)
    if yaml_file:
        path = _yaml_path(yaml_file)
        try:
            values = parser.parse_args(_yaml_words(path), values)
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    # argparse leaves alone what the namespace holds already, so that flags win over the file.
    values = parser.parse_args(words, values)
    config = config_class(**{each.name: getattr(values, each.name) for each in fields(config_class)})
    check_values(config)
    return config


def check_values(config: "DataclassInstance") -> None:
    """Hold each value against the check of its type.

    Raises:
        UserError: a value is out of range.
    """
    for name, hint in get_type_hints(type(config), include_extras=True).items():
        for condition in getattr(hint, "__metadata__", ()):
            value = getattr(config, name)
            if not condition.holds(value):
                raise UserError(f"--{name} {value} {condition.text}")


def preset_names() -> list[str]:
    """Return the names that --config accepts besides files."""
    return sorted(path.stem for path in PRESETS.glob("*.yaml"))


def config_text(config: TrainConfig) -> str:
    """Return the resolved configuration as YAML, with the whole paths of its files."""
    values = asdict(config)
    for name in INPUT_FILES:
        if values[name]:
            values[name] = os.path.abspath(values[name])
    return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)


def save_config(config: TrainConfig, path: Path) -> None:
    """Write the resolved configuration as YAML, which --config takes back from any folder.

    Raises:
        UserError: it cannot be written.
    """
    try:
        path.write_text(config_text(config), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): make room, or name another folder") from None


def _yaml_path(name: str) -> Path:
    if name in preset_names():
        return PRESETS / f"{name}.yaml"
    if Path(name).is_file():
        return Path(name)
    raise UserError(f"--config {name}: no such preset or file, choose from {', '.join(preset_names())} or name a file")


def _yaml_words(path: Path) -> list[str]:
    """Return the settings of a YAML file as words of a command line, so that one parser checks both."""
    try:
        # Values as they are written: YAML's own types would make a false of `mixed_precision: no`.
        settings = yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # safe: it makes text only
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"not a readable YAML file: {error}") from None
    if not settings:
        return []
    if not isinstance(settings, dict):
        raise UserError("must hold lines of the form flag: value")
    words = []
    for name, value in settings.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)] if value else []
        elif value not in ("null", "~"):
            if name in INPUT_FILES and value:
                value = path.parent / os.path.expanduser(str(value))  # relative to the file that names it
            words.append(f"--{name}={value}")
    return words
