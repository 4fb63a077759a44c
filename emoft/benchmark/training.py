"""Contenders that train: by emoft's own loop, and by transformers.Trainer, over the same texts in the same order."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import GPT2Config, GPT2LMHeadModel

import train
from emoft.benchmark.config import BenchmarkConfig
from emoft.benchmark.contenders import Contender, Turns
from emoft.benchmark.lengths import draw_lengths
from emoft.benchmark.machine import Machine, measure_bandwidth
from emoft.config import TrainConfig
from emoft.data.batching import epoch_batches
from emoft.data.template import TextFormat
from emoft.device import choose_device
from emoft.distributed.world import World
from emoft.model.loading import TextModel, load_model_and_tokenizer
from emoft.model.tokenizer import train_tokenizer
from emoft.terminal import Bar
from emoft.tracking.throughput import measure_flops
from emoft.training.precision import Precision

TUTORIAL, TUNED, FLATTENED, EMOFT = (
    "Trainer, as in the tutorial",
    "Trainer, tuned",
    "Trainer, tuned, padding-free",
    "emoft",
)
MEASURED = "emoft, gradients measured at every step"
ALONE, TOGETHER = "emoft, one process", "emoft, several processes"


def draw_texts(config: BenchmarkConfig, count: int, vocabulary: int) -> list[list[int]]:
    """Return token ids drawn evenly from the vocabulary, of `draw_lengths`."""
    random = np.random.default_rng(config.seed)
    return [random.integers(vocabulary, size=n).tolist() for n in draw_lengths(count, config.max_length, config.seed)]


def load_texts_and_model(config: BenchmarkConfig, train_config: TrainConfig) -> tuple[TextModel, list[list[int]]]:
    """Return what all contenders train: the model, and enough texts as token ids."""
    if config.train_file:
        text_model, splits = train.load_model_and_data(train_config, None)
        return text_model, splits["train"]["input_ids"]
    if config.model_name_or_path:
        model, tokenizer = load_model_and_tokenizer(train_config, [])
    else:
        torch.manual_seed(config.seed)
        model, tokenizer = GPT2LMHeadModel(GPT2Config()), train_tokenizer(["any text"], 257)
    steps = config.warmup_steps + (config.turns + 1) * config.steps + 2
    ranks = config.processes if config.compare == "processes" else 1
    examples = ranks * max(config.batch_sizes) * steps
    texts = draw_texts(config, examples, model.config.vocab_size)
    return TextModel(model, tokenizer, TextFormat("{text}")), texts


def model_and_lengths(config: BenchmarkConfig) -> tuple[GPT2LMHeadModel, list[int]]:
    """Return what all contenders train: the model, and the tokens of each text."""
    train_config = TrainConfig(
        model_name_or_path=config.model_name_or_path,
        train_file=config.train_file,
        delimiter=config.delimiter,
        max_length=config.max_length,
    )
    text_model, texts = load_texts_and_model(config, train_config)
    return text_model.model, [len(text) for text in texts]


def run_emoft(pipe: Connection | None, config: BenchmarkConfig, train_config: TrainConfig, kind: str) -> None:
    """Train by train.py's own function."""
    world = World.of_environment()
    if config.compare == "processes":
        torch.set_num_threads(1)
    if kind == MEASURED:
        train_config = replace(train_config, log_gradients_every=1)

    device = choose_device(config.use_cpu, world.local_rank)
    turns = Turns(pipe, device, config.steps, config.warmup_steps)

    def count_step(batch: dict[str, Any]) -> dict[str, Any]:  # called whenever a batch is fetched
        turns()
        return batch

    def load(train_config: TrainConfig, checkpoint: Path | None) -> Any:
        text_model, texts = load_texts_and_model(config, train_config)
        rows = Dataset.from_dict({"input_ids": texts})
        return text_model, {"train": rows.with_transform(count_step)}

    with world.only_main_speaks(), world.connected() as world:
        train.train(train_config, world, load)


