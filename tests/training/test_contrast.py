"""The label contrast against its formula, text by text, and through the script."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from conftest import SENTENCES, Result, read_scalars
from datasets import Dataset
from test_train import flags
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.batching import pack, pad
from emoft.data.template import TextFormat
from emoft.data.tokens import encode
from emoft.errors import UserError
from emoft.model.attention import use_packed_attention
from emoft.training.contrast import WrongLabels, label_contrast
from emoft.training.loss import cross_entropy, shift_labels

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
    together = wrong.with_rivals(rows, epoch=0)
    assert [row["input_ids"] for row in together[: len(rows)]] == [row["input_ids"] for row in rows]
    rivals = together[len(rows) :]
    assert len(rivals) == 3 * len(rows)
    for n, (text, label) in enumerate(SENTENCES):
        parts = [tokenizer.decode(each["input_ids"]).partition(": ") for each in rivals[n :: len(rows)]]
        assert {rest for _, _, rest in parts} == {f"{text}<|endoftext|>"}
        assert len({other for other, _, _ in parts}) == 3, "different ones"
        assert {other for other, _, _ in parts} <= {*LABELS} - {label}
    assert wrong.with_rivals(rows[3:4], epoch=0) == together[3 :: len(rows)], "whatever stands beside it"
    assert wrong.with_rivals(rows, epoch=1) != together
    assert WrongLabels(tokenizer, FORMAT, 3, seed=8).with_rivals(rows, epoch=0) != together
    assert len(WrongLabels(tokenizer, FORMAT, 99, seed=7).with_rivals(rows, epoch=0)) == 6 * len(rows), "all there are"


def test_the_same_tokens_of_a_text_are_compared_under_short_and_long_labels(tokenizer) -> None:
    """Not those of the labels; and what is cut under one of them does not count under the others."""
    labels = ["joy", "a very deep sorrow", "fear"]
    text_format = TextFormat("{label}: {text}", True, 30, labels)
    texts = [text_format.fill(text, label) for text, _ in SENTENCES for label in labels]
    rows = [{"input_ids": ids} for ids in encode(tokenizer, texts, text_format)]
    together = WrongLabels(tokenizer, text_format, 2, seed=7).with_rivals(rows, epoch=0)
    assert max(len(row["input_ids"]) for row in together) == 30
    lengths = set()
    for n in range(len(rows)):
        compared = [row["input_ids"][slice(*row["contrasted"])] for row in together[n :: len(rows)]]
        assert compared[0] == compared[1] == compared[2]
        lengths.add(len(compared[0]))
        for row in together[n :: len(rows)]:
            assert tokenizer.decode(row["input_ids"][: row["contrasted"][0]]) in [f"{label}:" for label in labels]
    assert len(lengths) > 1


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("max_length", [64, 14])
@pytest.mark.parametrize("lay_out", [pack, pad])
def test_losses_and_gradients_are_the_formulas(still_model, tokenizer, lay_out, max_length, count) -> None:
    """Over labels of one token to four, and texts that are cut."""
    labels = ["joy", "a very deep sorrow", "fear", "love"]
    text_format = TextFormat("{label}: {text}", True, max_length, labels)
    texts = [text_format.fill(text, labels[n % 4]) for n, (text, _) in enumerate(SENTENCES)]
    rows = [{"input_ids": ids} for ids in encode(tokenizer, texts, text_format)]
    model = GPT2LMHeadModel.from_pretrained(still_model).double()
    together = WrongLabels(tokenizer, text_format, count, seed=7).with_rivals(rows, epoch=0)

    def nats(row: dict, first: int, last: int) -> torch.Tensor:
        """-log p of some tokens of a row, given those before."""
        ids = torch.tensor([row["input_ids"]])
        return F.cross_entropy(
            model(input_ids=ids).logits[0, first - 1 : last - 1], ids[0, first:last], reduction="sum"
        )

    text_loss = sum(nats(row, 1, len(row["input_ids"])) for row in rows)
    true, *wrong = torch.stack([nats(row, *row["contrasted"]) for row in together]).split(len(rows))
    share = (-true).exp() / ((-true).exp() + sum((-each).exp() for each in wrong))
    expected = text_loss, -share.log().sum()
    (expected[0] + 0.3 * expected[1]).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    use_packed_attention(model)
    batch = replace(lay_out(together, pad_id=0, multiple=8), rivals=len(together) - len(rows))
    assert batch.examples == len(rows)
    hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
    losses = cross_entropy(hidden, model.lm_head.weight, shift_labels(batch.labels), batch.predicting)
    of_texts, contrast = label_contrast(losses, batch)
    assert of_texts.shape == losses.shape
    is_text = of_texts != 0
    assert torch.equal(of_texts[is_text], losses[is_text]), "the losses of the texts as they are, and those of rivals 0"
    assert is_text.sum() == sum(len(row["input_ids"]) - 1 for row in rows)
    found = of_texts.sum(), contrast
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)
    (found[0] + 0.3 * found[1]).backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-6, atol=1e-9)


def test_what_cannot_be_contrasted_is_refused(tokenizer, rows) -> None:
    with pytest.raises(UserError, match="at least two labels"):
        WrongLabels(tokenizer, TextFormat("{text}"), 3, seed=7)
    with pytest.raises(UserError, match="before"):
        WrongLabels(tokenizer, TextFormat("{text} ({label})", True, 64, LABELS), 3, seed=7)
    wrong = WrongLabels(tokenizer, FORMAT, 3, seed=7)
    texts = [row["input_ids"] for row in rows] * 300
    wrong.check(Dataset.from_dict({"input_ids": texts}))
    with pytest.raises(UserError, match="a colon and a blank"):
        wrong.check(Dataset.from_dict({"input_ids": [*texts, [5, 5, 5]]}))


def test_through_the_script_on_one_rank_and_on_two(
    run: Callable[..., Result], still_model, train_file, tmp_path
) -> None:
    curves = []
    for ranks, batch_size in ((0, 6), (2, 3)):
        words = flags(
            still_model,
            train_file,
            f"on-{ranks}",
            template="{label}: {text}",
            label_contrast=0.5,
            max_steps=12,
            per_device_train_batch_size=batch_size,
            log_gradients_every=5,
        )
        result = run("train.py", *words, ranks=ranks)
        assert result.code == 0, result.err
        curves.append(read_scalars(tmp_path / f"on-{ranks}"))
    one, two = curves
    for tag in ("train/loss", "train/label_contrast", "gradient_norm/wte"):
        assert two[tag] == pytest.approx(one[tag], rel=1e-4), tag
    contrasts = list(one["train/label_contrast"].values())
    assert contrasts[-1] < contrasts[0]
