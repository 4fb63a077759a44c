"""How fast texts are generated, beside other ways to do it: many prompts at once, and a single one.

All continue the same prompts by the same settings and the same number of tokens: like is compared with like, many at
once with many at once, in one precision. `pipeline("text-generation")` comes twice, since by its defaults it takes a
prompt at a time in float32. CTranslate2 and ONNX Runtime take part where they are installed.
"""

import copy
import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer
from transformers.utils import logging as transformers_logging

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.contenders import Contender
from emoft.benchmark.lengths import draw_lengths
from emoft.benchmark.machine import measure_bandwidth
from emoft.data.tokens import decode
from emoft.device import choose_device, peak_memory, reset_peak_memory, synchronize
from emoft.model.decoding import build_decoder
from emoft.model.generation import choose_generation_precision, encode_prompt, generate_all
from emoft.model.loading import load_model
from emoft.model.sampling import Sampling
from emoft.model.tokenizer import load_tokenizer, train_tokenizer
from emoft.terminal import Bar
from emoft.tracking.throughput import block_weights
from emoft.training.precision import Precision

SENTENCE = "i feel that this day was like no other before it and still like all of them"
WARMUP_PROMPTS = 2
TEMPERATURE, TOP_K = 0.7, 50  # the pipeline's

PACKAGES = {"CTranslate2": "ctranslate2", "ONNX Runtime": "onnxruntime"}  # which take part where they are installed

# Continues prompts by at most so many tokens each, and returns how many it made: texts may end before.
Continue = Callable[[list[str], int], int]


@dataclass
class Setting:
    """What a contender is given."""

    model: GPT2LMHeadModel
    tokenizer: GPT2Tokenizer
    device: torch.device
    config: BenchmarkConfig

    def precision(self, texts: int) -> Precision:
        """Return that of emoft and of those that compute like it, as generate.py chooses it."""
        return choose_generation_precision(self.config.mixed_precision, self.device, texts)

    def drawing(self) -> dict[str, Any]:
        """Return how tokens are chosen, by the words of `GenerationConfig`."""
        draws = {"do_sample": True, "temperature": TEMPERATURE, "top_k": TOP_K}
        return {"do_sample": False} if self.config.greedy else draws


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


def by_emoft(setting: Setting, int8: bool = False) -> Continue:
    """As generate.py does."""
    model = setting.model.to(setting.device).eval()  # type: ignore[arg-type]  # a fault of the library's types
    decoders = {texts: build_decoder(model, setting.precision(texts), int8) for texts in (1, setting.config.prompts)}

    def generate(prompts: list[str], count: int) -> int:
        decoder = decoders[1 if len(prompts) == 1 else setting.config.prompts]
        options: dict[str, Any] = setting.drawing()
        results = generate_all(decoder, setting.tokenizer, prompts, len(prompts), max_new_tokens=count, **options)
        return sum(result.new_tokens + result.finished for (result,) in results)

    return generate


def up_to(end: int, row: list[int]) -> int:
    """Return the number of tokens up to the first end-of-text, itself included."""
    return row.index(end) + 1 if end in row else len(row)


def by_generate(setting: Setting) -> Continue:
    """As one would by hand: padded on the left, `model.generate` under autocast."""
    model = setting.model.to(setting.device).eval()  # type: ignore[arg-type]  # a fault of the library's types
    end = setting.tokenizer.eos_token_id

    def generate(prompts: list[str], count: int) -> int:
        texts = [encode_prompt(setting.tokenizer, prompt) for prompt in prompts]
        width = max(map(len, texts))
        ids = torch.tensor([[end] * (width - len(text)) + text for text in texts], device=setting.device)
        mask = torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts], device=setting.device)
        with setting.precision(len(prompts)).autocast():
            output: Any = model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=count,
                pad_token_id=end,
                **setting.drawing(),
            )
        setting.tokenizer.batch_decode(output[:, width:])
        return sum(up_to(end, row) for row in output[:, width:].tolist())

    return generate


