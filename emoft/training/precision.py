"""Automatic mixed precision: the type of the matrix products, chosen for the device, and the loss scale of fp16."""

from contextlib import AbstractContextManager

import torch
from torch.amp import GradScaler

from emoft.errors import UserError


class Precision:
    """Autocast and GradScaler for one device.

    Weights, gradients and AdamW's state stay in float32; autocast runs matrix products in `dtype`. Only fp16 needs
    its loss scaled, because small gradients would vanish in its narrow range; elsewhere the scaler passes through.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = choose_precision(device) if name == "auto" else name
        self.device = device
        self.dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        self.scaler = GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context that a forward pass runs in."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "no")


def choose_precision(device: torch.device) -> str:
    """Return bf16 where the device computes in it, else fp16 on a GPU, else "no"."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu":
        able = torch.cpu.get_capabilities()
        return "bf16" if able.get("avx512_bf16") or able.get("amx_tile") else "no"
    return "no"


def choose_device(use_cpu: bool, local_rank: int = 0) -> torch.device:
    """Return the GPU of a rank, or the CPU where there is none or `use_cpu` asks for it.

    Raises:
        UserError: this host has fewer GPUs than ranks.
    """
    if use_cpu or not torch.cuda.is_available():
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"this host has {torch.cuda.device_count()} GPUs, and torchrun started a process too many: lower"
            " --nproc_per_node, or add --use_cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)  # what libraries call "the" GPU
    return device
