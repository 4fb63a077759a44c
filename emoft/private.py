"""What emoft takes from its libraries without their promise to keep it: each such name once, with the reason.

A new version may drop or change any of them without a word; tests/test_private.py has a test for each, which then says
so in a sentence.
"""

import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from datasets import Dataset
    from torch import Tensor


def fingerprint_of(rows: "Dataset") -> str:
    """Return the name under which `datasets` knows what rows hold: their files, and all that was done to them since.

    As of datasets 5.2 no public name tells it, though the library's own page on its cache prints `_fingerprint`. A hash
    of the rows themselves would tell new data from old as well, but takes 2 to 10 seconds for a million of which a few
    were left out, at each start.
    """
    return rows._fingerprint


def flash_attention(
    query: "Tensor",
    key: "Tensor",
    value: "Tensor",
    boundaries: "Tensor",
    longest: int,
    dropout: float,
    scaling: float | None,
) -> "Tensor":
    """Compute causal attention within each of several rows that lie end to end, on a GPU (FlashAttention, Dao, 2023).

    As of torch 2.13 the public name for this, `torch.nn.attention.varlen.varlen_attn`, calls the same operator, but
    knows no dropout: it is used without any.

    Args:
        query: (N, H, D) of N tokens, H heads, D dimensions, in half precision; key and value likewise.
        key: see query.
        value: see query.
        boundaries: (E + 1,) int32, the ends of the E rows.
        longest: tokens of the longest row.
        dropout: share of the attention weights that is dropped.
        scaling: factor of the scores, None for D ** -0.5.

    Returns:
        (N, H, D).
    """
    import torch  # here, since the flags are read with this module before torch is loaded

    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        cum_seq_q=boundaries,
        cum_seq_k=boundaries,
        max_q=longest,
        max_k=longest,
        dropout_p=dropout,
        is_causal=True,
        return_debug_mask=False,
        scale=scaling,
    )[0]


def go_offline() -> None:
    """Let huggingface_hub, transformers and `datasets` answer from their caches from now on, without asking the Hub.

    The public switch is the environment variable HF_HUB_OFFLINE, which they read when they are imported: long before a
    program finds the Hub out of reach. As of huggingface_hub 2.4 and datasets 5.2 each keeps its own copy of it.
    """
    import datasets  # inside: see `flash_attention`
    import huggingface_hub

    huggingface_hub.constants.HF_HUB_OFFLINE = True
    datasets.config.HF_HUB_OFFLINE = True


def int8_product(weight: "Tensor", bias: "Tensor | None") -> Callable[["Tensor"], "Tensor"]:
    """Return x -> x W + b in eight bits, on a CPU: (N, in) float32 -> (N, out) float32.

    As of torch 2.13 the class for it is public, but deprecated, together with the quantized tensors that it is made of.
    What is to come in its place computes on CPUs only in compiled code.

    Args:
        weight: (in, out) float32.
        bias: (out,) float32, if there is one.
    """
    import torch  # inside: see `flash_attention`

    rows = weight.t().contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scales = (rows.abs().amax(1) / 127).clamp_min(torch.finfo(torch.float32).tiny).double()  # of each output
        quantized = torch.quantize_per_channel(rows, scales, torch.zeros(len(rows), dtype=torch.long), 0, torch.qint8)
        layer = torch.ao.nn.quantized.dynamic.Linear(weight.shape[0], weight.shape[1], bias is not None, torch.qint8)
        layer.set_weight_bias(quantized, bias)
    return layer.eval()


def packs(device: "torch.device", dtype: "torch.dtype") -> bool:
    """Whether `packed_product` computes in such a type on a device."""
    import torch  # inside: see `flash_attention`

    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    if dtype is torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype is torch.float16:
        return torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return dtype is torch.float32


def packed_product(weight: "Tensor", bias: "Tensor | None", gelu: bool = False) -> Callable[["Tensor"], "Tensor"]:
    """Return x -> x W + b, (N, in) -> (N, out), over a copy of W in the order in which oneDNN's kernels read it.

    As of torch 2.13 only compiled code gets there in public (torch.compile with freezing), after a minute. On two AVX2
    cores the products of a step of GPT-2 small take 15 ms for one row, 37 for 16 and 98 for 64 of them; `torch.addmm`
    takes 19, 54 and 119, and the head 6, 14 and 39 ms instead of 10, 38 and 74.

    Args:
        weight: (in, out), of a type that `packs`.
        bias: (out,), if there is one.
        gelu: apply GELU with tanh to the result (Hendrycks and Gimpel, 2016), while it is at hand.
    """
    import torch  # inside: see `flash_attention`

    packed = torch.ops.mkldnn._reorder_linear_weight(weight.t().contiguous())
    multiply, dtype = torch.ops.mkldnn._linear_pointwise, weight.dtype
    name, algorithm = ("gelu", "tanh") if gelu else ("none", "")
    return lambda values: multiply(values.to(dtype), packed, bias, name, [], algorithm)


def restart_marks(step: int) -> list[Any]:
    """Return the events that begin a file of TensorBoard's anew: what other files hold from `step` on is hidden.

    They are what `SummaryWriter(purge_step=step)` writes, which lets no summary made by others into its file. The
    public `FileWriter.add_event` does, but as of tensorboard 2.21 the type of an event has no public name.
    """
    from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # inside: see `flash_attention`

    return [
        Event(step=step, file_version="brain.Event:2"),
        Event(step=step, session_log=SessionLog(status=SessionLog.START)),
    ]
