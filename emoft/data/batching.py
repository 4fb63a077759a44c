"""Batches: which examples stand together, and how they become tensors: packed end to end, or padded."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from emoft.device import pins_memory, token_multiple
from emoft.distributed.world import World
from emoft.errors import is_out_of_memory

if TYPE_CHECKING:  # generate.py makes batches too, and this library takes a second to load
    from datasets import Dataset

IGNORED = -100  # the label of what is no target, as in torch and transformers

Lengths = np.ndarray[Any, np.dtype[np.int64]]  # (E,) tokens of each example


@dataclass(frozen=True)
class Batch:
    """A micro-batch, made on the CPU. Its labels are not shifted: the training loop does that, where it can be seen."""

    inputs: dict[str, Any]  # keyword arguments of the model: tensors, and numbers the host must know
    labels: Tensor  # (B, T) int64: the tokens themselves; IGNORED for padding and for the first token of each text
    # (K,) int64: the places in the flattened rows whose next token has a label. They are listed here, on the CPU,
    # because a GPU would be waited for. What fills K up is the last place, which has no next token.
    predicting: Tensor
    target_owners: Tensor  # (K,) int64: the example of each of these places, from 0; 0 for what fills up
    lengths: tuple[int, ...]  # tokens of each example
    target_tokens: int  # of them, those that are predicted: all but the first of each example, if it names no other
    rivals: int = 0  # examples at the end that are those before under wrong labels: see `training.contrast`
    contrasted: Tensor | None = None  # (K,) bool: which targets count when texts are compared with their rivals

    @property
    def examples(self) -> int:
        """How many there are, without rivals."""
        return len(self.lengths) - self.rivals

    @property
    def tokens(self) -> int:
        """Of all examples, without any filling."""
        return sum(self.lengths)

    def owners(self) -> Tensor:
        """Return (B, T) int64: which example each place belongs to, counted from 0; -1 for what only fills up."""
        mask = self.inputs.get("attention_mask")
        if mask is not None:
            rows = torch.arange(len(mask), device=mask.device)[:, None]
            return torch.where(mask.bool() & (rows < len(self.lengths)), rows, -1)
        owners = torch.repeat_interleave(torch.arange(len(self.lengths)), torch.tensor(self.lengths, dtype=torch.int64))
        filling = self.inputs["input_ids"].numel() - self.tokens
        return torch.nn.functional.pad(owners, (0, filling), value=-1)[None]

    def token_ids(self) -> list[list[int]]:
        """Return the tokens of each example, without rivals and filling."""
        ids = self.inputs["input_ids"][self.owners() >= 0].tolist()
        ends = np.cumsum(self.lengths).tolist()
        texts = [ids[end - length : end] for end, length in zip(ends, self.lengths, strict=True)]
        return texts[: self.examples]

    def aligned_share(self, targets: Tensor, places: Tensor) -> float:
        """Return the share of targets that are the token right after the place that predicts them: 1 if all is well.

        A target that is the first token of a text, or padding, is a wrong one; one that is missing counts as wrong.

        Args:
            targets: (K,), what the loss was given; IGNORED where there is none.
            places: (K,), in the flattened rows, where each is predicted.
        """
        ids, owners = self.inputs["input_ids"].flatten().cpu(), self.owners().flatten().cpu()
        targets, places = targets.cpu(), places.cpu()
        is_given = (targets != IGNORED) & (owners[places] < self.examples)  # without rivals
        following = (places + 1).clamp(max=len(ids) - 1)
        is_next = (owners[places] >= 0) & (owners[following] == owners[places]) & (following > places)
        is_next &= ids[following] == targets
        expected = int((owners[self.predicting[: self.target_tokens].cpu()] < self.examples).sum())
        return int((is_given & is_next).sum()) / max(1, int(is_given.sum()), expected)

    def to(self, device: torch.device) -> "Batch":
        """Return the batch on a device. From pinned memory, the copy runs beside the computation."""
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; called by the DataLoader."""
        return self._each_tensor(Tensor.pin_memory)

    def _each_tensor(self, function: Any) -> "Batch":
        inputs = {name: function(value) if isinstance(value, Tensor) else value for name, value in self.inputs.items()}
        contrasted = None if self.contrasted is None else function(self.contrasted)
        return replace(
            self,
            inputs=inputs,
            labels=function(self.labels),
            predicting=function(self.predicting),
            target_owners=function(self.target_owners),
            contrasted=contrasted,
        )


