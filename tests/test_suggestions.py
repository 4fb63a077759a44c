"""What is said of a flag or a word that does not exist."""

import re
from dataclasses import fields

import pytest

from emoft.benchmark.config import BenchmarkConfig
from emoft.command_line import parse_config
from emoft.config import EvaluateConfig, GenerateConfig, GradientsConfig, TrainConfig
from emoft.errors import UserError
from emoft.export.config import ExportConfig
from emoft.suggestions import CHOICES, NOTES, WORDS, one_of, suggest

ALL = [TrainConfig, GenerateConfig, EvaluateConfig, GradientsConfig, BenchmarkConfig, ExportConfig]


def said(config_class, *words: str) -> str:
    with pytest.raises(UserError) as error:
        parse_config(config_class, words)
    assert "\n" not in str(error.value)
    return str(error.value)


TRAIN = """
    lr learning_rate | batch_size per_device_train_batch_size | bs per_device_train_batch_size
    epochs num_train_epochs | num_epochs num_train_epochs | fp16 mixed_precision fp16 | bf16 mixed_precision bf16
    output output_dir | out_dir output_dir | model model_name_or_path | init_from model_name_or_path
    checkpoint_dir model_name_or_path | checkpoint resume_from_checkpoint | data train_file | dataset dataset_name
    train_data train_file | eval_file validation_file | val_file validation_file | valid_file validation_file
    steps max_steps | max_iters max_steps | warmup warmup_steps | warmup_iters warmup_steps | grad_clip max_grad_norm
    clip max_grad_norm | accumulation_steps gradient_accumulation_steps | grad_accum gradient_accumulation_steps
    resume resume_from_checkpoint | overwrite overwrite_output_dir | logging logging_steps | log_every logging_steps
    log_interval logging_steps | eval_interval eval_steps | eval_strategy eval_steps | save_strategy save_steps
    seq_length max_length | block_size max_length | max_seq_length max_length | compile torch_compile
    num_samples max_train_samples | dtype mixed_precision | beta1 adam_beta1 | wd weight_decay
    decay_lr lr_scheduler_type | packing batching | dataset_text_field text_column | patience early_stopping_patience
    train.micro_batch_size per_device_train_batch_size | train.epochs num_train_epochs | eval.interval eval_steps
    optimizer.init_args.lr learning_rate | no_cuda use_cpu | fsdp parallel fsdp | n_layer config_overrides n_layer=4
    generate_every sample_every | preset config | text_file train_file | no_torch_compile torch_compile false
    no-use-cpu use_cpu false | Learning_Rate learning_rate | lerning_rate learning_rate | output-dirr output_dir
    checkpointing gradient_checkpointing | max_grad max_grad_norm | esed seed
"""
OTHERS = {
    GenerateConfig: """
        n num_return_sequences | num_samples num_return_sequences | length max_length | max_tokens max_new_tokens
        temp temperature | k top_k | sample do_sample | greedy do_sample false | label emotion | chat interactive
        prompt_file prompts_file | bs batch_size | model model_name_or_path
    """,
    EvaluateConfig: """
        data test_file | eval_file test_file | validation_file test_file | batch_size per_device_eval_batch_size
        samples generate | train_data train_file | output output_dir | no_json json false
    """,
    BenchmarkConfig: "batch_size batch_sizes | max_steps steps | nproc_per_node processes | data train_file",
    GradientsConfig: "josn json",
}


@pytest.mark.parametrize(
    ("config_class", "word", "meant"),
    [
        (config_class, *pair.split(maxsplit=1))
        for config_class, table in {TrainConfig: TRAIN, **OTHERS}.items()
        for pair in re.split(r"\||\n", table.strip())
    ],
)
def test_peoples_words_lead_to_ours(config_class, word: str, meant: str) -> None:
    assert said(config_class, f"--{word}", "3") == f"unknown flag --{word}, did you mean --{meant.strip()}?"


def test_with_one_dash_or_a_value_behind_an_equals_sign_too() -> None:
    assert said(TrainConfig, "-lr", "3") == "unknown flag -lr, did you mean --learning_rate?"
    assert said(TrainConfig, "--lr=3") == "unknown flag --lr, did you mean --learning_rate?"
    assert said(TrainConfig, "-max_length", "3") == "unknown flag -max_length, did you mean --max_length?"


