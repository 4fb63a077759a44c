"""Sees what the loop makes of a step: what its forward passes compute, and the gradients that it leaves."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from emoft.data.steps import Step
from emoft.gradients.monitor import group_blocks
from emoft.run.setup import Setup
from emoft.step.look import Look


class Observer:
    """Looks at a step while the loop computes it, and at the gradient of one weight most closely."""

    def __init__(self, setup: Setup) -> None:
        """Choose the matrix of the weight: in the middle block. The weight is that with the largest gradient."""
        self.model, self.world = setup.text_model.model, setup.runtime.world
        self.label_contrast = setup.label_contrast
        block = len(self.model.transformer.h) // 2
        middle: Any = self.model.transformer.h[block]
        self.parameter: nn.Parameter = middle.mlp.c_fc.weight
        self.parameter_name = f"transformer.h.{block}.mlp.c_fc.weight"
        self.index: tuple[int, ...] | None = None  # of the chosen weight, once its gradient is known
        self.groups = group_blocks(self.model)
        self._kept: list[Tensor] | None = None  # gradients that others are compared with
        self._closely = False
        self._hidden: list[Tensor] = []
        self._embedding: list[tuple[Tensor, Tensor]] = []
        self._scores: list[Tensor] = []

    @contextlib.contextmanager
    def listening(self, closely: bool) -> Iterator[None]:
        """Hear the forward passes that run in this context.

        Args:
            closely: attention and the embedding too, and the gradients of all blocks.
        """
        self._closely, self._hidden, self._embedding, self._scores = closely, [], [], []
        hidden = self._hidden
        hooks = [
            self.model.transformer.register_forward_hook(lambda *a: hidden.append(a[2].last_hidden_state.detach()))
        ]
        if closely:
            first: Any = self.model.transformer.h[0]
            hooks.append(first.attn.c_attn.register_forward_hook(lambda *a: self._scores.append(a[2].detach())))
            hooks.append(self.model.transformer.wte.register_forward_hook(self._hear_embedding))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _hear_embedding(self, module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        """Collect the gradient that comes to the embedding's rows through the model's input."""
        if output.requires_grad:
            output.register_hook(lambda gradient: self._embedding.append((inputs[0], gradient.detach())))

    @contextlib.contextmanager
    def comparing(self) -> Iterator[None]:
        """Compare all gradients that are looked at in this context with the first ones."""
        self._kept = []
        try:
            yield
        finally:
            self._kept = None

    @torch.no_grad()
    def look(self, step: Step, loss: Tensor, grad_norm: Tensor) -> Look:
        """Return what the loop made of a step, whose gradients still stand.

        Args:
            step: as the loop was given it.
            loss: of the loop.
            grad_norm: of the loop, before clipping.
        """
        look = Look(float(loss), float(grad_norm), self._hidden, list(step.targets), step.micro_batches, 0.0)
        look.loss_scale = step.loss_scale
        look.contrast = self.label_contrast.of_last_step(self.world).get("label_contrast", 0.0)
        assert self.parameter.grad is not None
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        # The loop may have clipped them already, as by clip_grad_norm_: all is told of them as they were before.
        norm_now = float(nn.utils.get_total_norm(gradients))
        unclipped = look.grad_norm / norm_now if norm_now else 1.0
        if self.index is None:
            place = int(self.parameter.grad.abs().argmax())
            self.index = tuple(int(i) for i in torch.unravel_index(torch.tensor(place), self.parameter.shape))
        look.weight_gradient = float(self.parameter.grad[self.index]) * unclipped
        if self._closely:
            self._look_at_blocks(look, step, unclipped)
        if self._kept is not None:
            if not self._kept:
                self._kept = [gradient.clone() for gradient in gradients]
            pairs = list(zip(gradients, self._kept, strict=True))
            largest = max(float(kept.abs().max()) for _, kept in pairs)
            look.largest_difference = max(float((new - kept).abs().max()) for new, kept in pairs) / (largest or 1.0)
        return look

    def _look_at_blocks(self, look: Look, step: Step, unclipped: float) -> None:
        """Add the gradients of all blocks to a look, and the two parts of the embedding's."""
        for name, parameters in self.groups.items():
            norms = [p.grad.norm() for p in parameters if p.grad is not None]
            look.gradient_norms[name] = float(torch.stack(norms).norm()) * unclipped if norms else 0.0
        rows = torch.zeros_like(self.model.transformer.wte.weight)
        for ids, gradient in self._embedding:
            rows.index_add_(0, ids.flatten(), gradient.flatten(0, -2).to(rows.dtype) / step.loss_scale)
        head = self.model.lm_head.weight  # the embedding itself, if it is tied
        assert head.grad is not None
        is_tied = head is self.model.transformer.wte.weight
        look.from_input, look.from_head = float(rows.norm()), float((head.grad * unclipped - rows * is_tied).norm())
        look.scores = self._scores[0] if self._scores else None
