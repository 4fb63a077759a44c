"""How well a model predicts a split: token-weighted loss, perplexity, bits per byte, and how sure each of them is."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel

from emoft.data.batching import IGNORED, Batch, halve_until_it_fits, split_loader
from emoft.data.duplicates import overlap
from emoft.data.tokens import byte_lengths
from emoft.device import sums_type
from emoft.distributed.parallel import is_sharded
from emoft.evaluate.intervals import Interval, intervals, renamed
from emoft.model.loading import TextModel
from emoft.terminal import progress
from emoft.training.loss import cross_entropy, shift_labels
from emoft.training.runtime import Runtime


@dataclass(frozen=True)
class Scores:
    """What a model gives each example of a split, in the split's order; (E,) each."""

    nats: np.ndarray  # float64, cross-entropy summed over the targets
    tokens: np.ndarray  # int64, targets: every token but the first
    text_bytes: np.ndarray  # int64, of the text that the targets stand for, in UTF-8

    def __getitem__(self, which: np.ndarray) -> "Scores":
        return Scores(self.nats[which], self.tokens[which], self.text_bytes[which])


@dataclass(frozen=True)
class Evaluation:
    """The result over a split, each figure with the 95 % interval of a bootstrap over examples.

    - loss: cross-entropy of the target tokens, in nats a token, each token weighing the same.
    - perplexity: exp(loss).
    - bits_per_byte: cross-entropy of the target tokens, in bits, by the bytes of the text that they stand for. Every
      token but the first is a target, so the first one's bytes do not count either; end-of-text costs bits and stands
      for no byte, once a text, whatever the tokenizer; of a text that was cut, the bytes that were kept count. That
      makes it comparable between tokenizers where few texts are cut (`max_length` counts tokens), unlike the loss: the
      longer a tokenizer's tokens, the more is lost with each.
    """

    loss: float
    loss_interval: Interval
    bits_per_byte: float
    bits_per_byte_interval: Interval
    examples: int
    tokens: int
    text_bytes: int
    overlap: int | None = None  # examples that the train split holds too; None if nobody has looked
    without_overlap: "Evaluation | None" = None  # over the others, if there are both

    @property
    def perplexity(self) -> float:
        """exp(loss); infinite where that is too large for a number."""
        return perplexity(self.loss)

    def figures(self) -> dict[str, Any]:
        """Return all figures by name, each with its interval beside it, as [low, high]."""
        low, high = self.loss_interval
        figures: dict[str, Any] = {
            "loss": self.loss,
            "loss_interval": [low, high],
            "perplexity": self.perplexity,
            "perplexity_interval": [perplexity(low), perplexity(high)],  # exp keeps the order of the resamples
            "bits_per_byte": self.bits_per_byte,
            "bits_per_byte_interval": list(self.bits_per_byte_interval),
        }
        if self.overlap is not None:
            figures["overlap"] = self.overlap
        if self.without_overlap:
            figures |= renamed(self.without_overlap.figures(), "_without_overlap")
        return figures


