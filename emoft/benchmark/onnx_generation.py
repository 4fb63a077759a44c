"""Generation by ONNX Runtime, as one would write it by hand: a graph of one step, with its cache, run in a loop."""

import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GPT2LMHeadModel

from emoft.model.sampling import Sampling


class Step(nn.Module):
    """GPT-2 from new tokens and what is kept of earlier ones to scores and what is kept now."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, padding: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        """Return the scores (B, V) of the next token, and the keys and values (L, 2, B, H, P + T, D).

        Args:
            ids: (B, T), the next tokens.
            padding: (B,), places in front of each text.
            past: (L, 2, B, H, P, D), keys and values of L layers.
        """
        transformer: Any = self.model.transformer
        batch, new = ids.shape
        earlier = past.shape[4]
        places = torch.arange(earlier + new, device=ids.device)
        own = places[earlier:, None]
        positions = (places[earlier:] - padding[:, None]).clamp(min=0)
        mask = (places <= own) & (places >= padding[:, None, None]) | (places == own)  # (B, T, P + T)
        hidden = transformer.wte(ids) + transformer.wpe(positions)
        present = []
        for layer, block in enumerate(transformer.h):
            heads = block.attn.c_attn(block.ln_1(hidden)).view(batch, new, 3, past.shape[3], -1).permute(2, 0, 3, 1, 4)
            kept = torch.cat([past[layer], heads[1:]], 3)
            seen = F.scaled_dot_product_attention(heads[0], kept[0], kept[1], mask[:, None])
            hidden = hidden + block.attn.c_proj(seen.transpose(1, 2).flatten(2))
            hidden = hidden + block.mlp(block.ln_2(hidden))
            present.append(kept)
        return self.model.lm_head(transformer.ln_f(hidden[:, -1])), torch.stack(present)


class OnnxGenerator:
    """A model in ONNX Runtime, on the CPU."""

    def __init__(self, model: GPT2LMHeadModel, int8: bool) -> None:
        """Export it, in eight bits by the runtime's own dynamic quantization if asked for."""
        import onnxruntime  # only where it is installed
        from onnxruntime.quantization import quantize_dynamic

        config = model.config
        self.shape = config.n_layer, 2, config.n_head, config.n_embd // config.n_head
        empty = torch.zeros(config.n_layer, 2, 2, config.n_head, 3, self.shape[3])
        example = torch.ones(2, 4, dtype=torch.long), torch.tensor([0, 1]), empty
        dynamic = {"ids": {0: "batch", 1: "new"}, "padding": {0: "batch"}, "past": {2: "batch", 4: "earlier"}}
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            path = Path(folder, "step.onnx")
            torch.onnx.export(
                Step(model.eval()),
                example,
                path,
                dynamo=True,
                dynamic_shapes=dynamic,
                verbose=False,
                external_data=True,
            )
            if int8:
                quantize_dynamic(path, Path(folder, "int8.onnx"))
                path = Path(folder, "int8.onnx")
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [each.name for each in self.session.get_inputs()]

    def generate(self, texts: list[list[int]], count: int, filler: int, sampling: Sampling) -> Tensor:
        """Return so many new tokens of each text, (B, count)."""
        width, (layers, pair, heads, size) = max(map(len, texts)), self.shape
        ids = np.array([[filler] * (width - len(text)) + text for text in texts])
        padding = np.array([width - len(text) for text in texts])
        past = np.zeros((layers, pair, len(texts), heads, 0, size), np.float32)
        new = []
        for _ in range(count):
            scores, past = self.session.run(None, dict(zip(self.names, (ids, padding, past), strict=True)))
            new.append(sampling.choose(torch.from_numpy(scores)))
            ids = new[-1][:, None].numpy()
        return torch.stack(new, 1)
