import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.model.decoding import Decoder
from emoft.model.sampling import Sampling
from emoft.training.precision import Precision

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")
from emoft.benchmark.onnx_generation import OnnxGenerator  # noqa: E402


def test_a_rival_writes_what_the_model_would() -> None:
    """In float32, token for token: what is timed is the same work."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=64, initializer_range=0.3)
    )
    texts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    generator = OnnxGenerator(model, int8=False)
    found = generator.generate(texts, 6, 99, Sampling())
    decoder, expected = Decoder(model.eval(), Precision("no", torch.device("cpu"))), []
    rows, scores = decoder.begin(texts, 99)
    for _ in range(6):
        expected.append(scores.argmax(-1))
        scores = decoder.read(expected[-1][:, None], rows)
    assert torch.equal(found, torch.stack(expected, 1))
    assert torch.equal(generator.generate(texts[:1], 6, 99, Sampling()), found[:1])
