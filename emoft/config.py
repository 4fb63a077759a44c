"""Every flag: its meaning, unit, default and check. The names are those of `TrainingArguments` and `run_clm.py`.

Nothing here or below takes long to import, so that --help and a mistake in the flags are answered at once.
"""

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import yaml

from emoft.errors import UserError
from emoft.flags import (
    PATHS,
    Check,
    Command,
    Count,
    CountOrOff,
    File,
    Folder,
    Length,
    Name,
    NameOrFolder,
    NotNegative,
    Positive,
    Probability,
    Seed,
    Share,
    flags_of,
    option,
)

PRESETS = Path(__file__).parent / "presets"
INPUT_FILES = ("train_file", "validation_file", "test_file")
VocabularySize = Annotated[int, Check(lambda value: value >= 257, "must hold 256 bytes and end-of-text: 257 or more")]
OutputFolder = Annotated[Folder, Check(lambda value: value != "", "must name a folder")]
LengthOrSaved = Annotated[int, Check(lambda value: value == 0 or value >= 2, "must be 0 or at least 2")]


@dataclass
class TrainConfig:
    """The flags of train.py."""

    command: ClassVar[Command] = Command(
        "train.py",
        "Fine-tune GPT-2 on short emotional texts. Without any flag it is the tutorial's job: gpt2 on dair-ai/emotion,"
        " for 3 epochs. The folder --output_dir then holds the model, its checkpoints and what TensorBoard shows;"
        " generate.py writes texts with it.",
        {
            "python train.py --config demo": "a small model from nothing, on bundled sentences: no download, no GPU",
            "python train.py --train_file texts.csv --text_column message": "your own texts, one a row",
            "python train.py --resume_from_checkpoint latest": "go on where the last run stopped",
        },
        presets=PRESETS,
        file_flag="train_file",
    )

    model_name_or_path: NameOrFolder = option(
        "gpt2",
        "a GPT-2 on the Hub or in a folder; empty: a fresh model with a tokenizer trained on the train split",
        begins_group="Model",
        on_resume="free",
    )
    model_revision: Name = option("main", "branch, tag or commit of a model_name_or_path on the Hub", on_resume="free")
    config_overrides: str = option(
        "", "for a fresh model: GPT2Config values, such as n_layer=4,n_embd=256,n_head=4", on_resume="free"
    )
    vocab_size: VocabularySize = option(
        8000, "for a fresh model: size of its byte-level BPE vocabulary, in tokens", on_resume="free"
    )
    tokenizer_name: NameOrFolder = option(
        "", "a tokenizer on the Hub or in a folder, if it is not the model's own", on_resume="free"
    )

    dataset_name: NameOrFolder = option(
        "dair-ai/emotion",
        "a data set on the Hub or in a folder; --train_file goes before it",
        begins_group="Data",
        on_resume="data",
    )
    dataset_config_name: Name = option(
        "", "the configuration of dataset_name (empty: its only one; split of dair-ai/emotion)", on_resume="data"
    )
    dataset_revision: Name = option("main", "branch, tag or commit of a dataset_name on the Hub", on_resume="data")
    train_file: File = option("", "a .csv, .tsv, .json, .jsonl, .parquet or .txt file to train on", on_resume="data")
    validation_file: File = option("", "a file to evaluate on", on_resume="free")
    test_file: File = option("", "a file to evaluate the final model on, once", on_resume="free")
    delimiter: str = option(
        "",
        "separates the columns of .csv (default ,) and .txt (there: text;label, the last counts)",
        on_resume="data",
    )
    column_names: list[Name] = option(
        [], "names of the columns of a .csv or .tsv file without a header line", on_resume="data"
    )
    text_column: Name = option("text", "the column that holds the messages", on_resume="data")
    label_column: Name = option(
        "label", "the column that holds the emotions; read only if the template has {label}", on_resume="data"
    )
    template: str = option("Emotion: {text}", "the text of an example; may hold {label} before {text}")
    append_eos: bool = option(
        True,
        "end each text with the end-of-text token, which teaches the model to stop",
        negation="do not, and it never learns to",
    )
    max_length: Length = option(64, "longest text in tokens, end-of-text included; the rest is cut")
    drop_duplicates: bool = option(
        False,
        "leave out of train what it holds twice, exactly or nearly, and what the evaluation splits hold too",
        on_resume="data",
    )
    max_train_samples: CountOrOff = option(0, "train on the first so many examples (0: all)", on_resume="data")
    max_eval_samples: CountOrOff = option(0, "evaluate on the first so many examples of each split (0: all)")

    num_train_epochs: Positive = option(3.0, "passes over the train split", begins_group="Steps")
    max_steps: int = option(-1, "optimizer steps, instead of num_train_epochs (-1: by epochs)")
    per_device_train_batch_size: Count = option(4, "examples in a micro-batch", on_resume="step_size")
    per_device_eval_batch_size: Count = option(16, "examples in a batch of an evaluation", on_resume="free")
    gradient_accumulation_steps: Count = option(1, "micro-batches in an optimizer step", on_resume="step_size")
    batching: Literal["packed", "padded"] = option(
        "packed", "how a batch lies in memory: packed end to end without padding, or padded to its longest text"
    )

    learning_rate: Positive = option(5e-5, "highest learning rate of AdamW", begins_group="Optimization")
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = option(
        "linear", "how the learning rate decays after the warmup"
    )
    warmup_steps: NotNegative = option(
        0.0, "steps in which the learning rate rises from 0; below 1: that share of all steps"
    )
    weight_decay: NotNegative = option(0.0, "AdamW's weight decay, of matrices only")
    adam_beta1: Share = option(0.9, "AdamW's decay of the mean of gradients")
    adam_beta2: Share = option(0.999, "AdamW's decay of the mean of squared gradients")
    adam_epsilon: Positive = option(1e-8, "AdamW's term against division by zero")
    label_contrast: NotNegative = option(
        0.0, "weight of telling each text's label from wrong ones by the likelihood of the text under each (0: off)"
    )
    contrast_labels: Count = option(
        3, "with --label_contrast: wrong labels tried for each text and step, each as much work as the text itself"
    )
    max_grad_norm: NotNegative = option(1.0, "clip the gradient to this norm (0: off)")
    seed: Seed = option(42, "of the weights of a fresh model, the order of the data, dropout and samples")

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto",
        "type of the matrix products; auto: bf16 where the device computes in it, else fp16 on a GPU, else no",
        begins_group="Speed",
    )
    torch_compile: bool = option(
        False,
        "compile the model first, which takes minutes and does not pay on a few CPU cores",
        on_resume="free",
    )
    gradient_checkpointing: bool = option(
        False, "keep fewer activations and compute them again: less memory, slower", on_resume="free"
    )

    output_dir: OutputFolder = option(
        "gpt2-emotion-finetuned", "folder of the model, checkpoints and logs", begins_group="Output", on_resume="free"
    )
    overwrite_output_dir: bool = option(False, "delete the run that output_dir holds and start anew", on_resume="free")
    plan: bool = option(
        False, "compute a few steps, tell what the run will use and take, and end before it begins", on_resume="free"
    )
    logging_steps: Count = option(50, "optimizer steps between two log entries")
    eval_steps: CountOrOff = option(0, "optimizer steps between two evaluations (0: at the end of each epoch)")
    save_steps: CountOrOff = option(10_000, "optimizer steps between two checkpoints (0: off)", on_resume="free")
    save_total_limit: CountOrOff = option(2, "checkpoints kept, the best among them (0: all)", on_resume="free")
    load_best_model_at_end: bool = option(
        True,
        "end with the model of the lowest evaluation loss",
        negation="end with that of the last step",
        on_resume="free",
    )
    early_stopping_patience: CountOrOff = option(
        0, "stop after so many evaluations without a new best (0: off)", on_resume="free"
    )
    push_to_hub: Name = option(
        "", "upload the finished model to OWNER/NAME on the Hugging Face Hub; log in before", on_resume="free"
    )
    resume_from_checkpoint: NameOrFolder = option(
        "", "go on from this checkpoint folder, or from the `latest` of output_dir", on_resume="free"
    )

    log_gradients_every: CountOrOff = option(
        0,
        "optimizer steps between two looks at weights, gradients, updates and activations of each block (0: off)",
        begins_group="Debugging",
        on_resume="free",
    )
    log_gradients_of: Literal["blocks", "layers"] = option(
        "blocks", "what they are told of: each block, or each kind of layer in it too", on_resume="free"
    )
    sample_every: CountOrOff = option(
        0, "optimizer steps between two rounds of sample texts (0: at the end only)", on_resume="free"
    )
    on_nonfinite: Literal["stop", "skip"] = option(
        "stop",
        "when a loss or gradient is infinite or NaN: stop, or skip that step (ten in a row stop)",
        on_resume="free",
    )
    on_spike: Literal["warn", "skip"] = option(
        "warn",
        "when a loss stands far above those before: tell its texts, or leave that step out too (a GPU then waits for"
        " each step)",
        on_resume="free",
    )

    use_cpu: bool = option(False, "stay on the CPU where there is a GPU", begins_group="Devices", on_resume="free")
    num_threads: CountOrOff = option(
        0,
        "threads on the CPU (0: as many as cores that no other process uses, looked at each second after the first"
        " ten); a number gives the same bits each time",
        on_resume="free",
    )
    parallel: Literal["ddp", "fsdp"] = option(
        "ddp", "under torchrun: a copy of the model on each device, or its weights spread over them", on_resume="free"
    )


