import math

import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.attention import use_packed_attention
from emoft.batching import build_loader, length_sorted_batches
from emoft.data import encode
from emoft.distributed import World
from emoft.evaluate import Evaluation, evaluate
from emoft.precision import Precision
from emoft.template import TextFormat

CPU = torch.device("cpu")


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_a_sum_over_examples_in_float64(tiny_model, batch_size: int, batching: str) -> None:
    """Token-weighted, whatever the batches: compared with the model's own loss, one example at a time."""
    model = GPT2LMHeadModel.from_pretrained(tiny_model).train()
    use_packed_attention(model)
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    rows = encode(tokenizer, [text for text, _ in SENTENCES], TextFormat("{text}"))
    data = Dataset.from_dict({"input_ids": rows})
    batches = length_sorted_batches(data, batch_size)
    loader = build_loader(data, batches, tokenizer.eos_token_id, CPU, batching)
    result = evaluate(model, loader, Precision("no", CPU), World(), signals=None)
    assert model.training, "it is left as it was"
    total, tokens = 0.0, 0
    model.eval()
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.double().item() * (len(row) - 1)
        tokens += len(row) - 1
    assert result.tokens == tokens
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-5)


def test_a_loss_too_large_for_exp_gives_infinity() -> None:
    assert Evaluation(loss=1e4, tokens=1).perplexity == math.inf
