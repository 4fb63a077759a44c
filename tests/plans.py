"""Compare what `train.py --plan` tells with what the same runs then use and take: `python tests/plans.py`.

Takes about ten minutes on two cores. Prints a line for each run, with the ratio of plan to run; above 1.15 or below
1 / 1.15 it is marked.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, logging

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))  # run as a script, it finds the package beside its folder

from emoft.command_line import parse_config  # noqa: E402
from emoft.config import TrainConfig  # noqa: E402
from emoft.data.reading import read_splits  # noqa: E402
from emoft.model.tokenizer import train_tokenizer  # noqa: E402

WORDS = [
    "--max_steps",
    "40",
    "--max_eval_samples",
    "60",
    "--mixed_precision",
    "auto",
    "--save_steps",
    "0",
    "--logging_steps",
    "10",
]


def make_model(folder: Path) -> None:
    """GPT-2 small with random weights, and a tokenizer of the sample's texts, whose ids are fewer than its rows."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(0)
    splits, text_format = read_splits(presets("demo"))
    tokenizer = train_tokenizer((text_format.fill(**row) for row in splits["train"]), 8000)
    # As many rows as GPT-2 has: the sample's texts have fewer tokens, the others are names that do not occur.
    tokenizer.add_tokens([f"<{number}>" for number in range(50257 - len(tokenizer))])
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def presets(name: str) -> TrainConfig:
    """Return the flags of a preset."""
    return parse_config(TrainConfig, ["--config", name])


def run(*words: str) -> tuple[str, float, int]:
    """Return what train.py prints, the seconds it takes and the most bytes it holds."""
    started = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out:
        process = subprocess.Popen([sys.executable, str(ROOT / "train.py"), *words], stdout=out, stderr=out)
        _, status, used = os.wait4(process.pid, 0)
        out.seek(0)
        text = out.read()
    assert os.waitstatus_to_exitcode(status) == 0, text
    return text, time.perf_counter() - started, used.ru_maxrss * 1024


def seconds(row: str) -> float:
    """Return the time that a row of a plan tells."""
    if found := re.search(r"([\d.]+) s$", row):
        return float(found[1])
    parts = [int(part) for part in row.split()[-1].split(":")]
    return sum(part * 60**place for place, part in enumerate(reversed(parts)))


def row(plan: str, part: str, name: str) -> str:
    """Return the row of a plan whose name contains some text."""
    return next(line for line in plan.split(f"\n{part}\n")[1].splitlines() if name in line)


def compare(name: str, *words: str) -> list[float]:
    """Plan a run, run it, print a line and return the ratios: of the steps' time, of all time, and of the memory."""
    with tempfile.TemporaryDirectory() as folder:
        words = (*words, "--output_dir", f"{folder}/run")
        plan, planning, _ = run(*words, "--plan")
        assert not Path(folder, "run").exists(), "a plan leaves nothing"
        _, wall, held = run(*words)
        results = json.loads(Path(folder, "run", "all_results.json").read_text())
    steps = seconds(row(plan, "Time", " steps ")), results["train_runtime"]
    memory = float(re.search(r"([\d.]+) GiB", row(plan, "Memory", "all, at most"))[1]) * 2**30, held  # type: ignore[index]
    every = seconds(row(plan, "Time", "all ")), wall
    print(
        f"| {name} | {planning:.0f} s | {steps[0]:.1f} / {steps[1]:.1f} s | {every[0]:.1f} / {every[1]:.1f} s |"
        f" {memory[0] / 2**30:.2f} / {memory[1] / 2**30:.2f} GiB |",
        flush=True,
    )
    return [steps[0] / steps[1], every[0] / every[1], memory[0] / memory[1]]


if __name__ == "__main__":
    print("| run | planned in | steps, told / taken | all | memory |\n| --- | ---: | ---: | ---: | ---: |")
    compare("demo", "--config", "demo")
    with tempfile.TemporaryDirectory() as model:
        make_model(Path(model))
        for size in (4, 16):
            for batching in ("packed", "padded"):
                flags = presets("demo")
                words = ["--model_name_or_path", model, "--train_file", flags.train_file, "--validation_file"]
                words += [flags.validation_file, "--template", flags.template, "--batching", batching, *WORDS]
                compare(f"GPT-2 small, {size}, {batching}", *words, "--per_device_train_batch_size", str(size))
