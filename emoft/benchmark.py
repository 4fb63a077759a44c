"""How fast a training step is, beside transformers.Trainer and the machine's own limit: `python -m emoft.benchmark`.

Generation, beside transformers' pipeline, is measured in emoft/generation_benchmark.py, and classification, beside an
evaluation, in emoft/classification_benchmark.py.

Each contender trains in a process of its own. They take turns of a few steps, so that a machine whose speed drifts
drifts for all of them, and the limit is measured in the same turns.
"""

import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from emoft import errors
from emoft.batching import epoch_batches
from emoft.config import Count, Length, Positive, Seed, TrainConfig, option, parse_config
from emoft.distributed import World
from emoft.machine import Machine, least_seconds, measure_bandwidth, measure_flops, synchronize
from emoft.precision import Precision, choose_device
from emoft.scaling import compare_processes, format_scaling, measure_exchange, rank_environments
from emoft.template import TextFormat
from emoft.tracking import write_json

# Lengths in GPT-2 tokens of the 16,000 training messages of dair-ai/emotion (Saravia et al., EMNLP 2018), each as
# "Emotion: {text}", by percentile; their mean is 23.0. Drawn lengths are interpolated between these.
LENGTHS = {
    0: 5, 5: 9, 10: 10, 20: 13, 30: 15, 40: 18, 50: 21, 60: 24, 70: 27, 80: 32, 90: 39, 95: 46, 99: 58,
    99.9: 67, 100: 89,
}  # fmt: skip
TUTORIAL, TUNED, FLATTENED, EMOFT = (
    "Trainer, as in the tutorial",
    "Trainer, tuned",
    "Trainer, tuned, padding-free",
    "emoft",
)
BARE, MEASURED = "emoft, without what measures gradients", "emoft, gradients measured at every step"
ALONE, TOGETHER = "emoft, one process", "emoft, several processes"
CONTENDERS = {
    "trainer": (TUTORIAL, TUNED, FLATTENED, EMOFT),
    "gradients": (BARE, EMOFT, MEASURED),
    "processes": (ALONE, TOGETHER),
}


@dataclass
class BenchmarkConfig:
    """The flags of the benchmark."""

    model_name_or_path: str = option("", "a GPT-2 to train (empty: GPT-2 small with random weights)")
    train_file: str = option("", "texts to train on, as for train.py (empty: drawn token ids of real texts' lengths)")
    delimiter: str = option("", "as for train.py")
    compare: Literal["trainer", "gradients", "processes", "generation", "classification"] = option(
        "trainer",
        "a step of emoft with Trainer and the machine's limit, or with itself: what --log_gradients_every costs, or how"
        " it scales; or generation with transformers' pipeline; or classification with evaluation",
    )
    processes: Count = option(2, "with --compare processes: how many of a thread or GPU each, as torchrun starts them")
    link_gbit: Positive = option(10.0, "with it: gigabits a second of the link between hosts that the model assumes")
    batch_sizes: list[int] = field(default_factory=lambda: [4, 16], metadata={"help": "examples in a step"})
    turns: Count = option(5, "turns of each contender, after some warming up")
    steps: Count = option(5, "training steps in a turn")
    warmup_steps: Count = option(10, "training steps before the first turn")
    max_length: Length = option(64, "longest text in tokens")
    prompts: Count = option(64, "with generation: prompts in a turn; with classification: texts")
    max_new_tokens: Count = option(32, "with generation: longest continuation in tokens")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "of emoft and the tuned Trainer, as for train.py"
    )
    torch_compile: bool = option(False, "compile emoft's model")
    seed: Seed = option(42, "of weights, token ids, order and dropout")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")
    output_dir: str = option("emoft-benchmark", "folder of benchmark.json and benchmark.png")


def draw_lengths(count: int, max_length: int, seed: int) -> np.ndarray:
    """Return lengths in tokens like those of real messages, end-of-text included, cut to `max_length`."""
    uniform = np.random.default_rng(seed).uniform(0, 100, count)
    lengths = np.interp(uniform, list(LENGTHS), list(LENGTHS.values())).round().astype(int)
    return np.minimum(lengths + 1, max_length)


def draw_texts(config: BenchmarkConfig, count: int, vocabulary: int) -> list[list[int]]:
    """Return token ids drawn evenly from the vocabulary, of `draw_lengths`."""
    random = np.random.default_rng(config.seed)
    return [random.integers(vocabulary, size=n).tolist() for n in draw_lengths(count, config.max_length, config.seed)]