@dataclass
class GenerateConfig:
    """The flags of generate.py."""

    command: ClassVar[Command] = Command(
        "generate.py",
        "Continue prompts with a model that train.py saved, or any GPT-2. Without any flag it continues the tutorial's"
        " prompt, by the likeliest token each time.",
        {
            "python generate.py --prompt 'Emotion: i feel' --do_sample": "your own beginning, drawn at random",
            "python generate.py --model_name_or_path emoft-demo --emotion joy --do_sample": "a text for an emotion",
            "python generate.py --prompts_file prompts.txt --json > texts.jsonl": "many prompts, one a line",
        },
        file_flag="prompts_file",
        text_flag="prompt",
    )

    model_name_or_path: NameOrFolder = option(
        "gpt2-emotion-finetuned", "a folder that train.py wrote, or a GPT-2 on the Hub", begins_group="Model"
    )
    model_revision: Name = option("main", "branch, tag or commit of a model_name_or_path on the Hub")

    prompt: list[str] = option(
        [], "text to continue, as it is; may repeat", begins_group="What to continue", repeats=True
    )
    emotion: str = option(
        "", "an emotion, put into the template saved with the model, or a mixture, as in joy:0.7,surprise:0.3"
    )
    strength: NotNegative = option(
        0.0, "weigh the emotion against the model's others at each token, as strongly (0: the prompt alone; 1 is much)"
    )
    text: str = option("", "with --emotion: how the message begins")
    prompts_file: File = option("", "a file with a prompt a line; - reads standard input")
    interactive: bool = option(False, "ask for a prompt at a time and print its continuation token by token")

    max_length: Length = option(100, "longest result in tokens, prompt included", begins_group="How to continue")
    max_new_tokens: CountOrOff = option(0, "most tokens after the prompt, instead of max_length (0: by max_length)")
    no_repeat_ngram_size: CountOrOff = option(2, "let no sequence of so many tokens occur twice (0: off)")
    do_sample: bool = option(False, "draw each token at random instead of taking the likeliest")
    temperature: Positive = option(1.0, "with --do_sample: below 1 safer, above 1 wilder")
    top_k: CountOrOff = option(50, "with --do_sample: draw from the so many likeliest tokens (0: all)")
    top_p: Probability = option(
        1.0, "with --do_sample: draw from the likeliest tokens that hold this probability together"
    )
    num_return_sequences: Count = option(1, "results for each prompt")
    seed: Seed = option(42, "of the random draws")

    batch_size: Count = option(64, "texts generated at once, which bounds the memory", begins_group="Speed and output")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "as for train.py, but no for few texts on a CPU; no gives a prompt the same text beside any other"
    )
    quantize: Literal["no", "int8"] = option(
        "no", "int8: on a CPU, weights and what they are multiplied with in eight bits; faster, and a little worse"
    )
    json: bool = option(False, "print a line of JSON for each result")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")


