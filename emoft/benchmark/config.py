"""The flags of the benchmark, and what a comparison reports."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from emoft.flags import Command, Count, File, Folder, Length, NameOrFolder, Positive, Seed, option


@dataclass
class BenchmarkConfig:
    """The flags of `python -m emoft.benchmark`."""

    command: ClassVar[Command] = Command(
        "emoft.benchmark",
        "Measure how fast emoft is, in turns with what it is compared with. Without any flag: a training step of GPT-2"
        " small beside transformers' Trainer and the machine's own limit. It is run where train.py lies.",
        {
            "python -m emoft.benchmark --batch_sizes 4": "a training step at batch 4",
            "python -m emoft.benchmark --compare generation --turns 2": "generation beside transformers' pipeline",
        },
        file_flag="train_file",
    )

    compare: Literal["trainer", "gradients", "processes", "ladder", "shared", "generation", "classification"] = option(
        "trainer",
        "a step of emoft with Trainer and the machine's limit, or with itself: what --log_gradients_every costs, or how"
        " it scales; a plain loop, to which one optimization after another is added (ladder); trainings beside a busy"
        " process (shared); generation with transformers' pipeline; or classification with evaluation",
        begins_group="Comparison",
    )
    processes: Count = option(2, "with --compare processes: how many of a thread or GPU each, as torchrun starts them")
    link_gbit: Positive = option(
        10.0, "with --compare processes: gigabits a second of the link between hosts that the model assumes"
    )

    model_name_or_path: NameOrFolder = option(
        "", "a GPT-2 to train (empty: GPT-2 small with random weights)", begins_group="Model and texts"
    )
    train_file: File = option("", "texts to train on, as for train.py (empty: drawn token ids of real texts' lengths)")
    delimiter: str = option("", "as for train.py")
    max_length: Length = option(64, "longest text in tokens")
    seed: Seed = option(42, "of weights, token ids, order and dropout")

    batch_sizes: list[Count] = option([4, 16], "examples in a step", begins_group="Turns")
    turns: Count = option(5, "turns of each contender, after some warming up")
    steps: Count = option(5, "training steps in a turn")
    warmup_steps: Count = option(10, "training steps before the first turn")
    prompts: Count = option(64, "with generation: prompts in a turn; with classification: texts")
    max_new_tokens: Count = option(32, "with generation: longest continuation in tokens")
    greedy: bool = option(False, "with generation: take the likeliest token each time instead of drawing it")

    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = option(
        "auto", "of emoft and the tuned Trainer, as for train.py", begins_group="Speed and output"
    )
    torch_compile: bool = option(False, "compile emoft's model")
    use_cpu: bool = option(False, "stay on the CPU where there is a GPU")
    output_dir: Folder = option("emoft-benchmark", "folder of benchmark.json and benchmark.png")


@dataclass
class Report:
    """What a comparison found."""

    table: str  # in Markdown
    content: dict[str, Any]  # of benchmark.json