# ---- Contenders: each runs in a process, a few steps whenever it is its turn ----------------------------------------


class Turns:
    """A contender's side of the turns: called at the start of each step, it waits there while it is others' turn."""

    def __init__(self, pipe: Connection | None, device: torch.device, steps: int, warmup_steps: int) -> None:
        self.pipe, self.device, self.steps = pipe, device, steps
        self.left = warmup_steps
        self.waits = True  # for its first turn
        self.started = 0.0

    def __call__(self) -> None:
        """Count a step; at the end of a turn report its seconds and peak memory, and wait for the next turn."""
        if self.pipe is None:  # not rank 0, which the others wait for
            return
        if self.left == 0:
            synchronize(self.device)
            self.pipe.send({"seconds": time.perf_counter() - self.started, "peak": peak_memory(self.device)})
            self.waits, self.left = True, self.steps
        if self.waits:
            self.pipe.recv()
            self.waits = False
            reset_peak_memory(self.device)
            self.started = time.perf_counter()
        self.left -= 1


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process held since the last reset; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved()
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def load_texts_and_model(
    config: BenchmarkConfig, train_config: TrainConfig
) -> tuple[GPT2LMHeadModel, GPT2Tokenizer, TextFormat, list[list[int]]]:
    """Return what all contenders train: the model, and enough texts as token ids."""
    import train  # the script itself, which is no part of the package

    if config.train_file:
        model, tokenizer, text_format, splits = train.load_model_and_data(train_config, None)
        return model, tokenizer, text_format, splits["train"]["input_ids"]
    from emoft.model import load_model_and_tokenizer, train_tokenizer

    if config.model_name_or_path:
        model, tokenizer = load_model_and_tokenizer(train_config, [])
    else:
        torch.manual_seed(config.seed)
        model, tokenizer = GPT2LMHeadModel(GPT2Config()), train_tokenizer(["any text"], 257)
    steps = config.warmup_steps + (config.turns + 1) * config.steps + 2
    ranks = config.processes if config.compare == "processes" else 1
    examples = ranks * max(config.batch_sizes) * steps
    texts = draw_texts(config, examples, model.config.vocab_size)
    return model, tokenizer, TextFormat("{text}"), texts


class NoMonitor:
    """Stands for a loop that does not know of `emoft.gradients`: what it does costs nothing."""

    is_on = False

    def __init__(self, *arguments: object) -> None: ...

    def _nothing(self, *arguments: object) -> None: ...

    begin_step = before_update = after_update = _nothing
    listening = contextlib.nullcontext


def run_emoft(pipe: Connection | None, config: BenchmarkConfig, train_config: TrainConfig, kind: str) -> None:
    """Train by train.py's own function."""
    import train

    world = World.of_environment()
    if config.compare == "processes":
        torch.set_num_threads(1)
    if kind == MEASURED:
        train_config = replace(train_config, log_gradients_every=1)
    elif kind == BARE:
        setattr(train, "GradientMonitor", NoMonitor)  # noqa: B010  # a module's name, which mypy takes for fixed

    device = choose_device(config.use_cpu, world.local_rank)
    turns = Turns(pipe, device, config.steps, config.warmup_steps)

    def count_step(batch: dict[str, Any]) -> dict[str, Any]:  # called whenever a batch is fetched
        turns()
        return batch

    def load(train_config: TrainConfig, checkpoint: Path | None) -> Any:
        model, tokenizer, text_format, texts = load_texts_and_model(config, train_config)
        rows = Dataset.from_dict({"input_ids": texts})
        return model, tokenizer, text_format, {"train": rows.with_transform(count_step)}

    with world.only_main_speaks(), world.connected():
        train.train(train_config, world, load)


def run_trainer(pipe: Connection, config: BenchmarkConfig, train_config: TrainConfig, kind: str) -> None:
    """Train by transformers.Trainer, over the same texts in the same order: as the tutorial does, or tuned.

    Tuned is what its flags and the library's collators offer: half precision where the device has it, fused AdamW, and
    texts padded to the longest of a batch, or laid end to end.
    """
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

    model, tokenizer, _, texts = load_texts_and_model(config, train_config)
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
            output_dir=train_config.output_dir, per_device_train_batch_size=train_config.per_device_train_batch_size,
            num_train_epochs=1000, save_strategy="no", report_to=[], disable_tqdm=True, use_cpu=device.type == "cpu",
            train_sampling_strategy="sequential", **tuning,
        ),
        data_collator=collator,
        train_dataset=Dataset.from_list(rows),
        callbacks=[TakeTurns()],
    )  # fmt: skip
    trainer.train()