@dataclass
class EvaluateConfig:
    """The flags of `python -m emoft.evaluate`."""

    command: ClassVar[Command] = Command(
        "emoft.evaluate",
        "Tell how good a model is on texts that it was not trained on: loss, perplexity and bits per byte, each with"
        " its 95 % interval; with a {label} template also how often it knows the emotion, and by --generate how good"
        " its own texts are.",
        {
            "python -m emoft.evaluate": "what python train.py left, on the test split of dair-ai/emotion",
            "python -m emoft.evaluate --model_name_or_path emoft-demo --test_file texts.csv": "on your own texts",
        },
        file_flag="test_file",
    )

    model_name_or_path: NameOrFolder = option(
        "gpt2-emotion-finetuned", "a folder that train.py wrote, or a GPT-2 on the Hub", begins_group="Model"
    )
    model_revision: Name = option("main", "branch, tag or commit of a model_name_or_path on the Hub")

    dataset_name: NameOrFolder = option(
        "dair-ai/emotion", "a data set on the Hub or in a folder; --test_file goes before it", begins_group="Data"
    )
    dataset_config_name: Name = option(
        "", "the configuration of dataset_name (empty: its only one; split of dair-ai/emotion)"
    )
    dataset_revision: Name = option("main", "branch, tag or commit of a dataset_name on the Hub")
    split: Name = option("test", "the split of dataset_name to evaluate on")
    test_file: File = option("", "a file to evaluate on, of the kinds that train.py reads")
    train_file: File = option(
        "", "what the model was trained on: tells copies, counts labels, and fits the independent classifier"
    )
    delimiter: str = option("", "as for train.py")
    column_names: list[Name] = option([], "as for train.py")
    text_column: Name = option("text", "the column that holds the messages")
    label_column: Name = option("label", "the column that holds the emotions; read only if the template has {label}")
    template: str = option("", "the text of an example (empty: the one saved with the model)")
    append_eos: bool | None = option(
        None, "end each text with end-of-text (not given: as the model was trained)", negation="do not"
    )
    max_length: LengthOrSaved = option(
        0, "longest text in tokens, end-of-text included; the rest is cut (0: as the model was trained)"
    )
    max_eval_samples: CountOrOff = option(0, "evaluate on the first so many examples (0: all)")

    use_class_prior: bool = option(
        False, "weigh each emotion by its share of the train split when classifying", begins_group="Emotions"
    )
    suspects: CountOrOff = option(
        0, "show so many rows of the train split, or without one of the texts, whose label may be wrong (0: none)"
    )
    generate: CountOrOff = option(0, "sample so many texts for each emotion, and tell how good they are (0: off)")
    judge_model: NameOrFolder = option(
        "", "with --generate: another model, which tells how likely it finds these texts, and people's"
    )
    strength: NotNegative = option(0.0, "of these texts: as for generate.py")
    temperature: Positive = option(1.0, "of these texts: below 1 safer, above 1 wilder")
    top_k: CountOrOff = option(50, "of these texts: draw from the so many likeliest tokens (0: all)")
    top_p: Probability = option(
        1.0, "of these texts: draw from the likeliest tokens that hold this probability together"
    )
    no_repeat_ngram_size: CountOrOff = option(
        0, "of these texts: no sequence of so many tokens occurs twice (0: off, so that repetition can be measured)"
    )
    seed: Seed = option(42, "of these texts")

    json: bool = option(
        False, "print one JSON object, each number with its 95 % interval beside it", begins_group="Output and speed"
    )
    output_dir: Folder = option(
        "", "write evaluation.json, confusion.png, samples.jsonl and suspects.csv there (empty: nothing)"
    )
    per_device_eval_batch_size: Count = option(32, "texts computed at once")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "no", "as for train.py; no gives the same figures on every machine"
    )
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")


