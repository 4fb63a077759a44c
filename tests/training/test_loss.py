import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.batching import IGNORED, pack, pad
from emoft.data.template import TextFormat
from emoft.data.tokens import encode
from emoft.training.loss import cross_entropy, shift_labels

X = IGNORED


def test_shift_by_one() -> None:
    labels = torch.tensor([[X, 6, 7, X], [X, 9, 0, 0]])
    assert shift_labels(labels).tolist() == [[6, 7, X, X], [9, 0, 0, X]]


@pytest.fixture(scope="module")
def model(tiny_model) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny_model).eval()


@pytest.mark.parametrize("collate", [pack, pad])
def test_equals_the_models_own_loss(model, tiny_model, collate) -> None:
    """A second shift, or none, trains without complaint and shows only here; so does a target lost at an end."""
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    rows = encode(tokenizer, [text for text, _ in SENTENCES], TextFormat("{text}", max_length=100))
    for group in (rows[:1], rows[:3], rows):
        batch = collate([{"input_ids": row} for row in group], tokenizer.eos_token_id)
        targets = shift_labels(batch.labels)
        ends = targets.flatten()[batch.predicting] == tokenizer.eos_token_id
        assert ends.sum() == (targets == tokenizer.eos_token_id).sum() == len(group), "each end is a target, once"
        with torch.no_grad():
            expected = sum(model(torch.tensor([r]), labels=torch.tensor([r])).loss * (len(r) - 1) for r in group)
            hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
            ours = cross_entropy(hidden, model.lm_head.weight, targets, batch.predicting).sum()
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def values(rows: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states, a head of more rows than one part of its gradient, targets, and the places that predict.

    Two targets are ignored: the first, and the last, which fills up; a place may be listed more than once.
    """
    torch.manual_seed(0)
    hidden = torch.randn(2, rows, 6, dtype=dtype, requires_grad=True)
    head = torch.randn(9000, 6, dtype=dtype, requires_grad=True)
    targets = torch.randint(9000, (2, rows))
    targets[0, 0] = targets[-1, -1] = IGNORED
    last = 2 * rows - 1
    predicting = torch.cat([torch.randperm(2 * rows), torch.tensor([1, last, last])])
    return hidden, head, targets, predicting


def reference(hidden, head, targets, predicting) -> torch.Tensor:
    logits = F.linear(hidden.flatten(0, 1)[predicting], head)
    logits, targets = logits.to(torch.promote_types(logits.dtype, torch.float)), targets.flatten()[predicting]
    return F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")


@pytest.mark.parametrize("rows", [2, 300])  # of 603, float32 logits are made for 233 at a time
def test_loss_and_gradients_are_those_of_head_and_cross_entropy(rows: int) -> None:
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        results = []
        for function in (cross_entropy, reference):
            hidden, head, targets, predicting = values(rows, dtype)
            loss = function(hidden, head, targets, predicting)
            (loss @ torch.linspace(0.1, 1, len(loss), dtype=dtype)).backward()
            results.append((loss.detach(), hidden.grad, head.grad))
        for ours, expected in zip(*results, strict=True):
            assert ours.dtype == dtype
            assert (ours - expected).norm() <= tolerance * expected.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_head_works_in_half_precision_and_the_loss_in_float32(dtype: torch.dtype) -> None:
    results = []
    for function in (cross_entropy, reference):
        hidden, head, targets, predicting = values(50, torch.float32)
        with torch.autocast("cpu", dtype=dtype):
            loss = function(hidden, head, targets, predicting)
        assert loss.dtype == torch.float32
        (loss.sum() * 1024).backward()  # the loss scale comes before the backward, where small gradients would vanish
        results.append((loss.detach(), hidden.grad, head.grad))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-6, atol=0)
    for ours, expected in zip(results[0][1:], results[1][1:], strict=True):
        assert ours.dtype == torch.float32
        assert (ours - expected).norm() <= 2**-7 * expected.norm()


def test_no_target_gives_zero_and_not_nan() -> None:
    for count in (0, 3):
        hidden, head = torch.randn(1, 3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
        targets = torch.full((1, 3), IGNORED)
        loss = cross_entropy(hidden, head, targets, torch.full((count,), 2)).sum()
        loss.backward()
        assert loss.item() == hidden.grad.abs().sum() == head.grad.abs().sum() == 0


def test_a_second_backward_pass_is_an_error_not_a_wrong_gradient() -> None:
    """The gradient of the logits takes their place in memory: they are gone afterwards."""
    hidden, head, targets, predicting = values(8, torch.float32)
    loss = cross_entropy(hidden, head, targets, predicting).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
