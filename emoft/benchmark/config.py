"""The flags of the benchmark, what it reports, and the lengths of the texts that it draws."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from emoft.config import Count, Length, Positive, Seed, option
from emoft.training.precision import Precision, choose_device

# Lengths in GPT-2 tokens of the 16,000 training messages of dair-ai/emotion (Saravia et al., EMNLP 2018), each as
# "Emotion: {text}", by percentile; their mean is 23.0. Drawn lengths are interpolated between these.
LENGTHS = {
    0: 5,
    5: 9,
    10: 10,
    20: 13,
    30: 15,
    40: 18,
    50: 21,
    60: 24,
    70: 27,
    80: 32,
    90: 39,
    95: 46,
    99: 58,
    99.9: 67,
    100: 89,
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


@dataclass
class Report:
    """What a comparison found."""

    table: str  # in Markdown
    content: dict[str, Any]  # of benchmark.json


def draw_lengths(count: int, max_length: int, seed: int) -> np.ndarray:
    """Return lengths in tokens like those of real messages, end-of-text included, cut to `max_length`."""
    uniform = np.random.default_rng(seed).uniform(0, 100, count)
    lengths = np.interp(uniform, list(LENGTHS), list(LENGTHS.values())).round().astype(int)
    return np.minimum(lengths + 1, max_length)


def describe_machine(config: BenchmarkConfig) -> str:
    """Return the device, the precision of emoft on it, and torch's version, in words."""
    device = choose_device(config.use_cpu)
    beside = f"{Precision(config.mixed_precision, device).name}, torch {torch.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name()}, {beside}"
    names: list[str] = []
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    return f"{torch.get_num_threads()} threads on {names[0] if names else 'a CPU'}, {beside}"
