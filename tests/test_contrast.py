"""The label contrast against its formula, text by text, and through the script."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, Result, read_scalars
from test_train import flags
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.attention import use_packed_attention
from emoft.batching import pack, pad
from emoft.contrast import WrongLabels, label_contrast
from emoft.data import encode
from emoft.errors import UserError
from emoft.loss import cross_entropy
from emoft.template import TextFormat

LABELS = ["anger", "fear", "joy", "love", "sadness", "surprise"]
FORMAT = TextFormat("{label}: {text}", True, 64, LABELS)


@pytest.fixture(scope="module")
def tokenizer(still_model) -> GPT2Tokenizer:
    return GPT2Tokenizer.from_pretrained(still_model)


@pytest.fixture(scope="module")
def rows(tokenizer) -> list[dict[str, list[int]]]:
    return [{"input_ids": ids} for ids in encode(tokenizer, [FORMAT.fill(*each) for each in SENTENCES], FORMAT)]


def test_rivals_are_the_texts_under_other_labels_by_seed_epoch_and_text_alone(tokenizer, rows) -> None:
    wrong = WrongLabels(tokenizer, FORMAT, 3, seed=7)
    rivals = wrong.rivals(rows, epoch=0)
    assert len(rivals) == 3 * len(rows)
    for n, (text, label) in enumerate(SENTENCES):
        parts = [tokenizer.decode(each["input_ids"]).partition(": ") for each in rivals[n :: len(rows)]]
        assert {rest for _, _, rest in parts} == {f"{text}<|endoftext|>"}
        assert len({other for other, _, _ in parts}) == 3, "different ones"
        assert {other for other, _, _ in parts} <= {*LABELS} - {label}
    assert wrong.rivals(rows[3:4], epoch=0) == rivals[3 :: len(rows)], "whatever stands beside it"
    assert wrong.rivals(rows, epoch=1) != rivals
    assert WrongLabels(tokenizer, FORMAT, 3, seed=8).rivals(rows, epoch=0) != rivals
    assert len(WrongLabels(tokenizer, FORMAT, 99, seed=7).rivals(rows, epoch=0)) == 5 * len(rows), "all there are"


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("lay_out", [pack, pad])
def test_losses_and_gradients_are_the_formulas(still_model, tokenizer, rows, lay_out, count) -> None:
    model = GPT2LMHeadModel.from_pretrained(still_model).double()
    rivals = WrongLabels(tokenizer, FORMAT, count, seed=7).rivals(rows, epoch=0)

    def nats(row: dict[str, list[int]]) -> torch.Tensor:
        ids = torch.tensor([row["input_ids"]])
        return F.cross_entropy(model(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="sum")

    true, *wrong = torch.stack([nats(row) for row in rows + rivals]).split(len(rows))
    share = (-true).exp() / ((-true).exp() + sum((-each).exp() for each in wrong))
    expected = true.sum(), -share.log().sum()
    (expected[0] + 0.3 * expected[1]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    use_packed_attention(model)
    batch = replace(lay_out(rows + rivals, pad_id=0, multiple=8), rivals=len(rivals))
    assert batch.examples == len(rows)
    hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
    losses = cross_entropy(hidden, model.lm_head.weight, batch.predicting, batch.targets)
    found = label_contrast(losses, batch)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    (found[0] + 0.3 * found[1]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-9)


def test_what_cannot_be_contrasted_is_refused(tokenizer, rows) -> None:
    with pytest.raises(UserError, match="at least two labels"):
        WrongLabels(tokenizer, TextFormat("{text}"), 3, seed=7)
    with pytest.raises(UserError, match="before"):
        WrongLabels(tokenizer, TextFormat("{text} ({label})", True, 64, LABELS), 3, seed=7)
    with pytest.raises(UserError, match="holds both"):
        WrongLabels(tokenizer, FORMAT, 3, seed=7).rivals([{"input_ids": [5, 5, 5]}], epoch=0)


def test_through_the_script_on_one_rank_and_on_two(
    run: Callable[..., Result], still_model, train_file, tmp_path
) -> None:
    curves = []
    for ranks, batch_size in ((0, 6), (2, 3)):
        words = flags(
            still_model, train_file, f"on-{ranks}", template="{label}: {text}", label_contrast=0.5, max_steps=12,
            per_device_train_batch_size=batch_size, log_gradients_every=5,
        )  # fmt: skip
        result = run("train.py", *words, ranks=ranks)
        assert result.code == 0, result.err
        curves.append(read_scalars(tmp_path / f"on-{ranks}"))
    one, two = curves
    for tag in ("train/loss", "train/label_contrast", "gradient_norm/wte"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-4), tag
    contrasts = list(one["train/label_contrast"].values())
    assert contrasts[-1] < contrasts[0]