def run_logged(
    log: Path, rank: dict[str, str], run: Callable[..., None], pipe: Connection | None, *arguments: Any
) -> None:
    """Run in a process of its own, as a rank if it is told so; what it prints goes into a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(rank)
    run(pipe, *arguments)


def run_training(pipe: Connection | None, kind: str, config: BenchmarkConfig, train_config: TrainConfig) -> None:
    """Be a contender that trains, or a rank of one."""
    if pipe and kind in (TUTORIAL, TUNED, FLATTENED):
        run_trainer(pipe, config, train_config, kind)
    else:
        run_emoft(pipe, config, train_config, kind)


class Contender:
    """The benchmark's side of a contender, which runs `run(pipe, *arguments)`."""

    def __init__(self, kind: str, folder: Path, run: Callable[..., None], *arguments: Any, processes: int = 1) -> None:
        self.kind = kind
        self.log = folder / f"{kind}.log"
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        ranks = rank_environments(processes) if processes > 1 else [{}]
        self.processes = [
            context.Process(target=run_logged, args=(self.log, rank, run, pipe, *arguments), daemon=True)
            for rank, pipe in zip(ranks, [theirs, *[None] * (len(ranks) - 1)], strict=True)
        ]
        for process in self.processes:
            process.start()
        theirs.close()
        self.seconds: list[float] = []
        self.peak: int | None = None

    def turn(self) -> dict[str, Any]:
        """Let it run a turn.

        Raises:
            UserError: the process has ended, with the last line that it printed.
        """
        try:
            self.pipe.send("go")
            result: dict[str, Any] = self.pipe.recv()
            return result
        except (EOFError, BrokenPipeError, ConnectionResetError):
            lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
            raise errors.UserError(f"{self.kind} ended: {lines[-1] if lines else 'without a word'}") from None

    def count(self, seconds: float, peak: int | None) -> None:
        """Add what a turn took."""
        self.seconds.append(seconds)
        self.peak = max(filter(None, (self.peak, peak)), default=None)

    def stop(self) -> None:
        """End the process, at once: asked to stop, a training would finish its step first, which is not its turn."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()


# ---- The run and its report -----------------------------------------------------------------------------------------


@dataclass
class Row:
    """One line of the table: a contender at a batch size. Times are medians over the turns."""

    batch_size: int
    contender: str
    seconds_per_step: float
    samples_per_second: float
    tokens_per_second: float  # of the texts, without padding
    to_tutorial: float  # ratios of samples per second
    to_tuned: float
    to_padding_free: float
    share_of_limit: float
    peak_memory_gib: float | None


def take_turns(
    config: BenchmarkConfig, batch_size: int, bar: "tqdm[Any]"
) -> tuple[dict[str, "Contender"], list[Machine]]:
    """Let all contenders take turns at one batch size; the machine is measured after each round."""
    precision = Precision(config.mixed_precision, choose_device(config.use_cpu))
    with tempfile.TemporaryDirectory() as folder:
        train_config = TrainConfig(
            model_name_or_path=config.model_name_or_path, train_file=config.train_file, delimiter=config.delimiter,
            max_length=config.max_length, per_device_train_batch_size=batch_size, num_train_epochs=1000, save_steps=0,
            mixed_precision=config.mixed_precision, torch_compile=config.torch_compile, seed=config.seed,
            use_cpu=config.use_cpu,
        )  # fmt: skip
        contenders = [
            Contender(
                kind,
                Path(folder),
                run_training,
                kind,
                config,
                replace(train_config, output_dir=f"{folder}/{kind}"),
                processes=config.processes if kind == TOGETHER else 1,
            )  # fmt: skip
            for kind in CONTENDERS[config.compare]
        ]
        machines = []
        try:
            for turn in range(config.turns + 1):
                for contender in contenders:
                    bar.set_postfix_str(f"batch {batch_size}, {contender.kind}")
                    result = contender.turn()
                    if turn > 0:  # the first turn is to warm up
                        contender.count(result["seconds"] / config.steps, result["peak"])
                    bar.update()
                machines.append(Machine(measure_flops(precision), measure_bandwidth(precision)))
        finally:
            for contender in contenders:
                contender.stop()
    return {contender.kind: contender for contender in contenders}, machines


def compare_with_trainer(
    config: BenchmarkConfig, batch_size: int, contenders: dict[str, Contender], machines: list[Machine]
) -> list[Row]:
    """Return the table of one batch size: each contender beside Trainer and the machine's limit."""
    precision = Precision(config.mixed_precision, choose_device(config.use_cpu))
    # The texts of the measured steps, in the order of all contenders.
    model, texts = _model_and_lengths(config)
    batches = epoch_batches(len(texts), batch_size, config.seed, epoch=0)
    first = config.warmup_steps
    measured = [[texts[i] for i in batches[(first + n) % len(batches)]] for n in range(config.turns * config.steps)]
    tokens = sum(sum(lengths) for lengths in measured) / len(measured)
    best = Machine(max(m.flops for m in machines), max(m.bandwidth for m in machines))
    half = precision.dtype != torch.float32
    limit = statistics.fmean(least_seconds(best, model.config, lengths, half) for lengths in measured)
    times = {kind: statistics.median(contender.seconds) for kind, contender in contenders.items()}

    def row(name: str, seconds: float, peak: int | None = None) -> Row:
        return Row(
            batch_size, name, seconds, batch_size / seconds, tokens / seconds, times[TUTORIAL] / seconds,
            times[TUNED] / seconds, times[FLATTENED] / seconds, limit / seconds, None if peak is None else peak / 2**30,
        )  # fmt: skip

    rows = [row(kind, times[kind], contender.peak) for kind, contender in contenders.items()]
    return [*rows, row("the machine's limit", limit)]


