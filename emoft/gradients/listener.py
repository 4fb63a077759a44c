"""What is heard of a step while it is computed: activations, attention, and each text's own gradient, by block."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import GPT2LMHeadModel

from emoft.data.batching import Batch
from emoft.device import sums_type

SATURATED = -3.0  # below it GELU passes about 1 % of a gradient or less


class Listener:
    """Listens to the blocks of a model at a step. Each figure is a sum on the device, read when all is done."""

    def __init__(self, model: GPT2LMHeadModel, blocks: list[str], batches: list[Batch], loss_scale: float) -> None:
        """Begin to listen.

        Args:
            model: that computes the step.
            blocks: their names, in the order of the model.
            batches: the micro-batches of this rank.
            loss_scale: what each gradient is multiplied by until gradients are unscaled and averaged over the ranks.
        """
        self.batches, self.loss_scale = batches, loss_scale
        self.sums: dict[str, Tensor] = {}  # of this rank: a sum, and over how many tokens or values it runs
        self.largest: dict[str, Tensor] = {}  # of this rank
        # Of each text of this rank, the squared norm of its part of the gradient of the blocks' matrices. Texts are
        # not told apart where others stand beside them that are to be told from them.
        self.squares: list[Tensor] = [] if any(batch.rivals for batch in batches) else [torch.zeros(0)] * len(batches)
        owners = [batch.owners() for batch in batches]
        # Places in the flattened rows: of all tokens of the first micro-batch, and of each text of each. Found here, on
        # the CPU, since a GPU would be waited for at each layer.
        self._tokens = (owners[0].flatten() >= 0).nonzero().flatten().to(model.device)
        self._places = [
            [(each.flatten() == text).nonzero().flatten().to(model.device) for text in range(batch.examples)]
            for each, batch in zip(owners, batches, strict=True)
        ]
        self._micro_batch = -1
        self._hooks: list[RemovableHandle] = [model.transformer.register_forward_pre_hook(self._begin_micro_batch)]
        for number, name in enumerate(blocks):
            block: Any = model.transformer.h[number]
            self._hooks.append(block.register_forward_hook(self._output_hook(name)))
            self._hooks.append(block.mlp.act.register_forward_pre_hook(self._saturation_hook(name)))
            self._hooks.append(block.attn.c_attn.register_forward_hook(self._attention_hook(name, block.attn)))
            for layer in (block.attn.c_attn, block.attn.c_proj, block.mlp.c_fc, block.mlp.c_proj):
                if self.squares and layer.weight.requires_grad:
                    self._hooks.append(layer.register_forward_hook(self._text_gradient_hook))

    def stop(self) -> None:
        """Listen no longer."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _begin_micro_batch(self, module: nn.Module, inputs: Any) -> None:
        self._micro_batch += 1

    def _is_first(self, tag: str) -> bool:
        """Whether this is the first micro-batch, and the figure is not known yet."""
        return tag not in self.sums and self._micro_batch == 0

    def _output_hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if not self._is_first(f"activation_norm/{name}") or not hidden.requires_grad:
                return
            tokens = hidden.detach().flatten(0, 1)[self._tokens].float()  # (N, C)
            squares = tokens.square()
            self.sums[f"activation_norm/{name}"] = _sum_of(squares.sum(dtype=sums_type(tokens.device)), len(tokens))
            fourth_powers = squares.square().sum(dtype=sums_type(tokens.device))
            self.sums[f"fourth_powers/{name}"] = _sum_of(fourth_powers, tokens.numel())
            hidden.register_hook(look_at_gradient)

        def look_at_gradient(gradient: Tensor) -> None:
            norm = gradient.flatten(0, 1)[self._tokens].float().norm().to(sums_type(gradient.device)) / self.loss_scale
            self.sums.setdefault(f"activation_gradient/{name}", _sum_of(norm**2, 1))

        return look

    def _saturation_hook(self, name: str) -> Any:
        def look(module: nn.Module, inputs: tuple[Tensor]) -> None:
            if self._is_first(f"activation_saturation/{name}"):
                saturated = inputs[0].detach().flatten(0, 1)[self._tokens] < SATURATED
                self.sums[f"activation_saturation/{name}"] = _sum_of(saturated.sum(), saturated.numel())

        return look

    def _attention_hook(self, name: str, attention: Any) -> Any:
        """Compute the scores of attention once more: what computes it keeps none."""

        def look_at_scores(values: Tensor) -> tuple[Tensor, list[Tensor]]:
            """Return the largest score and the entropies as shares of what is possible, by text."""
            largest, entropies = values.new_tensor(-math.inf), []
            for places in self._places[0]:
                scores = attention_scores(attention, values[places])  # (H, T, T)
                largest = torch.maximum(largest, scores.max())
                if len(places) > 1:
                    chances = scores.softmax(-1)[:, 1:]
                    entropy = -(chances * chances.clamp_min(1e-30).log()).sum(-1)  # (H, T - 1) nats
                    choices = torch.arange(2, len(places) + 1, device=values.device).log()
                    entropies.append((entropy / choices).flatten())
            return largest, entropies

        @torch.no_grad()
        def look(module: nn.Module, inputs: Any, output: Tensor) -> None:
            if not self._is_first(f"attention_entropy/{name}"):
                return
            # In float32 all of it: the logarithms of the smallest probabilities are not finite in fp16.
            with torch.autocast(output.device.type, enabled=False):
                largest, entropies = look_at_scores(output.detach().float().flatten(0, -2))
            self.largest[f"attention_logit/{name}"] = largest
            shares = torch.cat(entropies) if entropies else largest.new_zeros(0)
            self.sums[f"attention_entropy/{name}"] = _sum_of(shares.sum(), shares.numel())

        return look

    def _text_gradient_hook(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Add what a layer contributes to each text's squared gradient norm.

        The gradient of a matrix is the sum over tokens of input times gradient of the output, x_t d_t^T. Its squared
        norm over the tokens of one text is the sum over pairs of them of (x_s . x_t) (d_s . d_t): the matrix itself,
        which is far larger, is never made.
        """
        number = self._micro_batch
        if not output.requires_grad or not self.batches[number].examples:  # a rank may have none
            return
        values = inputs[0].detach().flatten(0, -2)

        def look(gradient: Tensor) -> None:
            gradients, squares = gradient.flatten(0, -2), []
            for places in self._places[number]:
                x, d = values[places].float(), gradients[places].float() / self.loss_scale
                squares.append(((x @ x.T) * (d @ d.T)).sum(dtype=sums_type(x.device)))
            found = torch.stack(squares)
            known = self.squares[number]
            self.squares[number] = known.to(found.device) + found if len(known) else found

        output.register_hook(look)


def attention_scores(attention: Any, rows: Tensor) -> Tensor:
    """Return the scores of a text's attention, (H, T, T), before softmax; -inf where a place must not look.

    Args:
        attention: the layer.
        rows: (T, 3 C) of a single text, what `c_attn` makes of it: queries, keys and values.
    """
    heads, width = attention.num_heads, attention.head_dim
    scaling = float(getattr(attention, "scaling", width**-0.5))
    query, key = (part.view(len(rows), heads, width).transpose(0, 1) for part in rows.chunk(3, -1)[:2])
    later = torch.ones(len(rows), len(rows), dtype=torch.bool, device=rows.device).triu(1)
    return (query @ key.transpose(1, 2) * scaling).masked_fill(later, -math.inf)


def _sum_of(total: Tensor, count: int) -> Tensor:
    dtype = sums_type(total.device)
    return torch.stack([total.to(dtype), total.new_tensor(count, dtype=dtype)])


def gradient_noise(squares: list[float], whole_square: float) -> tuple[float, float]:
    """Return how far the texts' gradients scatter, and the squared norm of what they have in common.

    Of n texts let g_i be their parts of the gradient, which sum to it: n g_i is what the gradient would be if all texts
    were like that one. The first is the unbiased variance of these, summed over all weights, tr(S); the second the
    unbiased estimate of the squared norm of their expectation. Their ratio is the simple noise scale: a batch of about
    so many texts uses the data as well as a larger one would use more of them (McCandlish et al., 2018, sections 2.2
    and A.1).

    Args:
        squares: |g_i|^2 of each text, at least two.
        whole_square: squared norm of the sum of all g_i.
    """
    count = len(squares)
    trace = (count**2 * sum(squares) - count * whole_square) / (count - 1)
    return trace, whole_square - trace / count