def epoch_batches(examples: int, batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch, one for each optimizer step, as indices into the train split.

    The order is a function of seed and epoch alone, so that a resumed run finds its place without replaying anything.
    """
    order = np.random.default_rng((seed, epoch)).permutation(examples).tolist()
    return _chunks(order, batch_size)


def length_sorted_batches(rows: "Dataset", batch_size: int) -> list[list[int]]:
    """Return batches in the order of length, longest first, which pads least; for evaluation, where order is free."""
    return _chunks(np.argsort(-token_lengths(rows), kind="stable").tolist(), batch_size)


def token_lengths(rows: "Dataset") -> Lengths:
    """Return the tokens of each example of a tokenized split."""
    import pyarrow.compute as pc  # here, since generate.py makes batches too, and it takes long to load

    lengths = pc.list_value_length(rows.with_format("arrow")[:]["input_ids"])
    return np.asarray(lengths.to_numpy(), dtype=np.int64)


def target_tokens(lengths: Lengths) -> int:
    """Return how many tokens of some examples are predicted: all but the first of each."""
    return int(lengths.sum()) - len(lengths)


def _chunks(order: list[int], size: int) -> list[list[int]]:
    return [order[start : start + size] for start in range(0, len(order), size)]


def pack(rows: list[dict[str, Any]], pad_id: int, multiple: int = 1) -> Batch:
    """Lay examples end to end in one row, with positions that restart at each; nothing is computed for padding.

    Only the end is filled up to a multiple, by one more example that predicts nothing. Of no examples at all, it makes
    a batch of that alone, for the rank that has none.

    Returns:
        A batch whose inputs are "input_ids" and "position_ids", both (1, N) int64, and what `model.attention` needs:
        "boundaries" (E + 1,) int32, where example e is the tokens boundaries[e] to boundaries[e + 1]; "longest", the
        length of the longest, rounded up; and "padded_index" (N,) int64, the place of each token in a view of
        (E, longest) tokens.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    tokens = sum(lengths)
    examples = tuple(lengths)
    filling = -tokens % multiple if rows else multiple
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *(row["input_ids"] for row in rows)])
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
    spans = _contrasted(rows)
    contrasted = None
    if spans is not None:
        first, last = np.repeat(np.pad(spans, ((0, len(lengths) - len(rows)), (0, 0))), lengths, axis=0).T
        contrasted = ((offsets >= first) & (offsets < last))[None]
    owners = np.repeat(np.arange(len(lengths)), lengths)[None]
    return _batch(inputs, labels[None], owners, examples, multiple, contrasted)


def pad(rows: list[dict[str, Any]], pad_id: int, multiple: int = 1) -> Batch:
    """Put each example in a row of its own, padded on the right to the longest.

    GPT-2 numbers positions from the left whatever the mask says, so that padding on the left would shift them. Of no
    examples at all, it makes one row that predicts nothing.

    Returns:
        A batch whose inputs are "input_ids" and "attention_mask", both (B, T) int64.
    """
    texts = [row["input_ids"] for row in rows] or [[pad_id]]
    lengths = np.array([len(text) for text in texts])
    mask = np.arange(max(lengths)) < lengths[:, None]
    ids = np.full(mask.shape, pad_id, dtype=np.int64)
    ids[mask] = np.concatenate(texts)
    is_target = mask & (np.arange(max(lengths)) >= np.array(_first_targets(rows) or [1])[:, None])
    labels = np.where(is_target, ids, IGNORED)
    inputs = {"input_ids": torch.from_numpy(ids), "attention_mask": torch.from_numpy(mask.astype(np.int64))}
    spans, places = _contrasted(rows), np.arange(max(lengths))
    contrasted = None if spans is None else (places >= spans[:, :1]) & (places < spans[:, 1:])
    owners = np.broadcast_to(np.arange(len(mask))[:, None], mask.shape)
    return _batch(inputs, labels, owners, tuple(lengths.tolist()[: len(rows)]), multiple, contrasted)


def _first_targets(rows: list[dict[str, Any]]) -> list[int]:
    """Return the place of the first target of each example: 1 unless it names another, as in classification.

    Nothing stands before the first token that could predict it.
    """
    return [max(1, row.get("first_target", 1)) for row in rows]


