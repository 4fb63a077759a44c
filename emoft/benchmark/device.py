"""The device that a comparison ran on, in words."""

from pathlib import Path

import torch

from emoft.benchmark.config import BenchmarkConfig
from emoft.device import choose_device
from emoft.training.precision import Precision


def describe_machine(config: BenchmarkConfig) -> str:
    """Return the device, the precision of emoft on it, and torch's version, in words."""
    device = choose_device(config.use_cpu)
    beside = f"{Precision(config.mixed_precision, device).name}, torch {torch.__version__}"
    if device.type in ("cuda", "xpu"):
        return f"{torch.get_device_module(device).get_device_name()}, {beside}"
    names: list[str] = []
    if Path("/proc/cpuinfo").exists():
        names = [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
    return f"{torch.get_num_threads()} threads on {names[0] if names else 'a CPU'}, {beside}"
