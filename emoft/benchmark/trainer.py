"""A training step beside transformers.Trainer's and the machine's limit, which is measured in the same turns."""

import statistics
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.contenders import Contender
from emoft.benchmark.device import describe_machine
from emoft.benchmark.machine import Machine, least_seconds
from emoft.benchmark.training import EMOFT, FLATTENED, TUNED, TUTORIAL, model_and_lengths, take_all_turns
from emoft.data.batching import epoch_batches
from emoft.device import choose_device
from emoft.errors import UserError, warn
from emoft.training.precision import Precision


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


def compare_trainer(config: BenchmarkConfig) -> Report:
    """Let all take turns at each batch size, and draw the chart.

    Raises:
        UserError: a package that Trainer needs is missing.
    """
    if find_spec("accelerate") is None:
        raise UserError("Trainer, the other side, needs the package accelerate: run pip install accelerate")
    rows: list[Row] = []
    machines: list[Machine] = []
    for batch_size, (contenders, measured) in take_all_turns(config, (TUTORIAL, TUNED, FLATTENED, EMOFT)).items():
        rows += rows_of(config, batch_size, contenders, measured)
        machines += measured
    best = Machine(max(m.flops for m in machines), max(m.bandwidth for m in machines))
    rates = f"{best.flops / 1e12:.2f} TFLOP/s and {best.bandwidth / 1e9:.0f} GB/s measured"
    if find_spec("matplotlib") is None:
        warn("no chart without the package matplotlib: run pip install matplotlib")
    else:
        draw_chart(rows, Path(config.output_dir) / "benchmark.png", f"{describe_machine(config)}\n{rates}")
    return Report(f"{rates}\n\n{format_table(rows)}", {**asdict(best), "rows": [asdict(row) for row in rows]})


def rows_of(
    config: BenchmarkConfig, batch_size: int, contenders: dict[str, Contender], machines: list[Machine]
) -> list[Row]:
    """Return the table of one batch size: each contender beside Trainer and the machine's limit."""
    precision = Precision(config.mixed_precision, choose_device(config.use_cpu))
    # The texts of the measured steps, in the order of all contenders.
    model, texts = model_and_lengths(config)
    batches = epoch_batches(len(texts), batch_size, config.seed, epoch=0)
    first = config.warmup_steps
    measured = [[texts[i] for i in batches[(first + n) % len(batches)]] for n in range(config.turns * config.steps)]
    tokens = sum(sum(lengths) for lengths in measured) / len(measured)
    best = Machine(max(m.flops for m in machines), max(m.bandwidth for m in machines))
    half = precision.dtype != torch.float32
    limit = statistics.fmean(least_seconds(best, model.config, lengths, half) for lengths in measured)
    times = {kind: statistics.median(contender.seconds) for kind, contender in contenders.items()}

    def row(name: str, seconds: float, peak: int | None = None) -> Row:
        """Return the row of what takes so many seconds a step, and holds so many bytes at most."""
        return Row(
            batch_size,
            name,
            seconds,
            batch_size / seconds,
            tokens / seconds,
            times[TUTORIAL] / seconds,
            times[TUNED] / seconds,
            times[FLATTENED] / seconds,
            limit / seconds,
            None if peak is None else peak / 2**30,
        )

    rows = [row(kind, times[kind], contender.peak) for kind, contender in contenders.items()]
    return [*rows, row("the machine's limit", limit)]


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


def draw_chart(rows: list[Row], path: Path, title: str) -> None:
    """Write a bar chart of samples per second as PNG."""
    from matplotlib.figure import Figure  # here, since it need not be installed

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