def _contrasted(rows: list[dict[str, Any]]) -> np.ndarray | None:
    """Return (E, 2) int64, from which token to which each example is compared with its rivals; None without any."""
    return np.array([row["contrasted"] for row in rows]) if rows and "contrasted" in rows[0] else None


def _batch(
    inputs: dict[str, Any],
    labels: np.ndarray,
    owners: np.ndarray,
    lengths: tuple[int, ...],
    multiple: int,
    contrasted: np.ndarray | None,
) -> Batch:
    """List the places that predict a token: those whose next token has a label.

    Args:
        inputs: of the model.
        labels: (B, T).
        owners: (B, T), the example of each place; of places that predict a token only.
        lengths: tokens of each example.
        multiple: to which the places are filled up.
        contrasted: (B, T) bool, the tokens that are compared; None without rivals.
    """
    has_next = np.zeros(labels.shape, dtype=bool)
    has_next[:, :-1] = labels[:, 1:] != IGNORED
    predicting = torch.from_numpy(np.flatnonzero(has_next))
    filling = -len(predicting) % multiple

    def filled(values: Tensor, value: int = 0) -> Tensor:
        return torch.nn.functional.pad(values, (0, filling), value=value)

    return Batch(
        inputs,
        labels=torch.from_numpy(labels),
        predicting=filled(predicting, labels.size - 1),
        target_owners=filled(torch.from_numpy(owners.flatten())[predicting]),
        lengths=lengths,
        target_tokens=len(predicting),
        # A place is compared by the token that it predicts, the next one.
        contrasted=None if contrasted is None else filled(torch.from_numpy(contrasted).flatten()[predicting + 1]),
    )


def split_loader(
    rows: "Dataset", batch_size: int, pad_id: int, device: torch.device, batching: str, world: World
) -> DataLoader[Batch]:
    """Return a DataLoader over this rank's share of a whole split, in an order that pads least; see `build_loader`."""
    batches = length_sorted_batches(rows, world.size * batch_size)
    shares = [part for batch in batches for part in world.share(batch, batch_size)]
    return build_loader(rows, shares, pad_id, device, batching)


def halve_until_it_fits(
    compute: Callable[[Batch, list[int]], None], loader: DataLoader[Batch], batch: Batch, rows: list[int]
) -> None:
    """Call a function with a batch of a loader; if that does not fit in memory, with each half of it, and so on.

    Args:
        compute: takes a batch and the indices of its rows, and keeps nothing of one that does not fit.
        loader: of `build_loader`.
        batch: of the loader.
        rows: the indices of its rows.

    Raises:
        RuntimeError: a single row does not fit, or something else is wrong.
    """
    try:
        compute(batch, rows)
        return
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error) or len(rows) < 2:
            raise
    # Behind the handler, so that the error and all that it holds of the whole batch are gone.
    middle = len(rows) // 2
    for half in (rows[:middle], rows[middle:]):
        collate = loader.collate_fn
        halve_until_it_fits(compute, loader, collate([loader.dataset[row] for row in half]), half)


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def build_loader(
    rows: "Dataset",
    batches: list[list[int]],
    pad_id: int,
    device: torch.device,
    batching: str,
    with_rivals: Callable[[list[dict[str, Any]]], list[dict[str, Any]]] | None = None,
) -> DataLoader[Batch]:
    """Return a DataLoader over the given batches.

    Args:
        rows: a tokenized split.
        batches: indices into it.
        pad_id: of the token that fills up.
        device: decides to which multiple.
        batching: "packed" or "padded".
        with_rivals: gives, for some rows, these and others that follow them in the batch; see `training.contrast`.
    """

    def collate(rows: list[dict[str, Any]]) -> Batch:
        lay_out = {"packed": pack, "padded": pad}[batching]
        laid_out = with_rivals(rows) if with_rivals and rows else rows
        return replace(lay_out(laid_out, pad_id, token_multiple(device)), rivals=len(laid_out) - len(rows))

    return DataLoader(
        rows,
        batch_sampler=batches,
        collate_fn=collate,
        pin_memory=pins_memory(device),  # lets the copy to the GPU run beside the computation
        generator=torch.Generator(),  # its own, so that making a loader draws nothing from dropout's random numbers
    )
