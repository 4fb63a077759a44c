"""AdamW's parameter groups, the learning-rate schedule, and what AdamW's own pass over the gradients can do beside it.

AdamW's fused kernel reads two attributes of the optimizer: it divides the gradients by `grad_scale` where it reads them
anyway, and changes nothing where `found_inf` is 1. Clipping in that pass saves one of its own over all gradients, and a
GPU need not be waited for to leave out a step. No other optimizer reads them, so others are refused.
"""

import math

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from emoft.config import TrainConfig
from emoft.distributed.parallel import whole
from emoft.training.schedule import count_warmup_steps, schedule_factor


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices, not on biases and LayerNorms.

    The fused kernel updates all parameters in one pass.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.adam_beta1, config.adam_beta2),
        eps=config.adam_epsilon,
        fused=True,
    )


def build_schedule(optimizer: Optimizer, config: TrainConfig, total_steps: int) -> LambdaLR:
    """Return the schedule of the learning rate: see `schedule_factor`."""
    warmup_steps = count_warmup_steps(config.warmup_steps, total_steps)
    return LambdaLR(optimizer, lambda step: schedule_factor(config.lr_scheduler_type, step, warmup_steps, total_steps))


def clip_in_next_step(optimizer: Optimizer, max_grad_norm: float) -> Tensor:
    """Let the next `optimizer.step()` scale all gradients down together if their norm is above `max_grad_norm`.

    The update is that after `torch.nn.utils.clip_grad_norm_`, which costs a pass over all gradients more. The gradients
    themselves stay as they are: what is measured of them before the step is not clipped.

    Args:
        optimizer: a fused AdamW, which holds the parameters.
        max_grad_norm: the highest norm that is left alone; 0 leaves all alone.

    Returns:
        The L2 norm over all parameters before clipping, a tensor without dimensions, on the device.

    Raises:
        TypeError: the optimizer would not clip.
    """
    refuse_unless_fused(optimizer, "clip", "call torch.nn.utils.clip_grad_norm_(model.parameters(), max_grad_norm)")
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    scale = (norm / (max_grad_norm or math.inf)).clamp(min=1.0)
    optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]  # the type that the kernel reads
    return norm


def skip_next_step_if(optimizer: Optimizer, condition: Tensor) -> None:
    """Let the next `optimizer.step()` change nothing if a condition holds, without waiting for a GPU to know it.

    Args:
        optimizer: a fused AdamW.
        condition: a tensor without dimensions, true or false, on the device.

    Raises:
        TypeError: the optimizer would not skip.
    """
    refuse_unless_fused(optimizer, "skip a step", "look at each loss and norm before the step, and leave it out")
    optimizer.found_inf = condition.float()  # type: ignore[attr-defined]


def refuse_unless_fused(optimizer: Optimizer, what: str, instead: str) -> None:
    """See that an optimizer reads `grad_scale` and `found_inf`.

    Raises:
        TypeError: it does not; every other one would silently go on without.
    """
    if not isinstance(optimizer, AdamW) or not all(group.get("fused") for group in optimizer.param_groups):
        raise TypeError(
            f"{type(optimizer).__name__} does not {what} by itself, only AdamW(..., fused=True) does: take that, or"
            f" {instead}"
        )