@pytest.mark.parametrize(
    ("config_class", "word", "part"),
    [
        (TrainConfig, "device", "GPUs are used where there are any; --use_cpu stays on the CPU"),
        (TrainConfig, "use_gpu", "--use_cpu stays on the CPU"),
        (GenerateConfig, "device", "--use_cpu stays on the CPU"),
        (TrainConfig, "warmup_ratio", "--warmup_steps a number below 1"),
        (TrainConfig, "do_train", "it always trains"),
        (TrainConfig, "report_to", "TensorBoard"),
        (TrainConfig, "nproc_per_node", "torchrun"),
        (GenerateConfig, "output", "> FILE"),
        (GenerateConfig, "config", "its flags are given on the command line"),
        (EvaluateConfig, "config", "its flags are given on the command line"),
        (GradientsConfig, "config", "its flags are given on the command line"),
    ],
)
def test_where_no_flag_is_the_answer_a_sentence_is(config_class, word: str, part: str) -> None:
    message = said(config_class, f"--{word}", "x")
    assert message.startswith(f"{config_class.command.name} has no --{word}: ") and part in message


@pytest.mark.parametrize(
    ("config_class", "word"),
    [
        *((TrainConfig, word) for word in ("foo", "hlep", "temperature", "top_k", "prompt", "lora_r", "x", "max")),
        *((GenerateConfig, word) for word in ("lr", "train_file", "epochs", "resume", "logging_steps", "warmup_ratio")),
        *((EvaluateConfig, word) for word in ("lr", "epochs", "prompt", "interactive")),
        *((BenchmarkConfig, word) for word in ("lr", "report_to")),
    ],
)
def test_nothing_that_has_nothing_to_do_with_it_is_named(config_class, word: str) -> None:
    assert said(config_class, f"--{word}", "3") == f"unknown flag --{word}, see --help"


@pytest.mark.parametrize("config_class", ALL)
def test_no_message_names_a_flag_that_the_script_does_not_have(config_class) -> None:
    known = {each.name for each in fields(config_class)} | ({"config"} if config_class is TrainConfig else set())
    everyones = {word for words in [*WORDS.values(), *(words for words, _ in NOTES)] for word in words.split()}
    everyones |= {each.name for other in ALL for each in fields(other)} - known
    for word in everyones - known - {f"no_{name}" for name in known}:
        message = said(config_class, f"--{word}", "3")
        named = set(re.findall(r"--([\w.]+)", message.replace(f"--{word}", "", 1)))
        assert named <= known | {"help"}, message


def test_the_table_leads_to_flags_that_exist() -> None:
    known = {each.name for config_class in ALL for each in fields(config_class)} | {"config"}
    assert {ours.split()[0] for ours in WORDS} <= known
    assert {name for _, note in NOTES for name in re.findall(r"--(\w+)", note)} <= known


@pytest.mark.parametrize(
    ("word", "choices", "found"),
    [
        ("demmo", ["demo", "conditional"], "demo"),
        ("sadnes", ["sadness", "joy"], "sadness"),
        ("JOY", ["sadness", "joy"], "joy"),
        ("Sadnes", ["Sadness", "Joy"], "Sadness"),
        ("lin", ["linear", "cosine"], "linear"),
        ("constant_with_warmup", ["linear", "constant"], "constant"),
        ("float16", ["no", "bf16", "fp16"], "fp16"),
        ("fp32", ["auto", "no", "bf16", "fp16"], "no"),
        ("hunger", ["sadness", "joy"], ""),
        ("", ["sadness", "joy"], ""),
    ],
)
def test_suggest(word: str, choices: list[str], found: str) -> None:
    assert suggest(word, choices) == (f", did you mean {found}?" if found else "")
    assert all(name == name.lower() for name in CHOICES)


def test_one_of() -> None:
    assert [one_of(list(text)) for text in ("a", "ab", "abc")] == ["a", "a or b", "a, b or c"]