def compare_with_itself(batch_size: int, contenders: dict[str, Contender]) -> dict[str, float]:
    """Return what measuring gradients costs at one batch size, as shares of a step that cannot measure any.

    Turn by turn, since the steps of a turn have the same texts; the median over the turns.
    """

    def cost(kind: str) -> float:
        pairs = zip(contenders[kind].seconds, contenders[BARE].seconds, strict=True)
        return statistics.median(seconds / bare - 1 for seconds, bare in pairs)

    return {
        "batch_size": batch_size,
        "seconds_per_step": statistics.median(contenders[BARE].seconds),
        "off": cost(EMOFT),
        "every_step": cost(MEASURED),
        "every_100_steps": cost(MEASURED) / 100,
    }


def _model_and_lengths(config: BenchmarkConfig) -> tuple[GPT2LMHeadModel, list[int]]:
    train_config = TrainConfig(
        model_name_or_path=config.model_name_or_path, train_file=config.train_file, delimiter=config.delimiter,
        max_length=config.max_length,
    )  # fmt: skip
    model, _, _, texts = load_texts_and_model(config, train_config)
    return model, [len(text) for text in texts]


def format_table(rows: list[Row]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| batch | step by | ms a step | samples/s | tokens/s | x tutorial | x tuned | x padding-free | share of limit"
        " | peak memory |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.2f} GiB"
        lines.append(
            f"| {row.batch_size} | {row.contender} | {row.seconds_per_step * 1000:,.0f} | {row.samples_per_second:,.1f}"
            f" | {row.tokens_per_second:,.0f} | {row.to_tutorial:.2f} | {row.to_tuned:.2f} | {row.to_padding_free:.2f}"
            f" | {row.share_of_limit:.0%} | {memory} |"
        )
    return "\n".join(lines)


def format_costs(costs: list[dict[str, float]]) -> str:
    """Return the costs of measuring gradients as a table in Markdown."""
    lines = [
        "| batch | ms a step | off | at every step | at every 100th step |",
        "| ---: | ---: | ---: | ---: | ---: |",
    ]
    for each in costs:
        lines.append(
            f"| {each['batch_size']} | {each['seconds_per_step'] * 1000:,.0f} | {each['off']:+.1%}"
            f" | {each['every_step']:+.0%} | {each['every_100_steps']:+.1%} |"
        )
    return "\n".join(lines)


def draw_chart(rows: list[Row], path: Path, title: str) -> None:
    """Write a bar chart of samples per second as PNG."""
    from matplotlib.figure import Figure

    sizes = sorted({row.batch_size for row in rows})
    names = list(dict.fromkeys(row.contender for row in rows))
    figure = Figure(figsize=(2.2 + 3.4 * len(sizes), 4), dpi=120, layout="constrained")
    axes = figure.subplots()
    colors = ["#9aa5b1", "#5b8db8", "#2f6690", "#e4572e", "#e8e4dc"]
    for number, name in enumerate(names):
        values = [row.samples_per_second for row in rows if row.contender == name]
        places = np.arange(len(sizes)) + (number - (len(names) - 1) / 2) * 0.17
        bars = axes.bar(places, values, 0.16, label=name, color=colors[number % len(colors)], edgecolor="#555555")
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
    axes.set_ylabel("samples per second")
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def describe_machine(device: torch.device) -> str:
    """Return the device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name()
    names: list[str] = []
    if Path("/proc/cpuinfo").exists():
        names = [line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                 if line.startswith("model name")]  # fmt: skip
    return f"{torch.get_num_threads()} threads on {names[0] if names else 'a CPU'}"


def main() -> int:
    """Read the flags, run the benchmark, report."""
    config = parse_config(BenchmarkConfig)
    if min(config.batch_sizes, default=0) < 1:
        raise errors.UserError("--batch_sizes must be whole numbers of at least 1, as in --batch_sizes 4 16")
    trains = config.compare not in ("generation", "classification")
    if trains and find_spec("accelerate") is None:
        raise errors.UserError("Trainer, the other side, needs the package accelerate: run pip install accelerate")
    if trains and not Path("train.py").is_file():
        raise errors.UserError("the benchmark runs train.py: start it in the folder that holds train.py")
    device = choose_device(config.use_cpu)
    precision = Precision(config.mixed_precision, device)
    machine = f"{describe_machine(device)}, {precision.name}, torch {torch.__version__}"
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    if not trains:
        from emoft.classification_benchmark import compare_classification
        from emoft.generation_benchmark import compare_generation

        compare = compare_generation if config.compare == "generation" else compare_classification
        table, compared = compare(config)
        report = {"machine": machine, "config": asdict(config), "rows": compared}
        write_json(output_dir / "benchmark.json", report)
        print(f"{machine}\n\n{table}\n\nsaved in {output_dir}")
        return 0
    rows: list[Row] = []
    costs: list[dict[str, float]] = []
    scaling: list[dict[str, float]] = []
    machines: list[Machine] = []
    turns = len(config.batch_sizes) * (config.turns + 1) * len(CONTENDERS[config.compare])
    with tqdm(total=turns, unit="turn", dynamic_ncols=True) as bar:
        for batch_size in config.batch_sizes:
            contenders, measured = take_turns(config, batch_size, bar)
            machines += measured
            if config.compare == "trainer":
                rows += compare_with_trainer(config, batch_size, contenders, measured)
            elif config.compare == "gradients":
                costs.append(compare_with_itself(batch_size, contenders))
            else:
                seconds = [contenders[kind].seconds for kind in (ALONE, TOGETHER)]
                scaling.append(compare_processes(batch_size, config.processes, *seconds))
    best = Machine(max(m.flops for m in machines), max(m.bandwidth for m in machines))
    rates = f"{best.flops / 1e12:.2f} TFLOP/s and {best.bandwidth / 1e9:.0f} GB/s measured"
    write_json(
        output_dir / "benchmark.json",
        {
            "machine": machine,
            **asdict(best),
            "config": asdict(config),
            "rows": [asdict(row) for row in rows],
            "costs": costs,
            "scaling": scaling,
        },
    )
    if scaling:
        gradient_bytes = 4 * sum(parameter.numel() for parameter in _model_and_lengths(config)[0].parameters())
        exchange = measure_exchange(config.processes)
        print(f"{machine}\n\n{format_scaling(scaling, gradient_bytes, exchange, config.link_gbit * 1e9 / 8)}")
        print(f"\nsaved in {output_dir}")
        return 0
    if costs:
        print(f"{machine}\n\n{format_costs(costs)}\n\nsaved in {output_dir}")
        return 0
    print(f"{machine}; {rates}\n\n{format_table(rows)}\n")
    if find_spec("matplotlib") is None:
        errors.warn("no chart without the package matplotlib: run pip install matplotlib")
    else:
        draw_chart(rows, output_dir / "benchmark.png", f"{machine}\n{rates}")
    print(f"saved in {output_dir}")
    return 0


if __name__ == "__main__":
    errors.run(main)