def perplexity(loss: float) -> float:
    """Return exp(loss), infinite where that is too large for a number."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf


def evaluate(
    text_model: TextModel, rows: Dataset, runtime: Runtime, batch_size: int, batching: str = "packed"
) -> Evaluation | None:
    """Return how well a model predicts a split; dropout is off meanwhile.

    Args:
        text_model: in either mode.
        rows: a tokenized split; with the column of `duplicates.mark_duplicates`, also without what train holds too.
        runtime: all ranks, each of which scores its share. A signal ends the evaluation at the next batch.
        batch_size: examples computed at once.
        batching: "packed" or "padded".

    Returns:
        The result; None if a signal ended it.
    """
    texts, tokenizer = rows.select_columns("input_ids"), text_model.tokenizer
    loader = split_loader(texts, batch_size, tokenizer.eos_token_id, runtime.device, batching, runtime.world)
    token_bytes = byte_lengths(tokenizer, text_model.model.config.vocab_size)
    scores = score_examples(text_model.model, loader, runtime, token_bytes)
    return None if scores is None else summarize(scores, overlap(rows))


@torch.no_grad()  # not inference_mode: the weights that FSDP gathers in it could not be trained any more
def score_examples(
    model: GPT2LMHeadModel,
    loader: DataLoader[Batch],
    runtime: Runtime,
    token_bytes: Tensor | None = None,
    description: str = "Evaluating",
) -> Scores | None:
    """Return what the model gives each example of a loader, in the order of the data set.

    Sums are kept in float64, where the device has it, so that neither the order of the batches nor their form shows.

    Args:
        model: in either mode; dropout is off meanwhile.
        loader: of `batching.split_loader`, over all examples of its data set.
        runtime: all ranks, each of which scores its share. A signal ends this at the next batch.
        token_bytes: (V,) int64, the bytes that each token stands for, of `tokens.byte_lengths`; none to count none.
        description: of the progress bar.

    Returns:
        The scores; None if a signal ended it. A batch that does not fit in memory is computed in halves.
    """
    was_training = model.training
    model.eval()
    device = runtime.device
    if token_bytes is None:
        token_bytes = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    token_bytes = token_bytes.to(device)
    sums = torch.zeros(3, len(loader.dataset), dtype=sums_type(device), device=device)  # type: ignore[arg-type]

    def score(batch: Batch, examples: list[int]) -> None:
        """Add the scores of a batch to the sums, all at its end, so that one that fails has added nothing."""
        # (K,) the row of each target. Looked up on the CPU, and copied from memory that need not be waited for.
        owners = torch.tensor([*examples, *[0] * (not examples)])[batch.target_owners]
        owners = (owners.pin_memory() if batch.labels.is_pinned() else owners).to(device, non_blocking=True)
        batch = batch.to(device)
        with runtime.precision.autocast():
            hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, C)
            targets = shift_labels(batch.labels)  # (B, T)
            losses = cross_entropy(hidden, model.lm_head.weight, targets, batch.predicting)  # (K,)
        targets = targets.flatten()[batch.predicting]  # (K,)
        is_target = targets != IGNORED
        values = torch.stack([losses.to(sums.dtype), is_target, token_bytes[targets.clamp(min=0)] * is_target])
        sums.index_add_(1, owners, values)

    for batch, examples in zip(progress(loader, description, "batches"), loader.batch_sampler or (), strict=True):
        if runtime.is_to_stop():
            break
        if is_sharded(model):  # each forward pass is a collective: all ranks make as many
            score(batch, examples)
        else:
            halve_until_it_fits(score, loader, batch, examples)
    model.train(was_training)
    if runtime.signals and runtime.signals.received:
        return None
    nats, tokens, text_bytes = runtime.world.sum(sums).cpu().numpy()
    return Scores(nats, tokens.astype(np.int64), text_bytes.astype(np.int64))


def summarize(scores: Scores, in_train: np.ndarray | None = None) -> Evaluation:
    """Return the figures of a split.

    Args:
        scores: of all its examples.
        in_train: (E,) bool, which of them the train split holds too; None if nobody has looked.
    """

    def ratios(which: Any) -> list[np.ndarray]:
        nats, tokens, text_bytes = (each[which].sum(-1) for each in (scores.nats, scores.tokens, scores.text_bytes))
        return [nats / np.maximum(1, tokens), nats / math.log(2) / np.maximum(1, text_bytes)]

    loss, bits_per_byte = (float(each) for each in ratios(slice(None)))
    loss_interval, bits_interval = intervals(ratios, len(scores.nats))
    others = None
    if in_train is not None and in_train.any() and not in_train.all():
        others = summarize(scores[~in_train])
    return Evaluation(
        loss,
        loss_interval,
        bits_per_byte,
        bits_interval,
        len(scores.nats),
        int(scores.tokens.sum()),
        int(scores.text_bytes.sum()),
        None if in_train is None else int(in_train.sum()),
        others,
    )


def format_figures(figures: dict[str, Any]) -> str:
    """Return a table of figures, a line each, with the 95 % interval beside those that have one."""
    numbers = {name: value for name, value in figures.items() if isinstance(value, float | int)}
    width = max(map(len, numbers), default=0)
    lines = []
    for name, value in numbers.items():
        low, high = figures.get(f"{name}_interval", (math.nan, math.nan))
        beside = "" if math.isnan(low) else f"  [{low:,.4f}, {high:,.4f}]"
        number = f"{value:,}" if isinstance(value, int) else f"{value:,.4f}"
        lines.append(f"{name:{width}}  {number}{beside}")
    return "\n".join(lines)
