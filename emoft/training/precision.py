"""Automatic mixed precision: the type of the matrix products, chosen for the device, and the loss scale of fp16."""

from contextlib import AbstractContextManager

import torch
from torch.amp import GradScaler

from emoft.device import half_precision


class Precision:
    """Autocast and GradScaler for one device.

    Weights, gradients and AdamW's state stay in float32; autocast runs matrix products in `dtype`. Only fp16 needs
    its loss scaled, because small gradients would vanish in its narrow range; elsewhere the scaler passes through.
    """

    def __init__(self, name: str, device: torch.device) -> None:
        self.name = half_precision(device) if name == "auto" else name
        self.device = device
        self.dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[self.name]
        # Products that stay in float32 are computed in it, not in TF32, so that figures compare between devices. It is
        # torch's own default, which TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in the environment would change.
        torch.set_float32_matmul_precision("highest")
        self.scaler = GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context that a forward pass runs in."""
        return torch.autocast(self.device.type, dtype=self.dtype, enabled=self.name != "no")
