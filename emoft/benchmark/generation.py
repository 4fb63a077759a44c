"""How fast texts are generated, beside `pipeline("text-generation")`.

Both continue the same prompts with the same settings, those that are the pipeline's defaults (sampling at a temperature
of 0.7), but for the number of new tokens. The pipeline comes as it is: a prompt at a time, in float32. emoft computes
as generate.py does.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.contenders import Contender
from emoft.benchmark.lengths import draw_lengths
from emoft.config import GenerateConfig
from emoft.device import choose_device, peak_memory, reset_peak_memory, synchronize
from emoft.model.generation import choose_generation_precision, generate_all
from emoft.model.kernels import use_fast_kernels
from emoft.model.loading import load_model
from emoft.model.tokenizer import load_tokenizer, train_tokenizer
from emoft.terminal import Bar

PIPELINE, EMOFT = "pipeline, by its defaults", "emoft, by its defaults"
SENTENCE = "i feel that this day was like no other before it and still like all of them"
WARMUP_PROMPTS = 2
TEMPERATURE, TOP_K = 0.7, 50  # the pipeline's


@dataclass
class GenerationRow:
    """One line of the table. Seconds are of all prompts, the median over the turns."""

    contender: str
    seconds: float
    prompts_per_second: float
    to_pipeline: float
    peak_memory_gib: float | None


def draw_prompts(count: int, seed: int) -> list[str]:
    """Return prompts of different lengths, in words a third of those that messages have in tokens."""
    lengths = draw_lengths(count, 64, seed) // 3
    spoken = SENTENCE.split()
    return [" ".join((spoken * 4)[number % len(spoken) :][: max(1, length)]) for number, length in enumerate(lengths)]


def load(name: str, seed: int) -> tuple[GPT2LMHeadModel, GPT2Tokenizer]:
    """Return the model of a folder, or GPT-2 small with random weights and a tokenizer of bytes."""
    if name:
        return load_model(name), load_tokenizer(name)
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(["any text"], 257)
    end = tokenizer.eos_token_id
    return GPT2LMHeadModel(GPT2Config(bos_token_id=end, eos_token_id=end)), tokenizer


def run_generation(pipe: Connection, kind: str, config: BenchmarkConfig) -> None:
    """Be a contender: whenever it is its turn, continue all prompts, and tell the seconds and the peak memory."""
    device = choose_device(config.use_cpu)
    model, tokenizer = load(config.model_name_or_path, config.seed)
    prompts = draw_prompts(config.prompts, config.seed)
    generate = (_by_pipeline if kind == PIPELINE else _by_emoft)(model, tokenizer, device, config)
    generate(prompts[:WARMUP_PROMPTS])
    while True:
        pipe.recv()
        reset_peak_memory(device)
        torch.manual_seed(config.seed)
        synchronize(device)
        started = time.perf_counter()
        generate(prompts)
        synchronize(device)
        pipe.send({"seconds": time.perf_counter() - started, "peak": peak_memory(device)})


def _by_pipeline(
    model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, device: torch.device, config: BenchmarkConfig
) -> Callable[[list[str]], object]:
    from transformers import pipeline  # here, since emoft itself has no use for it

    generator = pipeline("text-generation", model=model, tokenizer=tokenizer, device=device)
    return lambda prompts: generator(prompts, max_new_tokens=config.max_new_tokens)


def _by_emoft(
    model: GPT2LMHeadModel, tokenizer: GPT2Tokenizer, device: torch.device, config: BenchmarkConfig
) -> Callable[[list[str]], object]:
    model.to(device)  # type: ignore[arg-type]  # a fault of the library's types
    use_fast_kernels(model)
    model.eval()
    batch_size = GenerateConfig.batch_size
    precision = choose_generation_precision(config.mixed_precision, device, min(batch_size, config.prompts))
    return lambda prompts: list(
        generate_all(
            model,
            tokenizer,
            prompts,
            batch_size,
            precision,
            max_new_tokens=config.max_new_tokens,
            do_sample=True,
            temperature=TEMPERATURE,
            top_k=TOP_K,
        )
    )


def compare_generation(config: BenchmarkConfig) -> Report:
    """Let both take turns."""
    with tempfile.TemporaryDirectory() as folder:
        contenders = [Contender(kind, Path(folder), run_generation, kind, config) for kind in (PIPELINE, EMOFT)]
        try:
            with Bar("Comparing", "turns", config.turns * len(contenders)) as bar:
                for contender in contenders * config.turns:
                    bar.note = contender.kind
                    result = contender.turn()
                    contender.count(result["seconds"], result["peak"])
                    bar.advance()
        finally:
            for contender in contenders:
                contender.stop()
    seconds = {contender.kind: statistics.median(contender.seconds) for contender in contenders}
    rows = [
        GenerationRow(
            kind,
            seconds[kind],
            config.prompts / seconds[kind],
            seconds[PIPELINE] / seconds[kind],
            None if contender.peak is None else contender.peak / 2**30,
        )
        for kind, contender in zip(seconds, contenders, strict=True)
    ]
    lines = [
        f"{config.prompts} prompts, at most {config.max_new_tokens} new tokens each\n",
        "| generated by | seconds | prompts/s | x pipeline | peak memory |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.2f} GiB"
        lines.append(
            f"| {row.contender} | {row.seconds:,.1f} | {row.prompts_per_second:,.2f} | {row.to_pipeline:.1f}"
            f" | {memory} |"
        )
    return Report("\n".join(lines), {"rows": [asdict(row) for row in rows]})
