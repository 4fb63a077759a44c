"""What it costs to classify by the language model, beside an evaluation.

N texts under each of six labels hold as many tokens as 6 N texts have that are evaluated, and should take as long. Both
include filling in the template and tokenizing.
"""

import statistics
import time

from datasets import Dataset

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.generation import SENTENCE, load
from emoft.benchmark.lengths import draw_lengths
from emoft.config import TrainConfig
from emoft.data.template import TextFormat
from emoft.data.tokens import encode
from emoft.device import choose_device, synchronize
from emoft.distributed.world import World
from emoft.evaluate.classification import classify
from emoft.evaluate.scoring import evaluate
from emoft.model.attention import use_packed_attention
from emoft.model.kernels import use_fast_kernels
from emoft.model.loading import TextModel
from emoft.terminal import Bar
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime

LABELS = list("abcdef")  # of one token each


def draw_texts(count: int, max_length: int, seed: int) -> list[str]:
    """Return texts of as many bytes as messages have tokens: with the tokenizer of bytes, of as many tokens."""
    return [
        (SENTENCE * 8)[start % len(SENTENCE) :][: max(1, length - len("a: "))].strip() or "i"
        for start, length in enumerate(draw_lengths(count, max_length, seed))
    ]


def compare_classification(config: BenchmarkConfig) -> Report:
    """Let both take turns."""
    runtime = Runtime(World(), Precision(config.mixed_precision, choose_device(config.use_cpu)))
    model, tokenizer = load(config.model_name_or_path, config.seed)
    model.to(runtime.device)  # type: ignore[arg-type]  # a fault of the library's types
    use_packed_attention(model)
    use_fast_kernels(model)
    model.eval()
    batch_size = TrainConfig.per_device_eval_batch_size
    text_format = TextFormat("{label}: {text}", True, config.max_length, LABELS)
    text_model = TextModel(model, tokenizer, text_format)
    texts = draw_texts(config.prompts, config.max_length, config.seed)
    rows = Dataset.from_dict({"text": texts, "label": [LABELS[n % len(LABELS)] for n in range(len(texts))]})

    def evaluation() -> None:
        ids = encode(tokenizer, [text_format.fill(text, label) for label in LABELS for text in texts], text_format)
        evaluate(text_model, Dataset.from_dict({"input_ids": ids}), runtime, batch_size)

    def classification() -> None:
        classify(text_model, rows, runtime, batch_size)

    seconds: dict[str, list[float]] = {}
    contenders = {
        f"evaluation of {len(texts) * len(LABELS):,} texts": evaluation,
        f"classification of {len(texts):,} texts by {len(LABELS)} labels": classification,
    }
    with Bar("Comparing", "turns", (config.turns + 1) * len(contenders)) as bar:
        for turn in range(config.turns + 1):
            for name, contender in contenders.items():
                bar.note = name
                synchronize(runtime.device)
                started = time.perf_counter()
                contender()
                synchronize(runtime.device)
                if turn:  # the first one warms up
                    seconds.setdefault(name, []).append(time.perf_counter() - started)
                bar.advance()
    evaluated, classified = seconds.values()
    ratios = [1.0, statistics.median(b / a for a, b in zip(evaluated, classified, strict=True))]
    table: list[dict[str, object]] = []
    lines = ["| pass | seconds | x evaluation |", "| --- | ---: | ---: |"]
    for (name, times), ratio in zip(seconds.items(), ratios, strict=True):
        table.append({"contender": name, "seconds": statistics.median(times), "to_evaluation": ratio})
        lines.append(f"| {name} | {statistics.median(times):,.2f} | {ratio:.2f} |")
    return Report("\n".join(lines), {"rows": table})
