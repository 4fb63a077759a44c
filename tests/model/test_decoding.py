"""The decoder against transformers' own model and its own `generate`."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.model.decoding import ROOM, Decoder, Rows
from emoft.model.generation import Choice, _continue
from emoft.model.kernels import use_fast_kernels
from emoft.model.sampling import Sampling
from emoft.training.precision import Precision

CPU = torch.device("cpu")
END = 60


def make_model(**changes: Any) -> GPT2LMHeadModel:
    torch.manual_seed(7)
    config = GPT2Config(
        **{"vocab_size": 61, "n_positions": 96, "n_embd": 48, "n_layer": 3, "n_head": 4, "initializer_range": 0.4}
        | changes,
        bos_token_id=END,
        eos_token_id=END,
        pad_token_id=END,
    )
    return GPT2LMHeadModel(config).eval()


TEXTS = [[5], [7, 8, 9, 1, 2, 3, 4], [1, 1], [59, 3, 3, 7, 12], [2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22]]
KINDS: dict[str, dict[str, Any]] = {
    "as GPT-2": {},
    "another activation": {"activation_function": "relu"},
    "a narrow middle": {"n_inner": 24},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "scores not scaled": {"scale_attn_weights": False},
    "scores in float32": {"reorder_and_upcast_attn": True},
    "a head of its own": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_scores_are_those_of_the_model(kind: str) -> None:
    """Of each text as if it were alone, over more tokens than there was memory for at first."""
    model = make_model(**KINDS[kind])
    decoder = Decoder(model, Precision("no", CPU))
    rows, scores = decoder.begin(TEXTS, END)
    texts = [list(text) for text in TEXTS]
    for _ in range(ROOM + 5):
        for text, row in zip(texts, scores, strict=True):
            assert torch.allclose(row, model(torch.tensor([text])).logits[0, -1], atol=2e-4)
        tokens = scores.argmax(-1)
        for text, token in zip(texts, tokens.tolist(), strict=True):
            text.append(token)
        scores = decoder.read(tokens[:, None], rows)
    assert rows.kept[0].shape[3] > max(map(len, TEXTS)) + ROOM


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@torch.no_grad()
def test_half_precision_is_that_of_autocast(name: str) -> None:
    model = make_model(initializer_range=0.1)
    precision = Precision(name, CPU)
    rows, scores = Decoder(model, precision).begin(TEXTS, END)
    for text, row in zip(TEXTS, scores, strict=True):
        exact = model(torch.tensor([text])).logits[0, -1]
        with precision.autocast():
            library = model(torch.tensor([text])).logits[0, -1].float()
        assert rows.kept[0].dtype == precision.dtype
        assert (row - exact).abs().max() < 2 * (library - exact).abs().max() + 1e-3


@torch.no_grad()
def test_eight_bits_are_near() -> None:
    model = make_model(initializer_range=0.1)
    use_fast_kernels(model)
    scores = Decoder(model, Precision("no", CPU), int8=True).begin(TEXTS, END)[1]
    exact = Decoder(model, Precision("no", CPU)).begin(TEXTS, END)[1]
    assert 0 < (scores - exact).abs().max() < 0.2 * exact.std()


@torch.no_grad()
def test_a_text_is_not_touched_by_its_neighbours() -> None:
    """Neither by what stands in place of padding, nor by those that are left out later."""
    decoder = Decoder(make_model(), Precision("no", CPU))
    for filler in (END, 3):
        rows, scores = decoder.begin(TEXTS, filler)
        alone, lone_scores = decoder.begin(TEXTS[2:3], filler)
        assert torch.allclose(scores[2:3], lone_scores, atol=1e-4)
        rows.keep(torch.tensor([2, 4]))
        scores = decoder.read(torch.tensor([[9], [11]]), rows)
        assert torch.allclose(scores[:1], decoder.read(torch.tensor([[9]]), alone), atol=1e-4)


def test_a_place_sees_no_padding_and_nothing_later() -> None:
    rows = Rows(torch.tensor([0, 2]), length=3)
    assert rows.mask(3)[:, 0].int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
        [[0, 0, 0], [0, 0, 0], [0, 0, 1]],
    ]
    rows.length = 4
    assert rows.mask(1)[:, 0].int().tolist() == [[[1, 1, 1, 1]], [[0, 0, 1, 1]]]


@torch.no_grad()
def test_texts_are_those_that_generate_writes() -> None:
    """Token for token, greedily: 40 texts of mixed lengths, some of which end by themselves."""
    model = make_model()
    random = torch.Generator().manual_seed(2)
    texts = [
        torch.randint(END, (int(torch.randint(1, 20, (), generator=random)),), generator=random).tolist()
        for _ in range(40)
    ]
    choose = Choice(END, 0, None, [], Sampling())
    ours = _continue(Decoder(model, Precision("no", CPU)), texts, [30] * len(texts), choose, None)
    for text, new in zip(texts, ours, strict=True):
        ids = torch.tensor([text])
        theirs: Any = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=30, do_sample=False)
        assert theirs[0, len(text) :].tolist() == new
    assert {new[-1] == END for new in ours} == {True, False}
