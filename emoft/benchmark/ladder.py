"""A ladder from a plain training loop to the step of train.py: one optimization more on each rung, and its gain."""

import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import count
from multiprocessing.connection import Connection

import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from transformers import GPT2LMHeadModel

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.contenders import Contender, Turns
from emoft.benchmark.training import load_texts_and_model, take_all_turns
from emoft.config import TrainConfig
from emoft.data.batching import Batch, epoch_batches, pack, pad
from emoft.device import choose_device, token_multiple
from emoft.model.attention import use_packed_attention
from emoft.model.kernels import keep_freed_memory, use_fast_dropout, use_fast_gelu
from emoft.training.loss import cross_entropy, shift_labels
from emoft.training.optimizer import build_optimizer, clip_in_next_step
from emoft.training.precision import Precision

PLAIN = "plain loop: padded, float32"
PACKED, HALF, AT_TARGETS, FUSED_LOSS = "packed", "half precision", "logits at targets only", "fused loss"
GELU, DROPOUT, MEMORY = "GELU by one kernel", "fast random numbers for dropout", "memory kept"
FUSED_ADAMW, CLIPPING = "fused AdamW", "clipping in AdamW's pass"
RUNGS = (PLAIN, PACKED, HALF, AT_TARGETS, FUSED_LOSS, GELU, DROPOUT, MEMORY, FUSED_ADAMW, CLIPPING)
NEW_ONES = 3  # rungs of a window, beside the two that they are compared with


@dataclass
class Row:
    """A rung at a batch size: all that stands above it in the table is switched on too. Times are medians."""

    batch_size: int
    rung: str
    seconds_per_step: float
    to_rung_before: float  # how many times as fast
    to_plain: float
    peak_memory_gib: float | None


class Rung:
    """A model that is trained with the optimizations of the ladder up to one rung."""

    def __init__(self, name: str, model: GPT2LMHeadModel, config: TrainConfig, precision: Precision) -> None:
        """Prepare the model in place.

        Args:
            name: of the rung, one of `RUNGS`.
            model: fresh from transformers, in training mode.
            config: of AdamW and of clipping.
            precision: of the rungs from half precision on; below them it is float32.
        """
        self.on = set(RUNGS[: RUNGS.index(name) + 1])
        self.model, self.config = model, config
        self.precision = precision if HALF in self.on else Precision("no", precision.device)
        if PACKED in self.on:
            use_packed_attention(model)
        if GELU in self.on:
            use_fast_gelu(model)
        if DROPOUT in self.on:
            use_fast_dropout(model)
        if MEMORY in self.on:
            keep_freed_memory(precision.device)
        self.optimizer: Optimizer = build_optimizer(model, config)
        if FUSED_ADAMW not in self.on:
            # One small kernel after another for each parameter, as AdamW's formula is written.
            self.optimizer = AdamW(
                [{**group, "fused": False, "foreach": False} for group in self.optimizer.param_groups],
                fused=False,
                foreach=False,
            )

    def collate(self, texts: list[list[int]]) -> Batch:
        """Return a batch of token ids."""
        rows = [{"input_ids": text} for text in texts]
        device = self.precision.device
        # A padded batch is as wide as its longest text: a plain loop knows of no multiples.
        batch = pack(rows, 0, token_multiple(device)) if PACKED in self.on else pad(rows, 0)
        return batch.to(device)

    def step(self, batch: Batch) -> Tensor:
        """Take an optimization step; returns its loss, the mean over the targets, in nats."""
        scaler = self.precision.scaler
        with self.precision.autocast():
            hidden = self.model.transformer(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, C)
            loss = self._losses(hidden, batch).sum() / batch.target_tokens
        scaler.scale(loss).backward()
        scaler.unscale_(self.optimizer)
        if CLIPPING in self.on:
            clip_in_next_step(self.optimizer, self.config.max_grad_norm)
        else:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.config.max_grad_norm)
        scaler.step(self.optimizer)
        scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def _losses(self, hidden: Tensor, batch: Batch) -> Tensor:
        """Return the cross-entropy of each target."""
        targets = shift_labels(batch.labels)  # (B, T)
        if FUSED_LOSS in self.on:
            return cross_entropy(hidden, self.model.lm_head.weight, targets, batch.predicting)
        hidden, targets = hidden.flatten(0, 1), targets.flatten()
        if AT_TARGETS in self.on:
            hidden, targets = hidden[batch.predicting], targets[batch.predicting]
        logits = F.linear(hidden, self.model.lm_head.weight)  # (K, V)
        return F.cross_entropy(logits.float(), targets, reduction="none")


