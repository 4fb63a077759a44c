"""GPT-2 as generation needs it: tokens in, the scores of the next token out, keys and values of earlier ones kept.

`Decoder` computes what `GPT2LMHeadModel` does, over its weights, with less around it: keys and values are written into
memory that is there already, where transformers copies all of them for each token; the head sees the last place only;
and the weights lie as the device reads them best.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GPT2LMHeadModel

from emoft.distributed.parallel import is_sharded
from emoft.model.linear import fixed_product
from emoft.training.precision import Precision

ROOM = 32  # places by which the memory of keys and values grows


@dataclass
class Rows:
    """Texts that go on together, and what a decoder has kept of them. Shorter ones are padded on the left."""

    padding: Tensor  # (B,) places in front of each text
    length: int = 0  # places that have been read, padding included
    # By layer (B, 2, H, M, D): keys, then values, of which the first `length` of M places are filled.
    kept: list[Tensor] = field(default_factory=list)

    def make_room(self, tokens: int) -> None:
        """See that there is memory for so many tokens more."""
        missing = self.length + tokens - self.kept[0].shape[3]
        if missing > 0:
            self.kept = [F.pad(tensor, (0, 0, 0, max(missing, ROOM))) for tensor in self.kept]

    def mask(self, new: int) -> Tensor:
        """Return (B, 1, T, `length`), which places the last T tokens see: no padding, and none that is later."""
        places = torch.arange(self.length, device=self.padding.device)
        sees = (places <= places[-new:, None]) & (places >= self.padding[:, None, None])
        return sees[:, None]

    def keep(self, chosen: Tensor) -> None:
        """Go on with some of the texts only, by their places in the batch."""
        self.padding = self.padding[chosen]
        self.kept = [tensor[chosen] for tensor in self.kept]


class Block:
    """The weights of one of GPT-2's blocks, as products; its norms stay the model's own."""

    def __init__(self, block: Any, activation: str, dtype: torch.dtype, int8: bool) -> None:
        self.norms, self.scaling = (block.ln_1, block.ln_2), block.attn.scaling
        gelu = activation == "gelu_new"  # GPT-2's own, part of the product before it; another is the model's module
        self.activate: Callable[[Tensor], Tensor] = nn.Identity() if gelu else block.mlp.act
        self.to_heads = fixed_product(block.attn.c_attn.weight, block.attn.c_attn.bias, dtype, int8)
        self.from_heads = fixed_product(block.attn.c_proj.weight, block.attn.c_proj.bias, dtype, int8)
        self.widen = fixed_product(block.mlp.c_fc.weight, block.mlp.c_fc.bias, dtype, int8, gelu)
        self.narrow = fixed_product(block.mlp.c_proj.weight, block.mlp.c_proj.bias, dtype, int8)


class Decoder:
    """A model that only generates."""

    def __init__(self, model: GPT2LMHeadModel, precision: Precision, int8: bool = False) -> None:
        """Prepare it; the model must not change any more.

        Args:
            model: on the device of the precision.
            precision: of the products; all else is computed in float32, as under autocast.
            int8: see `fixed_product`; then the precision says nothing.
        """
        self.model, self.precision = model, precision
        self.dtype = torch.float32 if int8 else precision.dtype
        self.blocks = [
            Block(block, model.config.activation_function, self.dtype, int8) for block in model.transformer.h
        ]
        self.head = fixed_product(model.lm_head.weight.t(), None, self.dtype, int8)

    def begin(self, texts: Sequence[Sequence[int]], filler: int) -> tuple[Rows, Tensor]:
        """Read the beginnings of texts, of one token at least, filled up with a token that nothing sees.

        Returns:
            What is kept of them, and (B, V) float32: the scores of the token that comes next.
        """
        width = max(map(len, texts))
        device, config = self.precision.device, self.model.config
        tokens = torch.tensor([[filler] * (width - len(text)) + list(text) for text in texts], device=device)
        rows = Rows(torch.tensor([width - len(text) for text in texts], device=device))
        shape = len(texts), 2, config.n_head, width + ROOM, config.n_embd // config.n_head
        rows.kept = [torch.zeros(shape, dtype=self.dtype, device=device) for _ in self.blocks]
        return rows, self.read(tokens, rows)

    @torch.inference_mode()
    def read(self, tokens: Tensor, rows: Rows) -> Tensor:
        """Return the scores (B, V), float32, of what follows the tokens (B, T), which follow what has been read.

        Only what is no padding is computed: its places lie end to end, (N, C), everywhere but in the attention.
        """
        transformer: Any = self.model.transformer
        new = tokens.shape[1]
        rows.make_room(new)
        rows.length += new
        positions = torch.arange(rows.length - new, rows.length, device=tokens.device) - rows.padding[:, None]  # (B, T)
        there = None if new == 1 else (positions >= 0).flatten().nonzero()[:, 0]  # (N,) places of B * T; None: all
        # What a row that has ended would still write may have no position left.
        positions = positions.clamp(max=self.model.config.n_positions - 1)
        hidden = F.embedding(pack(tokens, there), transformer.wte.weight)
        hidden = hidden + F.embedding(pack(positions, there), transformer.wpe.weight)  # (N, C)
        mask = rows.mask(new)
        for block, kept in zip(self.blocks, rows.kept, strict=True):
            heads = unpack(block.to_heads(block.norms[0](hidden)), there, tokens.shape)  # (B, T, 3 C)
            heads = heads.view(*tokens.shape, 3, kept.shape[2], -1).permute(0, 2, 3, 1, 4)  # (B, 3, H, T, D)
            kept[:, :, :, rows.length - new : rows.length] = heads[:, 1:]
            keys, values = kept[:, :, :, : rows.length].unbind(1)  # (B, H, M, D)
            query = heads[:, 0].to(self.dtype)
            seen = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, scale=block.scaling)
            hidden = hidden + block.from_heads(pack(seen.transpose(1, 2).flatten(2), there))
            hidden = hidden + block.narrow(block.activate(block.widen(block.norms[1](hidden))))
        if there is not None:
            hidden = hidden[(new - rows.padding).cumsum(0) - 1]  # the last place of each row
        return self.head(transformer.ln_f(hidden)).float()

    def goes_on(self, here: bool) -> bool:
        """Return whether another token is computed, given whether a text on this process needs it."""
        return here


def pack(padded: Tensor, there: Tensor | None) -> Tensor:
    """(B, T, ...) -> (N, ...): the places of B * T that are given, or all."""
    flat = padded.flatten(0, 1)
    return flat if there is None else flat[there]


def unpack(packed: Tensor, there: Tensor | None, shape: torch.Size) -> Tensor:
    """(N, C) -> (B, T, C): undoes `pack`, with zeros between."""
    if there is None:
        return packed.view(*shape, -1)
    padded = packed.new_zeros(shape.numel(), packed.shape[1])
    padded[there] = packed
    return padded.view(*shape, -1)


@dataclass
class LibraryRows(Rows):
    """`Rows` whose keys and values transformers keeps."""

    cache: DynamicCache = field(default_factory=DynamicCache)

    def keep(self, chosen: Tensor) -> None:
        """See `Rows.keep`."""
        self.padding = self.padding[chosen]
        self.cache.batch_select_indices(chosen)


class ShardedDecoder(Decoder):
    """A model whose weights are spread over processes: they are gathered by the hooks of its own forward pass."""

    def __init__(self, model: GPT2LMHeadModel, precision: Precision) -> None:
        self.model, self.precision = model, precision

    def begin(self, texts: Sequence[Sequence[int]], filler: int) -> tuple[Rows, Tensor]:
        """See `Decoder.begin`."""
        width = max(map(len, texts))
        device = self.precision.device
        tokens = torch.tensor([[filler] * (width - len(text)) + list(text) for text in texts], device=device)
        rows = LibraryRows(torch.tensor([width - len(text) for text in texts], device=device))
        return rows, self.read(tokens, rows)

    def read(self, tokens: Tensor, rows: Rows) -> Tensor:
        """See `Decoder.read`."""
        assert isinstance(rows, LibraryRows)
        read = rows.length + tokens.shape[1]
        positions = torch.arange(rows.length, read, device=tokens.device) - rows.padding[:, None]
        with self.precision.autocast():
            output = self.model(
                input_ids=tokens,
                attention_mask=(torch.arange(read, device=tokens.device) >= rows.padding[:, None]).long(),
                position_ids=positions.clamp(0, self.model.config.n_positions - 1),
                past_key_values=rows.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        rows.length = read
        return output.logits[:, -1].float()

    def goes_on(self, here: bool) -> bool:
        """See `Decoder.goes_on`: no process may end before the others, since each forward pass is a collective."""
        anywhere = torch.tensor(float(here))
        dist.all_reduce(anywhere, dist.ReduceOp.MAX)
        return bool(anywhere.item())


def build_decoder(model: GPT2LMHeadModel, precision: Precision, int8: bool = False) -> Decoder:
    """Return what computes a model's next tokens."""
    return ShardedDecoder(model, precision) if is_sharded(model) else Decoder(model, precision, int8)
