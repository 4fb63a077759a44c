import pytest
import torch
from datasets import Dataset

from emoft.data.batching import IGNORED, Batch, build_loader, epoch_batches, length_sorted_batches, pack, pad
from emoft.training.loss import shift_labels


class TestOrder:
    def test_is_a_function_of_seed_and_epoch(self) -> None:
        torch.manual_seed(1)
        first = epoch_batches(103, 4, seed=7, epoch=2)
        torch.manual_seed(2)
        assert epoch_batches(103, 4, seed=7, epoch=2) == first
        assert epoch_batches(103, 4, seed=7, epoch=3) != first
        assert epoch_batches(103, 4, seed=8, epoch=2) != first

    def test_holds_each_example_once_and_does_not_depend_on_the_batch_size(self) -> None:
        flat = [[i for batch in epoch_batches(103, size, 7, 0) for i in batch] for size in (1, 4, 200)]
        assert flat[0] == flat[1] == flat[2]
        assert sorted(flat[0]) == list(range(103))
        assert [len(batch) for batch in epoch_batches(10, 4, 7, 0)] == [4, 4, 2]

    def test_of_an_evaluation_is_by_length(self) -> None:
        rows = Dataset.from_dict({"input_ids": [[1] * length for length in (3, 9, 1, 5, 9)]})
        assert length_sorted_batches(rows, 2) == [[1, 4], [3, 0], [2]]


ROWS = [{"input_ids": [5, 6, 0]}, {"input_ids": [8]}, {"input_ids": [9, 0]}]  # 0 is end-of-text, and pad


def targets_by_place(batch: Batch) -> dict[int, int]:
    """What each place predicts, once the labels are shifted. No place but those that the batch lists predicts any."""
    targets = shift_labels(batch.labels).flatten()
    listed = {place: int(targets[place]) for place in batch.predicting.tolist()}
    found = {place: target for place, target in listed.items() if target != IGNORED}
    assert found == {place: target for place, target in enumerate(targets.tolist()) if target != IGNORED}
    assert batch.predicting.tolist()[: batch.target_tokens] == sorted(found), (
        "in their order, what fills up behind them"
    )
    assert set(batch.predicting.tolist()[batch.target_tokens :]) <= {targets.numel() - 1}, "the last place fills up"
    return found


@pytest.mark.parametrize("collate", [pack, pad])
def test_what_a_batch_says_of_its_examples(collate) -> None:
    batch = collate(ROWS, pad_id=0, multiple=8 if collate is pack else 1)
    assert batch.token_ids() == [row["input_ids"] for row in ROWS]
    owners = batch.owners()
    assert owners.shape == batch.inputs["input_ids"].shape
    assert owners.flatten().tolist() == (
        [0, 0, 0, 1, 2, 2, -1, -1] if collate is pack else [0, 0, 0, 1, -1, -1, 2, 2, -1]
    )
    assert (batch.examples, batch.tokens) == (3, 6)
    assert aligned(batch, shift_labels(batch.labels)) == 1


def aligned(batch: Batch, targets: torch.Tensor) -> float:
    return batch.aligned_share(targets.flatten()[batch.predicting], batch.predicting)


@pytest.mark.parametrize("collate", [pack, pad])
@pytest.mark.parametrize("shifts", [0, 2])
def test_labels_shifted_wrongly_are_seen(collate, shifts: int) -> None:
    rows = [{"input_ids": list(range(1, length))} for length in (5, 9, 2, 12)]
    batch = collate(rows, pad_id=0)
    assert aligned(batch, shift_labels(batch.labels)) == 1
    wrong = batch.labels if shifts == 0 else shift_labels(shift_labels(batch.labels))
    assert aligned(batch, wrong) < 0.1  # the last token may stand for its own next one


@pytest.mark.parametrize("collate", [pack, pad])
def test_a_first_token_or_padding_as_target_and_a_missing_target_are_seen(collate) -> None:
    rows = [{"input_ids": list(range(1, length))} for length in (5, 9, 3, 12)]
    batch = collate(rows, pad_id=0, multiple=8)
    ids = batch.inputs["input_ids"]
    following = torch.cat([ids.flatten()[1:], ids.flatten()[:1]])
    everywhere = torch.arange(ids.numel())
    share = batch.aligned_share(following, everywhere)
    assert share == pytest.approx(batch.target_tokens / ids.numel()), "first tokens, and what only fills up"
    few = batch.predicting[:10]
    assert batch.aligned_share(following[few], few) == pytest.approx(10 / batch.target_tokens)


class TestPacked:
    def test_lies_end_to_end(self) -> None:
        batch = pack(ROWS, pad_id=0)
        assert batch.inputs["input_ids"].tolist() == [[5, 6, 0, 8, 9, 0]]
        assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1]]
        assert batch.inputs["boundaries"].tolist() == [0, 3, 4, 6]
        assert batch.inputs["padded_index"].tolist() == [0, 1, 2, 3, 6, 7]
        assert batch.inputs["longest"] == 3
        assert targets_by_place(batch) == {0: 6, 1: 0, 4: 0}
        assert (batch.examples, batch.tokens, batch.target_tokens) == (3, 6, 3)

    def test_filling_is_an_example_that_predicts_nothing(self) -> None:
        batch = pack(ROWS, pad_id=0, multiple=8)
        assert batch.inputs["input_ids"].tolist() == [[5, 6, 0, 8, 9, 0, 0, 0]]
        assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 0, 0, 1, 0, 0]]
        assert batch.inputs["boundaries"].tolist() == [0, 3, 4, 6, 8]
        assert batch.inputs["padded_index"].tolist() == [0, 1, 2, 8, 16, 17, 24, 25]
        assert batch.inputs["longest"] == len(batch.predicting) == batch.labels.numel() == 8
        assert batch.labels.tolist() == [[IGNORED, 6, 0, IGNORED, IGNORED, 0, IGNORED, IGNORED]]
        assert targets_by_place(batch) == {0: 6, 1: 0, 4: 0}
        assert (batch.examples, batch.tokens, batch.target_tokens) == (3, 6, 3)


def test_padded_on_the_right() -> None:
    batch = pad(ROWS, pad_id=0)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 0], [8, 0, 0], [9, 0, 0]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0], [1, 1, 0]]
    assert targets_by_place(batch) == {0: 6, 1: 0, 6: 0}
    assert (batch.examples, batch.tokens, batch.target_tokens) == (3, 6, 3)


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_the_loader_gives_the_batches_it_is_told_and_draws_nothing(batching: str) -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    loader = build_loader(Dataset.from_list(ROWS), [[2, 0], [1]], 0, torch.device("cpu"), batching)
    first, second = list(loader)
    assert (first.examples, first.tokens, second.examples, second.tokens) == (2, 5, 1, 1)
    assert torch.equal(torch.get_rng_state(), state)
