"""GPT-2 as a graph of ONNX: token ids and their mask go in, logits come out."""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import GPT2LMHeadModel, PreTrainedTokenizerFast

from emoft.errors import UserError

MOST_BYTES = 2**31 - 2**24  # one message of protobuf, less some room for the graph


class Logits(nn.Module):
    """A GPT-2 that takes two tensors and returns one, with padding on either side."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits (B, T, V) of ids (B, T), where the mask (B, T) is 1 for a token and 0 for padding."""
        # A text begins at position 0 wherever its padding stands, as in generation.
        positions = (attention_mask.cumsum(-1) - 1).clamp(min=0)
        return self.model(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=positions, use_cache=False
        ).logits


def write_onnx(model: GPT2LMHeadModel, tokenizer: PreTrainedTokenizerFast, path: Path) -> None:
    """Write a model as ONNX, for any number of texts and any length up to its positions.

    Args:
        model: without dropout.
        tokenizer: left out, ONNX has no place for it.
        path: of the file.

    Raises:
        UserError: the weights are more than one file of ONNX can hold.
        OSError: the file cannot be written.
    """
    size = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    if size > MOST_BYTES:
        raise UserError(f"its weights are {size:,} bytes, and a file of ONNX holds 2 GiB: export it as .gguf instead")
    batch, sequence = torch.export.Dim("batch"), torch.export.Dim("sequence", max=model.config.n_positions)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    logging.disable(logging.WARNING)  # of packages for other models that are not installed
    try:
        with warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                Logits(model).eval(),
                (ids, torch.ones_like(ids)),
                input_names=["input_ids", "attention_mask"],
                output_names=["logits"],
                dynamic_shapes=({0: batch, 1: sequence}, {0: batch, 1: sequence}),
                dynamo=True,
                verbose=False,
            )
    finally:
        logging.disable(logging.NOTSET)
    assert program is not None  # what the older exporter returns
    content = program.model_proto
    for node in content.graph.node:
        del node.metadata_props[:]  # which line of which file it came from: of this machine, and longer than the graph
    path.write_bytes(content.SerializeToString())