def by_pipeline(setting: Setting, batched: bool) -> Continue:
    """By transformers' pipeline: in one batch and in emoft's precision, or as it is by its defaults."""
    from transformers import pipeline  # here, since emoft itself has no use for it

    generator: Any = pipeline(
        "text-generation", model=setting.model, tokenizer=setting.tokenizer, device=setting.device
    )
    # It pads on the left by itself; without a token to pad with it refuses a batch.
    setting.tokenizer.pad_token = setting.tokenizer.eos_token

    def generate(prompts: list[str], count: int) -> int:
        options = {"max_new_tokens": count, **setting.drawing()}
        if batched:
            with setting.precision(len(prompts)).autocast():
                results = generator(prompts, batch_size=len(prompts), return_tensors=True, **options)
        else:
            results = generator(prompts, return_tensors=True, **options)
        end, made = setting.tokenizer.eos_token_id, 0
        for prompt, (result,) in zip(prompts, results, strict=True):
            row, own = result["generated_token_ids"], len(encode_prompt(setting.tokenizer, prompt))
            padding = next((place for place, token in enumerate(row) if token != end), 0)
            setting.tokenizer.decode(row[padding + own :])
            made += up_to(end, row[padding + own :])
        return made

    return generate


def by_ctranslate2(setting: Setting, compute_type: str) -> Continue:
    """By CTranslate2, from the model that its converter makes."""
    import ctranslate2  # only where it is installed

    with tempfile.TemporaryDirectory() as folder:
        setting.model.save_pretrained(folder)
        # It wants a name for each token that the model has; in a copy, since to look for them in texts takes long.
        tokenizer = copy.deepcopy(setting.tokenizer)
        missing = setting.model.config.vocab_size - len(tokenizer)
        tokenizer.add_tokens([f"<unused-{number}>" for number in range(missing)])
        tokenizer.save_pretrained(folder)
        ctranslate2.converters.TransformersConverter(folder).convert(f"{folder}/converted")
        generator = ctranslate2.Generator(
            f"{folder}/converted",
            device=setting.device.type,
            compute_type=compute_type,
            intra_threads=torch.get_num_threads(),
        )

    def generate(prompts: list[str], count: int) -> int:
        texts = [encode_prompt(setting.tokenizer, prompt) for prompt in prompts]
        results = generator.generate_batch(
            [setting.tokenizer.convert_ids_to_tokens(text) for text in texts],
            max_length=count,
            include_prompt_in_result=False,
            sampling_topk=1 if setting.config.greedy else TOP_K,
            sampling_temperature=1.0 if setting.config.greedy else TEMPERATURE,
        )
        setting.tokenizer.batch_decode([result.sequences_ids[0] for result in results])
        # Of a text that has ended, its end-of-text is a token that was made, but is not among them.
        return sum(min(count, len(result.sequences_ids[0]) + 1) for result in results)

    return generate


def by_onnx(setting: Setting, int8: bool) -> Continue:
    """By ONNX Runtime, from a graph of one step with its cache."""
    from emoft.benchmark.onnx_generation import OnnxGenerator  # only where the packages are installed

    generator = OnnxGenerator(setting.model, int8)
    end, sampling = setting.tokenizer.eos_token_id, Sampling(**setting.drawing())

    def generate(prompts: list[str], count: int) -> int:
        texts = [encode_prompt(setting.tokenizer, prompt) for prompt in prompts]
        rows = generator.generate(texts, count, end, sampling).tolist()
        setting.tokenizer.batch_decode(rows)
        return sum(up_to(end, row) for row in rows)

    return generate


def contenders_of(config: BenchmarkConfig) -> dict[str, tuple[Callable[..., Continue], tuple[Any, ...]]]:
    """Return by name what takes part here, with its arguments; emoft first."""
    found: dict[str, tuple[Callable[..., Continue], tuple[Any, ...]]] = {
        "emoft": (by_emoft, ()),
        "model.generate": (by_generate, ()),
        "pipeline, all in a batch": (by_pipeline, (True,)),
        "pipeline, by its defaults": (by_pipeline, (False,)),
    }
    on_cpu = choose_device(config.use_cpu).type == "cpu"
    if importlib.util.find_spec("ctranslate2"):
        found["CTranslate2, float32"] = by_ctranslate2, ("float32",)
        found |= {"CTranslate2, int8": (by_ctranslate2, ("int8",))} if on_cpu else {}
    if on_cpu and importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript"):
        found["ONNX Runtime, float32"] = by_onnx, (False,)
        found["ONNX Runtime, int8"] = by_onnx, (True,)
    return found | ({"emoft, --quantize int8": (by_emoft, (True,))} if on_cpu else {})


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
