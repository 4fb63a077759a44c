import pytest
import torch
from conftest import SENTENCES
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data import collate, encode
from emoft.loss import IGNORED, count_targets, shift_labels, summed_cross_entropy
from emoft.template import TextFormat


def test_shift_by_one_and_mask_by_attention() -> None:
    # Pad is 0 here, and so is the end-of-text that closes each row: only the mask tells them apart.
    input_ids = torch.tensor([[5, 6, 7, 0], [8, 0, 0, 0]])
    attention_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    expected = [[6, 7, 0, IGNORED], [0, IGNORED, IGNORED, IGNORED]]
    assert shift_labels(input_ids, attention_mask).tolist() == expected
    assert count_targets(attention_mask) == 4


@pytest.fixture(scope="module")
def model(tiny_model) -> GPT2LMHeadModel:
    return GPT2LMHeadModel.from_pretrained(tiny_model).eval()


def test_equals_the_models_own_loss_on_unpadded_rows(model) -> None:
    """A second shift, or none, trains without complaint and shows only here."""
    torch.manual_seed(0)
    for length in (2, 3, 17, 64):
        input_ids = torch.randint(0, model.config.vocab_size, (3, length))
        mask = torch.ones_like(input_ids)
        with torch.no_grad():
            logits = model(input_ids).logits
            expected = model(input_ids, labels=input_ids).loss
        ours = summed_cross_entropy(logits, shift_labels(input_ids, mask)) / count_targets(mask)
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)


def test_padding_changes_nothing(model, tiny_model) -> None:
    """The padded batch has the summed loss of its rows one by one, each with exactly one end-of-text target."""
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    rows = encode(tokenizer, [text for text, _ in SENTENCES], TextFormat("{text}", max_length=100))
    batch = collate([{"input_ids": row} for row in rows], tokenizer.eos_token_id)
    targets = shift_labels(**batch)
    assert (targets == tokenizer.eos_token_id).sum(dim=1).tolist() == [1] * len(rows)
    with torch.no_grad():
        together = summed_cross_entropy(model(**batch).logits, targets)
        alone = 0.0
        for row in rows:
            ids = torch.tensor([row])
            one = shift_labels(ids, torch.ones_like(ids))
            assert (one == tokenizer.eos_token_id).sum() == 1
            alone += summed_cross_entropy(model(ids).logits, one)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0)
    assert count_targets(batch["attention_mask"]) == sum(len(row) - 1 for row in rows)


def test_half_precision_logits_are_summed_in_float32() -> None:
    logits = torch.zeros(64, 32, 1000, dtype=torch.bfloat16)
    targets = torch.zeros(64, 32, dtype=torch.int64)
    loss = summed_cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(64 * 32 * torch.tensor(1000.0).log().item(), rel=1e-6)


def test_no_target_gives_zero_and_not_nan() -> None:
    targets = torch.full((1, 1), IGNORED)
    assert summed_cross_entropy(torch.zeros(1, 1, 10), targets).item() == 0
