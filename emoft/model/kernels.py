"""Faster ways to compute the same functions: activation, dropout on the CPU, compiled code, memory that is kept."""

import ctypes
import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from emoft.errors import UserError


def use_fast_kernels(model: GPT2LMHeadModel) -> None:
    """Replace modules of a model by faster ones of the same function; configuration and weights stay as they are."""
    use_fast_gelu(model)
    use_fast_dropout(model)


def use_fast_gelu(model: GPT2LMHeadModel) -> None:
    """Replace GPT-2's activation, which transformers computes by many small kernels, by one that is a single kernel."""
    if model.config.activation_function == "gelu_new":
        for block in model.transformer.h:
            # The same formula (Hendrycks and Gimpel, 2016, with tanh), by one kernel instead of eight.
            block.mlp.act = nn.GELU(approximate="tanh")  # type: ignore[union-attr]  # a fault of the library's types


def use_fast_dropout(model: GPT2LMHeadModel) -> None:
    """Replace all dropout of a model, but that of the attention's weights, by `Dropout`."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if type(child) is nn.Dropout:
                setattr(module, name, Dropout(child.p))


class Dropout(nn.Dropout):
    """`nn.Dropout` by `dropout`."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input of any shape, in training with a share of it zeroed and the rest scaled up."""
        return dropout(input, self.p) if self.training else input


def dropout(values: Tensor, share: float) -> Tensor:
    """Zero each value with the probability `share`, and scale up the others so that the mean stays.

    On the CPU the random numbers cost more than all else in dropout. Here one number of 64 bits serves four values, of
    16 bits each, so that the share is met to 1 / 65,536. Drawn from torch's global generator.
    """
    if share == 0 or values.device.type != "cpu" or torch.compiler.is_compiling():
        return F.dropout(values, share)
    return _Dropout.apply(values, share)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, share: float) -> Tensor:
        count = values.numel()
        numbers = torch.empty((count + 3) // 4, dtype=torch.int64).random_(-(2**63), None)
        uniform = numbers.view(torch.int16)[:count].view(values.shape)  # from -32,768 to 32,767
        kept = uniform >= round(share * 65536) - 32768 if share < 1 else torch.zeros_like(uniform, dtype=torch.bool)
        ctx.scale = 1 / (1 - share) if share < 1 else 0.0
        ctx.save_for_backward(kept)
        return _masked(values, kept, ctx.scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _masked(gradient, ctx.saved_tensors[0], ctx.scale), None


def _masked(values: Tensor, kept: Tensor, scale: float) -> Tensor:
    return kept.to(values.dtype).mul_(scale).mul_(values)


def compile_blocks(transformer: nn.Module) -> None:
    """Let the blocks of a transformer run compiled code in training; it is made when they are first called.

    Block by block, because all of them are the same code: it is compiled once, instead of as often as there are blocks.
    And between two blocks the backward pass comes back to Python's side of autograd, so that DDP, which is wrapped
    around the transformer afterwards, can exchange the gradients of the later ones while it computes the earlier ones.
    The number of tokens differs from batch to batch: it is a variable of the compiled code, which is made only once.
    Evaluation and samples, which call the blocks in other ways, run as they are.

    Raises:
        UserError: this machine cannot compile.
    """
    try:
        torch.compile(torch.sin)(torch.zeros(8, device=next(transformer.parameters()).device))
    except Exception as error:  # each backend has its own types for what is one case to the user
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise UserError(
            f"--torch_compile: nothing can be compiled here ({reason}): install a C++ compiler (on Debian and Ubuntu"
            " g++ and python3-dev), or drop the flag"
        ) from None
    for block in transformer.h:  # type: ignore[union-attr]  # a fault of the library's types
        _compile_in_training(block)


def uncompiled(is_compiled: bool) -> AbstractContextManager[Any]:
    """Return the context in which compiled blocks run as they are written, so that hooks in them are called.

    Args:
        is_compiled: whether there are any; torch takes seconds to load what it would need.
    """
    return torch.compiler.set_stance("force_eager") if is_compiled else nullcontext()


def _compile_in_training(block: nn.Module) -> None:
    # The function, not the module: what stands around it, such as checkpointed activations and hooks, stays outside.
    plain, fast = block.forward, torch.compile(block.forward, dynamic=True)

    def forward(*arguments: Any, **named: Any) -> Any:
        return (fast if block.training else plain)(*arguments, **named)

    block.forward = forward


def keep_freed_memory(device: torch.device) -> None:
    """Let the process keep memory that it frees, for the next step, instead of returning it to the kernel.

    By default glibc returns big blocks at once, and each step gets them back page by page, filled with zeros by the
    kernel: up to a third of a step's time on the CPU. See mallopt(3). Elsewhere than on Linux with glibc, nothing
    happens.
    """
    if sys.platform != "linux" or device.type != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        m_trim_threshold, m_mmap_max = -1, -4  # of malloc.h
        mallopt(m_mmap_max, 0)
        mallopt(m_trim_threshold, 2**31 - 1)
