"""What emoft takes from its libraries without their promise to keep it: each such name once, with the reason.

A new version may drop or change any of them without a word; tests/test_private.py has a test for each, which then says
so in a sentence.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
