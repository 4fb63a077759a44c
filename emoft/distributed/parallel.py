"""One model on several devices: copied to each (DDP), or its weights spread over them (FSDP).

Both average the gradients of all ranks. The loop wants their sum, since it divides by the targets of all ranks itself,
and multiplies the loss by their number.
"""

import contextlib
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from transformers import GPT2LMHeadModel

from emoft.distributed.world import World
from emoft.errors import UserError


def check_parallel(parallel: str, world: World, model: GPT2LMHeadModel) -> None:
    """See that a model can be trained on several devices.

    Raises:
        UserError: it cannot, or --parallel asks for more than one process can do.
    """
    if parallel == "fsdp" and not world.launched:
        raise UserError("--parallel fsdp needs torchrun: torchrun --nproc_per_node=N train.py ...")
    if world.launched and model.lm_head.weight is not model.transformer.wte.weight:
        # Its gradient would not be exchanged: it is no part of the transformer, which is what is wrapped.
        raise UserError("several processes need a model whose head is its embedding, as GPT-2's is: train this on one")


def shard(model: GPT2LMHeadModel, world: World, device: torch.device, dtype: torch.dtype) -> None:
    """Spread a model's weights, and with them gradients and AdamW's moments, over all ranks, block by block (FSDP2).

    A block's attention and MLP are gathered when its turn comes and given up after it; embeddings and LayerNorms are
    kept from forward to backward, because the head, which is the embedding, needs them between.

    Args:
        model: on any device.
        world: all ranks.
        device: of this rank.
        dtype: of matrix products. Attention and MLP, which autocast would convert to it on each rank, are gathered in
            it: half the bytes in half precision, and the same bits. What autocast leaves in float32 is gathered in
            float32, and all gradients are summed in it; the weights that AdamW updates are float32 in any case.
    """
    # Imported here, as what only several processes use: it takes a second.
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # nothing writes into it
    mesh = init_device_mesh(device.type, (world.size,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.transformer.h:
        matrices: list[Any] = [block.attn, block.mlp]
        fully_shard(matrices, mesh=mesh, mp_policy=policy)
    fully_shard(model.transformer, mesh=mesh, reshard_after_forward=False)
    model.lm_head = TiedHead(model.transformer.wte)


def is_sharded(model: GPT2LMHeadModel) -> bool:
    """Whether the weights are spread, so that each forward pass is a collective."""
    return hasattr(model.transformer, "unshard")  # a method of FSDPModule, which it becomes


class TiedHead(nn.Module):
    """The head of a sharded model. The embedding's weight is another object each time it is gathered: it is asked."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.__dict__["embedding"] = embedding  # not a module of its own, whose weight would be saved twice

    @property
    def weight(self) -> Any:
        """(V, C)."""
        return self.__dict__["embedding"].weight

    def forward(self, hidden: Tensor) -> Tensor:
        """Return the logits (..., V) of hidden states (..., C)."""
        return F.linear(hidden, self.weight)


def replicate(transformer: nn.Module, device: torch.device) -> nn.Module:
    """Return a transformer whose gradients are averaged over all ranks in its backward pass, bucket by bucket."""
    from torch.nn.parallel import DistributedDataParallel  # here, as in `shard`

    ids = [device.index] if device.type != "cpu" else None
    return DistributedDataParallel(transformer, device_ids=ids, gradient_as_bucket_view=True)


class Agreement:
    """What all ranks find out together about a step: whether it fits in the memory of each."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.all_fit: bool | None = None  # not known yet

    def reach(self, fits: bool) -> bool:
        """Tell the others whether the step has fitted here, and return whether it has fitted everywhere.

        A collective the first time; afterwards what was found then is returned.
        """
        if self.all_fit is None:
            self.all_fit = self.world.highest(0 if fits else 1) == 0
        return self.all_fit


@contextlib.contextmanager
def exchange_gradients(transformer: Any, is_last: bool, agreement: Agreement | None = None) -> Iterator[None]:
    """Exchange the gradients of a forward and backward pass in this context: in the last one of a step only.

    FSDP exchanges them in each: whole gradients, kept until the last one, are what it is there to avoid.

    Args:
        transformer: of `model.preparation.prepare`.
        is_last: of the step.
        agreement: of a step that may not fit in memory. DDP's exchange begins before a backward pass is done, and hangs
            if a rank does not come to its end; that of such a step waits until all have.

    Raises:
        MemoryError: the step did not fit on another rank.
    """
    is_late = is_last and agreement is not None
    with transformer.no_sync() if hasattr(transformer, "no_sync") and (is_late or not is_last) else nullcontext():
        yield
    if is_late and agreement is not None:
        if not agreement.reach(fits=True):
            raise MemoryError("the step did not fit in the memory of another process")
        for parameter in transformer.parameters():
            if parameter.grad is not None:
                dist.all_reduce(parameter.grad.div_(agreement.world.size))


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be spread over the ranks; a collective if it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # a DTensor's


def like(value: Tensor, parameter: Any) -> Tensor:
    """Return a copy of a whole tensor, the same on all ranks, on a parameter's device, and spread as it is."""
    value = value.to(parameter.device, copy=True)
    if hasattr(parameter, "device_mesh"):  # a DTensor
        from torch.distributed.tensor import distribute_tensor  # here, as in `shard`

        return distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    return value


def whole_weights(model: nn.Module, world: World) -> dict[str, Tensor]:
    """Return the whole weights of a model, on the CPU; on rank 0 only, the others help and get nothing."""
    gathered = ((name, whole(parameter.detach())) for name, parameter in model.named_parameters())
    return {name: value.cpu() for name, value in gathered if world.is_main}


@torch.no_grad()
def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Put whole weights, the same on all ranks, into a model that may be spread over them."""
    for name, parameter in model.named_parameters():
        parameter.copy_(like(weights[name], parameter))


def whole_optimizer_state(optimizer: Optimizer, world: World) -> dict[str, Any]:
    """Return an optimizer's state as on a single device, on the CPU; on rank 0 only, the others get no tensors."""
    saved = optimizer.state_dict()
    gathered = ((index, name, whole(value)) for index, each in saved["state"].items() for name, value in each.items())
    state: dict[int, dict[str, Tensor]] = {}
    for index, name, value in gathered:
        if world.is_main:
            state.setdefault(index, {})[name] = value.cpu()
    return {**saved, "state": state}


def load_optimizer_state(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Put a state of `whole_optimizer_state` into an optimizer of as many parameters, spread over ranks or not."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {
        index: {name: like(value, parameters[index]) if value.dim() else value for name, value in each.items()}
        for index, each in saved["state"].items()
    }
    optimizer.load_state_dict({**saved, "state": state})
