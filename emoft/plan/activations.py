"""What forward passes keep for their backward passes, which is most of what a step needs of memory."""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel


class Activations:
    """Counts, while its context is open, what forward passes keep for their backward passes, in bytes."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        parameters = list(model.parameters())
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._shapes = {shape for p in parameters for shape in (p.shape, torch.Size(reversed(p.shape)))}
        self._vocabulary = model.config.vocab_size
        self._seen: set[int] = set()
        self.of_texts = self.logits = self.half_weights = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count anew what is kept in this context."""
        self.of_texts = self.logits = self.half_weights = 0
        self._seen = set(self._weights)
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda kept: kept):
            yield

    def _count(self, kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage.data_ptr() in self._seen:
            return kept
        self._seen.add(storage.data_ptr())
        if kept.dtype in (torch.bfloat16, torch.float16) and kept.shape in self._shapes:
            self.half_weights += storage.nbytes()  # autocast's copies
        elif kept.dim() == 2 and kept.shape[1] == self._vocabulary:
            self.logits += storage.nbytes()
        else:
            self.of_texts += storage.nbytes()
        return kept
