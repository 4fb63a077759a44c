"""How fast texts are generated, beside other ways to do it: many prompts at once, and a single one.

All continue the same prompts by the same settings and the same number of tokens: like is compared with like, many at
once with many at once, in one precision. `pipeline("text-generation")` comes twice, since by its defaults it takes a
prompt at a time in float32. CTranslate2 and ONNX Runtime take part where they are installed.
"""

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers.utils import logging as transformers_logging

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.contenders import Contender
from emoft.benchmark.generators import PACKAGES, Setting, contenders_of
from emoft.benchmark.lengths import draw_lengths
from emoft.benchmark.machine import measure_bandwidth
from emoft.data.tokens import decode
from emoft.device import choose_device, peak_memory, reset_peak_memory, synchronize
from emoft.model.generation import encode_prompt
from emoft.model.loading import load_model
from emoft.model.tokenizer import load_tokenizer, train_tokenizer
from emoft.terminal import Bar
from emoft.tracking.throughput import block_weights
from emoft.training.precision import Precision

SENTENCE = "i feel that this day was like no other before it and still like all of them"
WARMUP_PROMPTS = 2


@dataclass
class GenerationRow:
    """One line of the table: medians over the turns."""

    contender: str
    tokens_per_second: float  # of all prompts together
    to_emoft: float
    tokens_per_second_of_one: float  # of a single prompt
    first_token_seconds: float  # of a single prompt
    share_of_bandwidth: float  # of a single prompt, after its first token: all weights read once for each
    peak_memory_gib: float | None


def draw_prompts(count: int, seed: int, tokenizer: GPT2Tokenizer) -> list[str]:
    """Return prompts of different lengths: a third of the tokens that real messages have."""
    words, lengths = SENTENCE.split(), draw_lengths(count, 64, seed) // 3
    texts = [" ".join((words * 9)[number % len(words) :]) for number in range(count)]
    tokens = [encode_prompt(tokenizer, text)[: max(1, length)] for text, length in zip(texts, lengths, strict=True)]
    return [decode(tokenizer, ids) for ids in tokens]


def load(name: str, seed: int) -> tuple[GPT2LMHeadModel, GPT2Tokenizer]:
    """Return the model of a folder, or GPT-2 small with random weights and a tokenizer of bytes."""
    if name:
        return load_model(name), load_tokenizer(name)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["any text"], 257)
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(GPT2Config(bos_token_id=end, eos_token_id=end)), tokenizer


def run_generation(pipe: Connection, kind: str, config: BenchmarkConfig) -> None:
    """Be a contender: whenever it is its turn, continue all prompts, then one, and tell the seconds and the memory.

    The first turn is to prepare, so that none does it while another is measured.
    """
    pipe.recv()
    device = choose_device(config.use_cpu)
    transformers_logging.disable_progress_bar()
    build, arguments = contenders_of(config)[kind]
    model, tokenizer = load(config.model_name_or_path, config.seed)
    prompts = draw_prompts(config.prompts, config.seed, tokenizer)
    generate = build(Setting(model, tokenizer, device, config), *arguments)

    def measure(part: list[str], count: int) -> tuple[float, int]:
        torch.manual_seed(config.seed)
        synchronize(device)
        started = time.perf_counter()
        made = generate(part, count)
        synchronize(device)
        return time.perf_counter() - started, made

    generate(prompts[:WARMUP_PROMPTS], 2)
    pipe.send({})
    while True:
        pipe.recv()
        reset_peak_memory(device)
        result: dict[str, float | None] = {"first": min(measure(prompts[:1], 1)[0] for _ in range(3))}
        seconds, made = measure(prompts, config.max_new_tokens)
        result["rate"] = made / seconds
        seconds, made = measure(prompts[:1], 2 * config.max_new_tokens)
        result |= {"one": made / seconds, "later": (made - 1) / max(1e-9, seconds - float(result["first"] or 0))}
        pipe.send(result | {"peak": peak_memory(device)})


@contextmanager
def started(names: list[str], config: BenchmarkConfig) -> Iterator[list[Contender]]:
    """Start all contenders, and end them."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(name, Path(folder), run_generation, name, config) for name in names]
        try:
            yield contenders
        finally:
            for contender in contenders:
                contender.stop()


def weight_bytes(name: str, config: BenchmarkConfig, device: torch.device) -> int:
    """Return the bytes of the weights that one token of a single prompt needs, in a contender's type."""
    model = GPT2Config.from_pretrained(config.model_name_or_path) if config.model_name_or_path else GPT2Config()
    in_float32 = device.type == "cpu" or name == "pipeline, by its defaults" or "float32" in name
    size = 1 if "int8" in name else 4 if in_float32 else Precision(config.mixed_precision, device).dtype.itemsize
    return size * (block_weights(model) + model.n_embd * model.vocab_size)


def compare_generation(config: BenchmarkConfig) -> Report:
    """Let all take turns."""
    names, device = list(contenders_of(config)), choose_device(config.use_cpu)
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with (
        started(names, config) as contenders,
        Bar("Comparing", "turns", (1 + config.turns) * len(contenders)) as bar,
    ):
        for contender in contenders:
            bar.note = f"preparing {contender.kind}"
            contender.turn()
            bar.advance()
        for contender in contenders * config.turns:
            bar.note = contender.kind
            results[contender.kind].append(contender.turn())
            bar.advance()
    bandwidth = measure_bandwidth(Precision("no", device))
    median = {
        name: {key: statistics.median(turn[key] for turn in turns) for key in ("rate", "one", "first", "later")}
        for name, turns in results.items()
    }
    rows = []
    for name, turns in results.items():
        peaks = [turn["peak"] for turn in turns if turn["peak"] is not None]
        rows.append(
            GenerationRow(
                name,
                median[name]["rate"],
                median[name]["rate"] / median["emoft"]["rate"],
                median[name]["one"],
                median[name]["first"],
                weight_bytes(name, config, device) * median[name]["later"] / bandwidth,
                max(peaks) / 2**30 if peaks else None,
            )
        )
    lines = [
        f"{config.prompts} prompts x {config.max_new_tokens} tokens; then one x {2 * config.max_new_tokens}\n",
        "| generated by | tokens/s | x emoft | one prompt: tokens/s | first token | of the bandwidth | peak memory |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.2f} GiB"
        lines.append(
            f"| {row.contender} | {row.tokens_per_second:,.0f} | {row.to_emoft:.2f}"
            f" | {row.tokens_per_second_of_one:,.0f} | {1000 * row.first_token_seconds:,.0f} ms"
            f" | {row.share_of_bandwidth:.0%} | {memory} |"
        )
    missing = [name for name, package in PACKAGES.items() if not importlib.util.find_spec(package)]
    if missing:
        lines.append(f"\nnot compared, since not installed: {', '.join(missing)}")
    return Report("\n".join(lines), {"rows": [asdict(row) for row in rows], "bandwidth_gb_per_second": bandwidth / 1e9})
