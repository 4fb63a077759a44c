"""Attention over packed batches: each token sees the earlier tokens of its own example, and no others.

Registered with transformers as the attention "packed". A batch that is not packed (padded ones, and generation with
its cache) goes to transformers' own "sdpa", so that a model keeps the one setting for everything.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from emoft.errors import warn
from emoft.model.kernels import dropout as fast_dropout
from emoft.private import flash_attention

NAME = "packed"
sdpa_attention, sdpa_mask = AttentionInterface()["sdpa"], AttentionMaskInterface()["sdpa"]


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let a model compute the attention of packed batches; it computes all others as before."""
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, packed_mask)
    model.set_attn_implementation(NAME)
    for block in model.get_decoder().h:
        # Chosen once, and by half precision type: the model computes in either by autocast.
        block.attn.packed_kernels = {
            dtype: choose_kernel(model.device, dtype, block.attn.head_dim) for dtype in (torch.bfloat16, torch.float16)
        }
    model.get_decoder().register_forward_pre_hook(_leave_mask, with_kwargs=True)


def _leave_mask(module: nn.Module, arguments: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Give a packed batch a mask that nobody reads, on its way into the model.

    Without one transformers looks for padding and for packed rows, and a GPU is waited for twice; one of four
    dimensions it leaves as it is. It is no part of the batch, since any other attention would take it by its word.
    """
    if named.get("boundaries") is not None and named.get("attention_mask") is None:
        named["attention_mask"] = named["boundaries"].new_ones((1, 1, 1, 1), dtype=torch.bool)
    return arguments, named


def packed_mask(**arguments: Any) -> Tensor | None:
    """Return the mask of a batch that is not packed: that of "sdpa".

    In training it is made whether anything is padding or not. To leave it out where nothing is, which pays for one
    prompt, would read from the device in each forward pass, and a GPU would be waited for.
    """
    if torch.is_grad_enabled():
        arguments["allow_is_causal_skip"] = False
    return sdpa_mask(**arguments)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    boundaries: Tensor | None = None,
    padded_index: Tensor | None = None,
    longest: int = 0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Compute causal attention within each example of a packed row.

    Args:
        module: the attention layer that calls.
        query: (1, H, N, D) of H heads, N tokens, D dimensions; key and value likewise.
        key: see query.
        value: see query.
        attention_mask: of a packed batch nothing that is read.
        dropout: share of the attention weights that is dropped.
        scaling: factor of the scores.
        boundaries: (E + 1,) int32, the ends of the E examples; None if the batch is not packed. See `batching.pack`.
        padded_index: (N,) int64, the place of each token in a view of (E, longest).
        longest: see padded_index.
        kwargs: what transformers passes besides.

    Returns:
        (1, N, H, D), and None for the attention weights, which are not kept.
    """
    if boundaries is None or padded_index is None:
        return sdpa_attention(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if getattr(module, "packed_kernels", {}).get(query.dtype) == "varlen":
        return varlen_attention(query, key, value, boundaries, longest, dropout, scaling), None
    return repadded_attention(query, key, value, padded_index, len(boundaries) - 1, longest, dropout, scaling), None


def choose_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """Return "varlen" where FlashAttention computes rows without padding, else "repadded".

    It exists for half precision on NVIDIA GPUs from Ampere on (compute capability 8.0) and for heads of up to 256
    dimensions, a multiple of 8 (Dao, 2023). Whether this torch was built with it (on Windows it is not) shows a trial.
    """
    is_half = dtype in (torch.float16, torch.bfloat16)
    if device.type != "cuda" or not is_half or torch.version.hip or head_size % 8 or head_size > 256:
        return "repadded"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "repadded"
    try:
        rows = torch.zeros(1, 1, 8, head_size, dtype=dtype, device=device, requires_grad=True)
        boundaries = torch.tensor([0, 3, 8], dtype=torch.int32, device=device)
        for dropout in (0.0, 0.1):
            varlen_attention(rows, rows, rows, boundaries, 8, dropout, None).sum().backward()
    except (RuntimeError, NotImplementedError) as error:
        warn(f"FlashAttention does not run here ({str(error).splitlines()[0]}): attention pads its rows instead")
        return "repadded"
    return "varlen"


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, dropout: float, scaling: float | None
) -> Tensor:
    """Causal attention over rows of different lengths, without any padding (FlashAttention, Dao, 2023)."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # (N, H, D)
    if dropout:  # of which the public function knows nothing
        return flash_attention(query, key, value, boundaries, longest, dropout, scaling)[None]
    output = varlen_attn(
        query,
        key,
        value,
        cu_seq_q=boundaries,
        cu_seq_k=boundaries,
        max_q=longest,
        max_k=longest,
        scale=scaling,
        window_size=(-1, 0),  # all earlier places, and no later one
    )
    assert isinstance(output, Tensor)  # it would be a pair if its other results were asked for
    return output[None]


def repadded_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: Tensor,
    examples: int,
    longest: int,
    dropout: float,
    scaling: float | None,
) -> Tensor:
    """Causal attention over a padded view of the packed row, (E, H, longest, D).

    No mask hides the padding: it stands after the tokens of its example, where causal attention does not look.
    """
    _, heads, _, width = query.shape
    query, key, value = (
        _Pad.apply(tensor[0].transpose(0, 1), index, examples * longest)  # (E * longest, H, D)
        .view(examples, longest, heads, width)
        .transpose(1, 2)
        for tensor in (query, key, value)
    )
    if dropout and query.device.type == "cpu":
        # The library's kernel for the CPU knows no dropout; what it falls back to draws slow random numbers.
        scores = (query * (width**-0.5 if scaling is None else scaling)) @ key.transpose(-1, -2)
        later = torch.ones(longest, longest, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -torch.inf).softmax(
            -1, dtype=torch.promote_types(scores.dtype, torch.float)
        )
        output = fast_dropout(weights.to(value.dtype), dropout) @ value
    else:
        output = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout, is_causal=True, scale=scaling)
    return _Unpad.apply(output.transpose(1, 2).reshape(examples * longest, heads, width), index)[None]


class _Pad(torch.autograd.Function):
    """(N, ...) -> (M, ...) with zeros between. Autograd's own backward of an indexed write would copy the zeros too."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, index: Tensor, rows: int) -> Tensor:
        ctx.save_for_backward(index)
        padded = tokens.new_zeros(rows, *tokens.shape[1:])
        padded[index] = tokens
        return padded

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return gradient[ctx.saved_tensors[0]], None, None


class _Unpad(torch.autograd.Function):
    """(M, ...) -> (N, ...): undoes `_Pad`. No index occurs twice, so that its backward is a write, not a sum."""

    @staticmethod
    def forward(ctx: Any, padded: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.rows = len(padded)
        return padded[index]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        padded = gradient.new_zeros(ctx.rows, *gradient.shape[1:])
        padded[ctx.saved_tensors[0]] = gradient
        return padded, None
