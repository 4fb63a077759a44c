"""AdamW's parameter groups, the learning-rate schedule, clipping."""

import math

from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR

from emoft.config import TrainConfig
from emoft.distributed.parallel import whole
from emoft.errors import UserError


def build_optimizer(model: nn.Module, config: TrainConfig) -> AdamW:
    """Return AdamW (Loshchilov and Hutter, 2019) with weight decay on matrices, not on biases and LayerNorms.

    The fused kernel updates all parameters in one pass. It also scales the gradients by itself, and skips an update,
    as `optimizer.grad_scale` and `optimizer.found_inf` say: see `clip_gradients` and `emoft.training.nonfinite`.
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


def count_warmup_steps(warmup_steps: float, total_steps: int) -> int:
    """Return the warmup in steps, of a count or a share below 1.

    Raises:
        UserError: the warmup is longer than the run.
    """
    steps = math.ceil(warmup_steps * total_steps) if warmup_steps < 1 else int(warmup_steps)
    if steps > total_steps:
        raise UserError(
            f"--warmup_steps {steps} is longer than the run of {total_steps} steps: lower it, or give a share below 1"
        )
    return steps


def build_schedule(optimizer: AdamW, config: TrainConfig, total_steps: int) -> LambdaLR:
    """Return the schedule of the learning rate: a linear rise from 0, then linear, cosine or no decay to 0."""
    warmup_steps = count_warmup_steps(config.warmup_steps, total_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return step / warmup_steps
        progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
        if config.lr_scheduler_type == "linear":
            return max(0.0, 1.0 - progress)
        if config.lr_scheduler_type == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress)))
        return 1.0

    return LambdaLR(optimizer, factor)


def clip_gradients(optimizer: AdamW, max_grad_norm: float) -> Tensor:
    """Make the next `optimizer.step()` scale all gradients down together if their norm is above `max_grad_norm`.

    The fused kernel divides by `optimizer.grad_scale` where it reads the gradients anyway, so that clipping needs no
    pass over memory of its own; until then, the gradients are those before clipping.

    Args:
        optimizer: holds the parameters.
        max_grad_norm: the highest norm that is left alone; 0 leaves all alone.

    Returns:
        The L2 norm over all parameters before clipping, a tensor without dimensions, on the device.
    """
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = whole(nn.utils.get_total_norm(gradients))
    scale = (norm / (max_grad_norm or math.inf)).clamp(min=1.0)
    optimizer.grad_scale = scale.float()  # type: ignore[attr-defined]  # the type that the kernel reads
    return norm
