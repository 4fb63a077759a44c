"""A model made ready to be trained: on its device, with the faster modules, compiled or spread over devices."""

from torch import nn
from transformers import GPT2LMHeadModel

from emoft.config import TrainConfig
from emoft.distributed.parallel import check_parallel, replicate, shard
from emoft.distributed.world import World
from emoft.model.attention import use_packed_attention
from emoft.model.kernels import compile_blocks, keep_freed_memory, use_fast_kernels
from emoft.training.precision import Precision


def prepare(model: GPT2LMHeadModel, config: TrainConfig, world: World, precision: Precision) -> nn.Module:
    """Prepare a model in place, in training mode.

    Returns:
        Its transformer, as the training calls it: (B, T) token ids -> (B, T, C) hidden states. Replicated, it is
        another object around the same weights; checkpoints, evaluation and samples use the plain model.

    Raises:
        UserError: the flags ask for what this model, this machine or this number of processes cannot do.
    """
    device = precision.device
    keep_freed_memory(device)
    check_parallel(config.parallel, world, model)
    if config.parallel == "fsdp":
        shard(model, world, device, precision.dtype)
    model.to(device)  # type: ignore[arg-type]  # a fault of the library's types
    model.train()
    use_packed_attention(model)
    use_fast_kernels(model)
    if config.gradient_checkpointing:
        # transformers 5.17 knows the second name only, which later versions deprecate.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if config.torch_compile:
        compile_blocks(model.transformer)
    if config.parallel == "ddp" and world.size > 1:
        return replicate(model.transformer, device)
    return model.transformer
