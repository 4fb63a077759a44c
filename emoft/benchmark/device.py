"""The device that a comparison ran on, in words."""

import torch

from emoft.benchmark.config import BenchmarkConfig
from emoft.device import choose_device, describe_device
from emoft.training.precision import Precision


def describe_machine(config: BenchmarkConfig) -> str:
    """Return the device, the precision of emoft on it, and torch's version, in words."""
    device = choose_device(config.use_cpu)
    return f"{describe_device(device)}, {Precision(config.mixed_precision, device).name}, torch {torch.__version__}"
