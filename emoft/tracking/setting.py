"""What can be told of a run before it is trained: the shape of its model and of a step, and what its texts are like."""

from datasets import Dataset
from torch import nn
from transformers import GPT2LMHeadModel

from emoft.data.label_information import told_by_words
from emoft.data.tokenized import cut_share, distinct_share


def setting_of_model(model: GPT2LMHeadModel, examples_per_step: int, checksums: dict[str, str]) -> dict[str, float]:
    """Return figures of a model and of the steps that train it, by their names in `tracking.charts`.

    Args:
        model: as it is.
        examples_per_step: of all ranks and micro-batches.
        checksums: of the tokens of each split, in hexadecimal digits.
    """
    setting = {
        "examples_per_step": examples_per_step,
        "width": model.config.n_embd,
        "positions": model.config.n_positions,
        "dropout": max((module.p for module in model.modules() if isinstance(module, nn.Dropout)), default=0.0),
    }
    for split in ("train", "validation"):
        if split in checksums:
            setting[f"{split}_checksum"] = int(checksums[split][:6], 16)  # of a curve's point 24 bits are exact
    return setting


def setting_of_data(train_rows: Dataset, max_length: int) -> dict[str, float]:
    """Return what can be told of the train split without a model: repetitions, and whether its labels fit.

    Args:
        train_rows: tokenized.
        max_length: tokens to which texts were cut.
    """
    setting: dict[str, float] = {"distinct_texts": distinct_share(train_rows)}
    if "whole_tokens" in train_rows.column_names:
        setting["cut_texts"] = cut_share(train_rows, max_length)
    if "label" in train_rows.column_names:
        setting["emotions"] = len(train_rows.unique("label"))
        told, largest, asked = told_by_words(train_rows["text"], train_rows["label"])
        setting |= {"emotion_by_words": told, "largest_emotion": largest, "emotions_asked": asked}
    return setting
