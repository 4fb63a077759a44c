"""The texts of a step: which they were, how well the model predicts each, and how strongly each pulls at it."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from emoft.config import GradientsConfig, TrainConfig
from emoft.data.batching import epoch_batches, pad
from emoft.data.duplicates import mark_duplicates
from emoft.data.reading import read_splits
from emoft.data.tokens import encode
from emoft.errors import UserError
from emoft.files import CONFIG_FILE, TRAINING_STATE_FILE, WEIGHTS_FILE
from emoft.gradients.record import Record, read_record
from emoft.model.loading import load_model
from emoft.model.tokenizer import load_tokenizer
from emoft.terminal import progress
from emoft.training.loss import cross_entropy, shift_labels


@dataclass(frozen=True)
class TextOfStep:
    """A text of a step, and what a model makes of it by itself, without dropout."""

    row: int  # of the train split, from 0, as in nonfinite-STEP.json
    text: str  # the filled template
    tokens: int  # after which it was cut
    loss: float  # mean over its targets, in nats
    gradient_norm: float | None = None  # of its mean loss, over all weights


@dataclass(frozen=True)
class StepTexts:
    """The texts of a step, the hardest one first."""

    step: int
    epoch: int  # from 0
    measured_at: str  # the folder of the model
    texts: list[TextOfStep]


def texts_of_step(config: GradientsConfig) -> StepTexts:
    """Return the texts of a step of a run, measured at its checkpoint that is nearest to the step.

    Which they are is a function of the run's seed, of the epoch, and of its data, which are read once more.

    Raises:
        UserError: the run has no such step, or its data or its model cannot be read.
    """
    run_dir = Path(config.run_dir)
    record = read_record(run_dir)
    flags = _flags(record, run_dir)
    model_dir = nearest_model(run_dir, config.step)
    splits, text_format = read_splits(flags)
    splits, _ = mark_duplicates(splits, flags.drop_duplicates)
    rows = splits["train"]
    size = (
        int(record.values("train/examples_per_step")[0])
        if "train/examples_per_step" in record.curves
        else _asked(flags)
    )
    epoch, place = divmod(config.step - 1, math.ceil(len(rows) / size))
    last = max(record.curves.get("train/loss", {0: 0.0}))
    if config.step > last:
        raise UserError(f"--step {config.step}: the run in {run_dir} has come to step {last}")
    examples = epoch_batches(len(rows), size, flags.seed, epoch)[place]

    tokenizer = load_tokenizer(str(model_dir))
    model = load_model(str(model_dir)).eval()
    texts = [
        text_format.fill(**{name: row[name] for name in ("text", "label") if name in row})
        for row in rows.select(examples)
    ]
    ids = encode(tokenizer, texts, text_format)
    measured = measure(model, ids, config.gradient_norms)
    found = [
        TextOfStep(row, text, len(tokens), *figures)
        for row, text, tokens, figures in zip(examples, texts, ids, measured, strict=True)
    ]
    return StepTexts(config.step, epoch, str(model_dir), sorted(found, key=lambda text: -text.loss))


def _asked(flags: TrainConfig) -> int:
    return flags.per_device_train_batch_size * flags.gradient_accumulation_steps


def _flags(record: Record, run_dir: Path) -> TrainConfig:
    if not record.flags:
        raise UserError(f"{run_dir} has no {CONFIG_FILE}, which tells of its data: name an --output_dir of train.py")
    known = {field.name for field in fields(TrainConfig)}
    return TrainConfig(**{name: value for name, value in record.flags.items() if name in known})


def nearest_model(run_dir: Path, step: int) -> Path:
    """Return the checkpoint that is nearest to the beginning of a step, or the final model if there is none.

    Raises:
        UserError: there is neither.
    """
    found = [path.parent for path in run_dir.glob(f"checkpoint-*/{TRAINING_STATE_FILE}")]
    numbered = [
        (abs(int(number) - (step - 1)), path) for path in found if (number := path.name.partition("-")[2]).isdigit()
    ]
    if numbered:
        return min(numbered)[1]
    if not (run_dir / WEIGHTS_FILE).is_file():
        raise UserError(f"{run_dir} holds no checkpoint and no model yet to measure the texts with: wait for a save")
    return run_dir


@torch.no_grad()
def losses_of_texts(model: GPT2LMHeadModel, ids: list[list[int]]) -> list[float]:
    """Return the mean loss of each text by itself, in nats, without dropout; leaves the model as it was."""
    is_training = model.training
    model.eval()
    try:
        return [float(_loss(model, tokens)) for tokens in ids]
    finally:
        model.train(is_training)


def _loss(model: GPT2LMHeadModel, tokens: list[int]) -> Tensor:
    batch = pad([{"input_ids": tokens}], pad_id=0).to(model.device)
    hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state  # (1, T, C)
    losses: Tensor = cross_entropy(hidden, model.lm_head.weight, shift_labels(batch.labels), batch.predicting)
    return losses.sum() / max(1, batch.target_tokens)


def measure(model: GPT2LMHeadModel, ids: list[list[int]], gradient_norms: bool) -> Iterator[tuple[float, float | None]]:
    """Yield the mean loss of each text, and, if asked, the norm of its gradient.

    Args:
        model: in evaluation mode, without dropout.
        ids: the tokens of each text.
        gradient_norms: takes a backward pass for each text.
    """
    for tokens in progress(ids, "Measuring", "texts"):
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(gradient_norms):
            loss = _loss(model, tokens)
        norm = None
        if gradient_norms:
            loss.backward()
            norm = float(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
        yield float(loss), norm


def describe(found: StepTexts) -> str:
    """Return the texts of a step as a table."""
    lines = [f"step {found.step}, epoch {found.epoch + 1}: {len(found.texts)} texts, measured at {found.measured_at}"]
    with_norms = found.texts[0].gradient_norm is not None
    lines.append(f"{'row':>7}  {'tokens':>6}  {'loss':>7}{'  gradient' if with_norms else ''}  text")
    for each in found.texts:
        norm = f"  {each.gradient_norm:8.3g}" if each.gradient_norm is not None else ""
        lines.append(f"{each.row:7}  {each.tokens:6}  {each.loss:7.3f}{norm}  {each.text!r}")
    return "\n".join(lines)


def as_json(found: StepTexts) -> dict[str, Any]:
    """Return the texts of a step as an object of JSON."""
    return asdict(found)