@dataclass
class GradientsConfig:
    """The flags of `python -m emoft.gradients`."""

    command: ClassVar[Command] = Command(
        "emoft.gradients",
        "Say in plain words what is wrong with a training run: in which layer, at which step, what to change, and which"
        " chart of TensorBoard shows it. With --log_gradients_every, train.py measures what most of it is told by.",
        {
            "python -m emoft.gradients emoft-demo": "the run of python train.py --config demo",
            "python -m emoft.gradients emoft-demo --step 60": "the texts of its step 60, the hardest one first",
            "python -m emoft.gradients --leak emoft-demo": "whether a token sees a later one, or a text its neighbour",
        },
    )

    run_dir: Folder = option("", "an output folder of train.py, of a finished or a running run", positional=True)
    other_run: Folder = option("", "another one, to tell where the two part", positional=True)
    step: CountOrOff = option(0, "show the texts of this step instead, with each one's loss (0: none)")
    gradient_norms: bool = option(False, "with --step, show the norm of each text's gradient too")
    leak: NameOrFolder = option("", "check a model instead: may a token see what it must not?")
    json: bool = option(False, "print one object of JSON")


def config_text(config: TrainConfig) -> str:
    """Return the resolved configuration as YAML, which says the same in any folder: its paths are whole.

    What a command did to begin, to resume or to overwrite, is not part of what it ran.
    """
    values = asdict(replace(config, overwrite_output_dir=False, resume_from_checkpoint=""))
    for flag in flags_of(TrainConfig):
        value = values[flag.name]
        if flag.value_name in PATHS and value and (flag.value_name != "NAME_OR_FOLDER" or os.path.exists(value)):
            values[flag.name] = os.path.abspath(value)
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
