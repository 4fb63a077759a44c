"""Batches: which examples stand together, and how they become tensors: packed end to end, or padded."""

import functools
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader

from emoft.loss import IGNORED, shift_labels

# The tokens of a batch are filled up to a multiple of this. Every new shape costs its first matrix products: oneDNN
# compiles code for it and keeps that (a gigabyte after a few hundred shapes), cuBLAS and torch.compile choose anew.
MULTIPLE = {"cpu": 8, "cuda": 64}


@dataclass(frozen=True)
class Batch:
    """A micro-batch, made on the CPU, with its labels already shifted."""

    inputs: dict[str, Any]  # keyword arguments of the model: tensors, and numbers the host must know
    predicting: Tensor  # (K,) int64: places in the flattened input_ids that predict a token
    targets: Tensor  # (K,) int64: the token each of them has to predict; IGNORED where K was filled up
    lengths: tuple[int, ...]  # tokens of each example
    target_tokens: int  # of them, those that are predicted: all but the first of each example, if it names no other

    @property
    def examples(self) -> int:
        """How many there are."""
        return len(self.lengths)

    @property
    def tokens(self) -> int:
        """Of all examples, without any filling."""
        return sum(self.lengths)

    @property
    def pairs(self) -> int:
        """Of a token and a token of its example that it sees, itself included; tells attention's cost."""
        return sum(length * (length + 1) // 2 for length in self.lengths)

    def owners(self) -> Tensor:
        """Return (B, T) int64: which example each place belongs to, counted from 0; -1 for what only fills up."""
        mask = self.inputs.get("attention_mask")
        if mask is not None:
            return torch.where(mask.bool(), torch.arange(len(mask), device=mask.device)[:, None], -1)
        owners = torch.repeat_interleave(torch.arange(self.examples), torch.tensor(self.lengths))
        filling = self.inputs["input_ids"].numel() - self.tokens
        return torch.nn.functional.pad(owners, (0, filling), value=-1)[None]

    def token_ids(self) -> list[list[int]]:
        """Return the tokens of each example, without any filling."""
        ids = self.inputs["input_ids"][self.owners() >= 0]
        return [example.tolist() for example in ids.split(self.lengths)]

    def aligned_share(self) -> float:
        """Return the share of targets that are the token right after the place that predicts them: 1 if all is well."""
        ids, places = self.inputs["input_ids"].flatten(), self.predicting[: self.target_tokens]
        following = ids[(places + 1).clamp(max=len(ids) - 1)]
        return float((following == self.targets[: self.target_tokens]).float().mean())

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device. From pinned memory, the copy runs beside the computation."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; called by the DataLoader."""
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, function: Any) -> "Batch":
        inputs = {name: function(value) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        return replace(self, inputs=inputs, predicting=function(self.predicting), targets=function(self.targets))


def epoch_batches(examples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the micro-batches of an epoch as indices into the train split.

    The order is a function of seed and epoch alone, so that a resumed run finds its place without replaying anything.
    """
    order = np.random.default_rng((seed, epoch)).permutation(examples).tolist()
    return _chunks(order, batch_size)


def length_sorted_batches(rows: Dataset, batch_size: int) -> list[list[int]]:
    """Return batches in the order of length, longest first, which pads least; for evaluation, where order is free."""
    lengths = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()
    return _chunks(np.argsort(-lengths, kind="stable").tolist(), batch_size)


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def pack(rows: list[dict[str, Any]], pad_id: int, multiple: int = 1) -> Batch:
    """Lay examples end to end in one row, with positions that restart at each; nothing is computed for padding.

    Only the end is filled up to a multiple, by one more example that predicts nothing.

    Returns:
        A batch whose inputs are "input_ids" and "position_ids", both (1, N) int64, and what `emoft.attention` needs:
        "boundaries" (E + 1,) int32, where example e is the tokens boundaries[e] to boundaries[e + 1]; "longest", the
        length of the longest, rounded up; and "padded_index" (N,) int64, the place of each token in a view of
        (E, longest) tokens.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = sum(lengths)
    examples = tuple(lengths)
    filling = -tokens % multiple
    ids = np.concatenate([np.asarray(row["input_ids"], dtype=np.int64) for row in rows])
    ids = np.pad(ids, (0, filling), constant_values=pad_id)
    if filling:
        lengths.append(filling)
    boundaries = np.cumsum([0, *lengths])
    offsets = np.concatenate([np.arange(length) for length in lengths])  # from the start of the example
    longest = _round_up(max(lengths), multiple)
    is_filling = np.arange(len(ids)) >= tokens
    first_targets = np.repeat([*_first_targets(rows), *[0] * (filling > 0)], lengths)
    labels = np.where((offsets < first_targets) | is_filling, IGNORED, ids)
    positions = np.where(is_filling, 0, offsets)  # a small model may have fewer positions than the filling
    inputs = {
        "input_ids": torch.from_numpy(ids)[None],
        "position_ids": torch.from_numpy(positions)[None],
        "boundaries": torch.from_numpy(boundaries.astype(np.int32)),
        "padded_index": torch.from_numpy(np.repeat(np.arange(len(lengths)) * longest, lengths) + offsets),
        "longest": longest,
    }
    return _batch(inputs, torch.from_numpy(labels)[None], examples, multiple)


def pad(rows: list[dict[str, Any]], pad_id: int, multiple: int = 1) -> Batch:
    """Put each example in a row of its own, padded on the right to the longest.

    GPT-2 numbers positions from the left whatever the mask says, so that padding on the left would shift them.

    Returns:
        A batch whose inputs are "input_ids" and "attention_mask", both (B, T) int64.
    """
    lengths = np.array([len(row["input_ids"]) for row in rows])
    mask = np.arange(max(lengths)) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate([row["input_ids"] for row in rows])
    is_target = mask & (np.arange(max(lengths)) >= np.array(_first_targets(rows))[:, None])
    labels = np.where(is_target, ids, IGNORED)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    return _batch(inputs, torch.from_numpy(labels), tuple(lengths.tolist()), multiple)


def _first_targets(rows: list[dict[str, Any]]) -> list[int]:
    """Return the place of the first target of each example: 1 unless it names another, as `emoft.classify` does.

    Nothing stands before the first token that could predict it.
    """
    return [max(1, row.get("first_target", 1)) for row in rows]


def _batch(inputs: dict[str, Any], labels: Tensor, lengths: tuple[int, ...], multiple: int) -> Batch:
    """Shift the labels and list the places that predict; on the CPU, because a GPU would wait for that list."""
    targets = shift_labels(labels).flatten()
    predicting = (targets != IGNORED).nonzero().flatten()
    filling = -len(predicting) % multiple
    return Batch(
        inputs,
        predicting=torch.nn.functional.pad(predicting, (0, filling)),
        targets=torch.nn.functional.pad(targets[predicting], (0, filling), value=IGNORED),
        lengths=lengths,
        target_tokens=len(predicting),
    )


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def build_loader(
    rows: Dataset, batches: list[list[int]], pad_id: int, device: torch.device, batching: str
) -> DataLoader[Batch]:
    """Return a DataLoader over the given batches, "packed" or "padded"."""
    collate = {"packed": pack, "padded": pad}[batching]
    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=functools.partial(collate, pad_id=pad_id, multiple=MULTIPLE[device.type]),
        pin_memory=device.type == "cuda",  # lets the copy to the GPU run beside the computation
        generator=torch.Generator(),  # its own, so that making a loader draws nothing from dropout's random numbers
    )
