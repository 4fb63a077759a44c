"""The machine's own limit: the least time of a step, from the rates that the machine shows in the same run."""

from dataclasses import dataclass

import torch
from transformers import GPT2Config

from emoft.device import seconds_of
from emoft.tracking.throughput import block_weights, training_operations
from emoft.training.precision import Precision

STREAM_BYTES = 256 << 20  # of each array of the addition whose bandwidth is taken for the device's


@dataclass(frozen=True)
class Machine:
    """What a device does at best."""

    flops: float  # floating-point operations per second, in matrix products of the training's type
    bandwidth: float  # bytes per second, read and written together


def least_seconds(machine: Machine, model: GPT2Config, lengths: list[int], half: bool) -> float:
    """Return the least time of an optimization step over texts of the given lengths, in tokens.

    A step has two parts, and the second cannot begin before the first ends, because clipping needs the norm of the
    whole gradient. Each takes at least the larger of operations / rate and bytes / bandwidth.

    1. Forward and backward. Operations: `training_operations`. Bytes: each weight is read forward and backward; in
       half precision it is read once in float32 and written in half before. Each gradient is written in float32.
    2. Update. Bytes: each gradient is read for the norm; AdamW reads weight, gradient and its two moments, and writes
       all but the gradient: 8 x 4 for each parameter.
    """
    parameters = block_weights(model) + model.n_embd * (model.vocab_size + model.n_positions)
    operations = training_operations(model, lengths)
    weight_bytes = 4 + 2 + 2 * 2 if half else 2 * 4
    forward_backward = max(operations / machine.flops, (weight_bytes + 4) * parameters / machine.bandwidth)
    return forward_backward + 8 * 4 * parameters / machine.bandwidth


def measure_bandwidth(precision: Precision, repeats: int = 3) -> float:
    """Return the bandwidth of an addition of large arrays, two read and one written, the best of a few."""
    x, y, z = (torch.ones(STREAM_BYTES // 4, device=precision.device) for _ in range(3))
    return 3 * STREAM_BYTES / min(seconds_of(lambda: torch.add(x, y, out=z), precision.device) for _ in range(repeats))