def run_trainer(pipe: Connection, config: BenchmarkConfig, train_config: TrainConfig, kind: str) -> None:
    """Train by transformers.Trainer, over the same texts in the same order: as the tutorial does, or tuned.

    Tuned is what its flags and the library's collators offer: half precision where the device has it, fused AdamW, and
    texts padded to the longest of a batch, or laid end to end.
    """
    # Here, since emoft itself has no use for them.
    from transformers import (
        DataCollatorForLanguageModeling,
        DataCollatorWithFlattening,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    device = choose_device(config.use_cpu)
    turns = Turns(pipe, device, config.steps, config.warmup_steps)

    class TakeTurns(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns()

    text_model, texts = load_texts_and_model(config, train_config)
    model, tokenizer = text_model.model, text_model.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    batches = epoch_batches(len(texts), train_config.per_device_train_batch_size, config.seed, epoch=0)
    rows: list[dict[str, list[int]]] = [{"input_ids": texts[index]} for batch in batches for index in batch]
    collator: Any = DataCollatorForLanguageModeling(tokenizer=tokenizer, mlm=False)
    tuning: dict[str, Any] = {}
    if kind == TUTORIAL:
        width, pad_id = config.max_length, tokenizer.eos_token_id
        rows = [
            {
                "input_ids": row["input_ids"] + [pad_id] * (width - len(row["input_ids"])),
                "attention_mask": [1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])),
            }
            for row in rows
        ]
    else:
        precision = Precision(config.mixed_precision, device)
        tuning = {"bf16": precision.name == "bf16", "fp16": precision.name == "fp16", "optim": "adamw_torch_fused"}
        if kind == FLATTENED:
            collator = DataCollatorWithFlattening()
            model.config.use_cache = False  # with a cache, GPT-2 would take the row for a single text
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=train_config.output_dir,
            per_device_train_batch_size=train_config.per_device_train_batch_size,
            num_train_epochs=1000,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
            train_sampling_strategy="sequential",
            **tuning,
        ),
        data_collator=collator,
        train_dataset=Dataset.from_list(rows),
        callbacks=[TakeTurns()],
    )
    trainer.train()


def run_training(pipe: Connection | None, kind: str, config: BenchmarkConfig, train_config: TrainConfig) -> None:
    """Be a contender that trains, or a rank of one."""
    if pipe and kind in (TUTORIAL, TUNED, FLATTENED):
        run_trainer(pipe, config, train_config, kind)
    else:
        run_emoft(pipe, config, train_config, kind)


def take_all_turns(
    config: BenchmarkConfig, kinds: Sequence[str], run: Callable[..., None] = run_training
) -> dict[int, tuple[dict[str, Contender], list[Machine]]]:
    """Let contenders take turns at each batch size; the machine is measured after each round.

    Args:
        config: of the benchmark.
        kinds: the contenders.
        run: is called in the process of each with its pipe, its kind, `config`, and the flags of a training.

    Returns:
        By batch size, the contenders by kind, with what their turns took, and what the machine did after each round.
    """
    with Bar("Comparing", "turns", len(config.batch_sizes) * (config.turns + 1) * len(kinds)) as bar:
        return {batch_size: _take_turns(config, kinds, run, batch_size, bar) for batch_size in config.batch_sizes}


def _take_turns(
    config: BenchmarkConfig, kinds: Sequence[str], run: Callable[..., None], batch_size: int, bar: Bar
) -> tuple[dict[str, "Contender"], list[Machine]]:
    precision = Precision(config.mixed_precision, choose_device(config.use_cpu))
    with tempfile.TemporaryDirectory() as folder:
        train_config = TrainConfig(
            model_name_or_path=config.model_name_or_path,
            train_file=config.train_file,
            delimiter=config.delimiter,
            max_length=config.max_length,
            per_device_train_batch_size=batch_size,
            num_train_epochs=1000,
            save_steps=0,
            mixed_precision=config.mixed_precision,
            torch_compile=config.torch_compile,
            seed=config.seed,
            use_cpu=config.use_cpu,
        )
        contenders = [
            Contender(
                kind,
                Path(folder),
                run,
                kind,
                config,
                replace(train_config, output_dir=f"{folder}/{kind}"),
                processes=config.processes if kind == TOGETHER else 1,
            )
            for kind in kinds
        ]
        machines = []
        try:
            for turn in range(config.turns + 1):
                for contender in contenders:
                    bar.note = f"batch {batch_size}, {contender.kind}"
                    result = contender.turn()
                    if turn > 0:  # the first turn is to warm up
                        contender.count(result["seconds"] / config.steps, result["peak"])
                    bar.advance()
                machines.append(Machine(measure_flops(precision), measure_bandwidth(precision)))
        finally:
            for contender in contenders:
                contender.stop()
    return {contender.kind: contender for contender in contenders}, machines