def run_rung(pipe: Connection, name: str, config: BenchmarkConfig, train_config: TrainConfig) -> None:
    """Be the contender of a rung: train, over the same texts in the same order as all others."""
    device = choose_device(config.use_cpu)
    turns = Turns(pipe, device, config.steps, config.warmup_steps)
    text_model, texts = load_texts_and_model(config, train_config)
    model = text_model.model.to(device).train()  # type: ignore[arg-type]  # a fault of the library's types
    rung = Rung(name, model, train_config, Precision(config.mixed_precision, device))
    for examples in _steps(len(texts), train_config):
        turns()
        rung.step(rung.collate([texts[index] for index in examples]))


def _steps(texts: int, config: TrainConfig) -> Iterator[list[int]]:
    for epoch in count():
        yield from epoch_batches(texts, config.per_device_train_batch_size, config.seed, epoch)


def windows(rungs: list[str]) -> list[list[str]]:
    """Return the rungs that take turns with each other: the plain loop, the last one of the window before, new ones.

    All of them at once would hold ten copies of the model, of its gradients and of AdamW's means in memory.
    """
    return [
        [*dict.fromkeys([rungs[0], rungs[start - 1], *rungs[start : start + NEW_ONES]])]
        for start in range(1, len(rungs), NEW_ONES)
    ]


def compare_ladder(config: BenchmarkConfig) -> Report:
    """Let the rungs take turns at each batch size."""
    precision = Precision(config.mixed_precision, choose_device(config.use_cpu))
    rungs = [name for name in RUNGS if name != HALF or precision.name != "no"]
    found: dict[int, list[Row]] = {batch_size: [] for batch_size in config.batch_sizes}
    for window in windows(rungs):
        for batch_size, (contenders, _) in take_all_turns(config, window, run_rung).items():
            add_rows(found[batch_size], batch_size, contenders)
    rows = [row for of_size in found.values() for row in of_size]
    table = format_table(rows)
    if HALF not in rungs:
        table += "\n\nno rung of half precision: the products are in float32 here (--mixed_precision)"
    return Report(table, {"precision": precision.name, "rows": [asdict(row) for row in rows]})


def add_rows(rows: list[Row], batch_size: int, contenders: dict[str, Contender]) -> None:
    """Add the rungs of a window to the table of a batch size that are not in it yet.

    A gain is the median over the turns of the ratio in each, since the steps of a turn have the same texts.
    """
    plain = before = next(iter(contenders.values()))
    for name, contender in contenders.items():
        if name not in {row.rung for row in rows}:
            memory = None if contender.peak is None else contender.peak / 2**30
            seconds = statistics.median(contender.seconds)
            rows.append(Row(batch_size, name, seconds, _gain(before, contender), _gain(plain, contender), memory))
        before = contender


def _gain(slow: Contender, fast: Contender) -> float:
    return statistics.median(a / b for a, b in zip(slow.seconds, fast.seconds, strict=True))


def format_table(rows: list[Row]) -> str:
    """Return the table as Markdown."""
    lines = [
        "| batch | with all above and | ms a step | x the one before | x plain | peak memory |",
        "| ---: | --- | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        memory = "" if row.peak_memory_gib is None else f"{row.peak_memory_gib:.2f} GiB"
        lines.append(
            f"| {row.batch_size} | {row.rung} | {row.seconds_per_step * 1000:,.0f} | {row.to_rung_before:.2f}"
            f" | {row.to_plain:.2f} | {memory} |"
        )
    return "\n".join(lines)
