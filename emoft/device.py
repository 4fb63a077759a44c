"""What differs from one kind of device to another: which there is, its types, its memory, its clock.

torch names them "cpu", "cuda" (NVIDIA, and AMD by ROCm), "xpu" (Intel) and "mps" (Apple).
"""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from emoft.errors import UserError


def choose_device(use_cpu: bool, local_rank: int = 0) -> torch.device:
    """Return the accelerator of a rank, or the CPU where there is none or `use_cpu` asks for it.

    Raises:
        UserError: this host has fewer accelerators than ranks.
    """
    kind = None if use_cpu else torch.accelerator.current_accelerator(check_available=True)
    if kind is None:
        return torch.device("cpu")
    count = torch.accelerator.device_count()
    if local_rank >= count:
        raise UserError(
            f"this host has {count} {kind.type} device{'s' * (count != 1)}, and torchrun started a process too many:"
            " lower --nproc_per_node, or add --use_cpu"
        )
    torch.accelerator.set_device_index(local_rank)  # what libraries call "the" device
    return torch.device(kind.type, local_rank)


def half_precision(device: torch.device) -> str:
    """Return the precision of matrix products that suits a device: bf16 where it computes in it, else fp16 or "no".

    On Apple's devices autocast has not been tried: they compute in float32.
    """
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "xpu":
        return "bf16" if torch.xpu.is_bf16_supported() else "fp16"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_tile") else "no"
    return "no"


def sums_type(device: torch.device) -> torch.dtype:
    """Return the type in which long sums are kept: float64, which Apple's devices do not have."""
    return torch.float32 if device.type == "mps" else torch.float64


def token_multiple(device: torch.device) -> int:
    """Return the multiple to which the tokens of a batch are filled up.

    Every new shape costs its first matrix products: oneDNN compiles code for it and keeps that (a gigabyte after a few
    hundred shapes), cuBLAS and torch.compile choose anew.
    """
    return 8 if device.type == "cpu" else 64


def matrix_size(device: torch.device) -> int:
    """Return the rows and columns of a product that is large enough to be bound by arithmetic, not by memory."""
    return 1024 if device.type == "cpu" else 8192


def loss_rows(device: torch.device, vocabulary: int) -> int:
    """Return how many rows of logits are best computed at a time in float32.

    On the CPU what stays in its cache; elsewhere what is large enough for few launches and small beside the memory.
    """
    at_once = 8 << 20 if device.type == "cpu" else 512 << 20  # bytes
    return max(1, at_once // (4 * vocabulary))


def pins_memory(device: torch.device) -> bool:
    """Say whether a copy from page-locked memory to a device runs beside the computation."""
    return device.type in ("cuda", "xpu")


# ---- Random states ---------------------------------------------------------------------------------------------------


def random_state(device: torch.device) -> list[Tensor]:
    """Return the state of torch's generators: the CPU's, and the device's if it is another. Waits for nothing."""
    states = [torch.get_rng_state()]
    if device.type == "mps":
        return [*states, torch.mps.get_rng_state()]
    return states if device.type == "cpu" else [*states, torch.get_device_module(device).get_rng_state(device)]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    """Put a state of `random_state` back."""
    torch.set_rng_state(states[0])
    if device.type == "cpu" or len(states) < 2:
        return
    if device.type == "mps":
        torch.mps.set_rng_state(states[1])
    else:
        torch.get_device_module(device).set_rng_state(states[1], device)


# ---- Memory ----------------------------------------------------------------------------------------------------------


def memory_in_use(device: torch.device) -> int | None:
    """Return the bytes that the process holds; on an accelerator the most that were allocated there, or None."""
    if device.type == "mps":
        return torch.mps.current_allocated_memory()
    if device.type != "cpu":
        return torch.accelerator.max_memory_allocated(device)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_memory(device: torch.device) -> int | None:
    """Return the most bytes that this process held since the last reset; None where the system does not tell."""
    if device.type == "mps":
        return torch.mps.driver_allocated_memory()
    if device.type != "cpu":
        return torch.accelerator.max_memory_reserved(device)
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        if sys.platform == "win32":
            return None
        import resource  # here, since Windows has none

        # Since the process began, in KiB; on macOS in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def reset_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew, where the system can."""
    if device.type in ("cuda", "xpu"):
        torch.accelerator.reset_peak_memory_stats(device)
    elif device.type == "cpu" and os.access("/proc/self/clear_refs", os.W_OK):
        Path("/proc/self/clear_refs").write_text("5")


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be had, of the device or the host; None where the system does not tell."""
    if device.type in ("cuda", "xpu"):
        return int(torch.accelerator.get_memory_info(device)[0])
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    return min([available, *_left_in_group()])


def _left_in_group() -> list[int]:
    """Return what the control group of a container leaves, which its host's figures do not show."""
    places = {
        "/sys/fs/cgroup/memory.max": "/sys/fs/cgroup/memory.current",
        "/sys/fs/cgroup/memory/memory.limit_in_bytes": "/sys/fs/cgroup/memory/memory.usage_in_bytes",
    }
    for limit, usage in places.items():
        try:
            return [max(0, int(Path(limit).read_text()) - int(Path(usage).read_text()))]
        except (OSError, ValueError):  # there is none, or no limit ("max")
            continue
    return []


def give_back_memory() -> None:
    """Give what the accelerator's allocator keeps of freed memory back to it, so that other shapes can be had of it."""
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


# ---- Time ------------------------------------------------------------------------------------------------------------


def synchronize(device: torch.device) -> None:
    """Wait until the device has computed all that it was told."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds_of(function: Callable[[], object], device: torch.device) -> float:
    """Return the seconds that a function takes, with all that it told the device to do."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


# ---- Names -----------------------------------------------------------------------------------------------------------


def describe_device(device: torch.device) -> str:
    """Return a device in words, a CPU with the threads that compute on it."""
    if device.type in ("cuda", "xpu"):
        return str(torch.get_device_module(device).get_device_name())
    if device.type != "cpu":
        return device.type
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    number = torch.get_num_threads()
    return f"{number} thread{'s' * (number != 1)} on {names[0] if names else 'a CPU'}"


def backend() -> str:
    """Return torch.distributed's backends for this host: gloo for the CPU, and that of its accelerator."""
    import torch.distributed as dist  # here, as what only several processes use

    kind: Any = torch.accelerator.current_accelerator(check_available=True)
    if kind is None or not dist.is_available():
        return "gloo"
    own = dist.get_default_backend_for_device(kind)
    return f"cpu:gloo,{kind.type}:{own}" if own != "gloo" and dist.is_backend_available(own) else "gloo"
