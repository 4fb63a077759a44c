import math

import numpy as np
import pytest
import torch
from conftest import SENTENCES
from datasets import Dataset
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft.data.batching import build_loader, length_sorted_batches
from emoft.data.template import TextFormat
from emoft.data.tokens import byte_lengths, encode
from emoft.distributed.world import World
from emoft.evaluate.scoring import Evaluation, Scores, evaluate, format_figures, score_examples, summarize
from emoft.model.attention import use_packed_attention
from emoft.model.loading import TextModel, fresh_model
from emoft.model.tokenizer import train_tokenizer
from emoft.training.precision import Precision
from emoft.training.runtime import Runtime

CPU = torch.device("cpu")
RUNTIME = Runtime(World(), Precision("no", CPU))
FORMAT = TextFormat("{text}", max_length=24)


def loader_of(tokenizer: GPT2Tokenizer, rows: list[list[int]], batch_size: int = 3, batching: str = "packed"):
    data = Dataset.from_dict({"input_ids": rows})
    return build_loader(data, length_sorted_batches(data, batch_size), tokenizer.eos_token_id, CPU, batching)


@pytest.fixture
def parts(tiny_model) -> tuple[GPT2LMHeadModel, GPT2Tokenizer, torch.Tensor, list[list[int]]]:
    model = GPT2LMHeadModel.from_pretrained(tiny_model)
    use_packed_attention(model)
    tokenizer = GPT2Tokenizer.from_pretrained(tiny_model)
    texts = [text for text, _ in SENTENCES] + ["ខ្ញុំ", "naïve – déjà vu"]
    return (
        model,
        tokenizer,
        byte_lengths(tokenizer, model.config.vocab_size),
        encode(tokenizer, texts, FORMAT),
    )


@pytest.mark.parametrize("batching", ["packed", "padded"])
@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_equals_a_sum_over_examples_in_float64(parts, batch_size: int, batching: str) -> None:
    """Token-weighted, whatever the batches: compared with the model's own loss, one example at a time."""
    model, tokenizer, lengths, rows = parts
    model.train()
    data = Dataset.from_dict({"input_ids": rows})
    result = evaluate(TextModel(model, tokenizer, FORMAT), data, RUNTIME, batch_size, batching)
    assert model.training, "it is left as it was"
    total, tokens = 0.0, 0
    model.eval()
    for row in rows:
        ids = torch.tensor([row])
        with torch.no_grad():
            total += model(ids, labels=ids).loss.double().item() * (len(row) - 1)
        tokens += len(row) - 1
    assert (result.tokens, result.examples) == (tokens, len(rows))
    assert result.loss == pytest.approx(total / tokens, rel=1e-6)
    assert result.perplexity == pytest.approx(math.exp(total / tokens), rel=1e-6)
    text_bytes = sum(len(tokenizer.decode(row[1:]).replace("<|endoftext|>", "").encode()) for row in rows[:-2])
    assert summarize(result_scores(parts)[np.arange(len(rows) - 2)]).text_bytes == text_bytes


def result_scores(parts) -> Scores:
    model, tokenizer, lengths, rows = parts
    scores = score_examples(model, loader_of(tokenizer, rows), RUNTIME, lengths)
    assert scores is not None
    return scores


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_scores_stand_in_the_order_of_the_data(parts, batching: str) -> None:
    model, tokenizer, lengths, rows = parts
    together = score_examples(model, loader_of(tokenizer, rows, 4, batching), RUNTIME, lengths)
    for number, row in enumerate(rows):
        alone = score_examples(model, loader_of(tokenizer, [row]), RUNTIME, lengths)
        assert together.nats[number] == pytest.approx(alone.nats[0], rel=1e-6)
        assert (together.tokens[number], together.text_bytes[number]) == (alone.tokens[0], alone.text_bytes[0])


def test_the_scores_of_parts_add_up(parts) -> None:
    model, tokenizer, lengths, rows = parts
    data = Dataset.from_dict({"input_ids": rows})
    batches = length_sorted_batches(data, 3)
    whole = result_scores(parts)
    shares = [
        score_examples(model, build_loader(data, part, tokenizer.eos_token_id, CPU, "packed"), RUNTIME, lengths)
        for part in (batches[::2], batches[1::2], [])
    ]
    for name in ("nats", "tokens", "text_bytes"):
        assert np.array_equal(sum(getattr(share, name) for share in shares), getattr(whole, name))


def test_bits_per_byte_of_a_text_of_three_bytes_by_hand() -> None:
    """A Khmer letter, three tokens of a byte each: the first is no target, and end-of-text stands for no byte."""
    tokenizer = train_tokenizer(["any"], 257)
    torch.manual_seed(0)
    model = fresh_model("n_layer=1,n_embd=8,n_head=1,n_positions=8", tokenizer).eval()
    text_model = TextModel(model, tokenizer, TextFormat("{text}"))
    (row,) = encode(tokenizer, ["ខ"], text_model.text_format)
    assert len("ខ".encode()) == 3 and len(row) == 4
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0].double()
    nats = [torch.logsumexp(logits[place], 0) - logits[place, row[place + 1]] for place in range(3)]
    result = evaluate(text_model, Dataset.from_dict({"input_ids": [row]}), RUNTIME, 1)
    assert result.text_bytes == 2
    assert result.bits_per_byte == pytest.approx(float(sum(nats)) / math.log(2) / 2, rel=1e-6)
    unfinished = evaluate(text_model, Dataset.from_dict({"input_ids": [row[:3]]}), RUNTIME, 1)
    assert unfinished.bits_per_byte == pytest.approx(float(sum(nats[:2])) / math.log(2) / 2, rel=1e-6)


def test_intervals_hold_the_figure_and_narrow_with_more_examples() -> None:
    random = np.random.default_rng(1)

    def scores(examples: int) -> Scores:
        tokens = random.integers(5, 40, examples)
        return Scores(tokens * random.normal(4, 0.5, examples), tokens, tokens * 4)

    few, many = summarize(scores(100)), summarize(scores(10_000))
    for result in (few, many):
        figures = result.figures()
        for name in ("loss", "perplexity", "bits_per_byte"):
            low, high = figures[f"{name}_interval"]
            assert low < figures[name] < high
    width = few.loss_interval[1] - few.loss_interval[0]
    assert (many.loss_interval[1] - many.loss_interval[0]) == pytest.approx(width / 10, rel=0.4)
    # Of the mean of so many independent values, 1.96 standard errors on each side.
    assert width / 2 == pytest.approx(1.96 * 0.5 / 10, rel=0.4)


def test_with_and_without_what_the_train_split_holds_too() -> None:
    scores = Scores(np.array([10.0, 40.0, 30.0]), np.array([10, 10, 10]), np.array([20, 20, 20]))
    result = summarize(scores, in_train=np.array([True, False, False]))
    assert result.loss == 80 / 30
    assert result.without_overlap.loss == 70 / 20
    figures = result.figures()
    assert (figures["overlap"], figures["loss_without_overlap"]) == (1, 3.5)
    assert "bits_per_byte_without_overlap_interval" in figures
    assert summarize(scores, in_train=np.array([False] * 3)).without_overlap is None


def test_a_loss_too_large_for_exp_gives_infinity() -> None:
    huge = summarize(Scores(np.array([1e4, 1e4]), np.array([1, 1]), np.array([1, 1])))
    assert huge.perplexity == math.inf
    assert huge.figures()["perplexity_interval"] == [math.inf, math.inf]


def test_one_example_tells_nothing_of_how_figures_vary() -> None:
    alone = summarize(Scores(np.array([30.0]), np.array([10]), np.array([20]))).figures()
    assert alone["loss"] == 3
    assert np.isnan(alone["loss_interval"]).all() and np.isnan(alone["perplexity_interval"]).all()
    assert format_figures(alone).splitlines()[0] == "loss           3.0000"


def test_the_overlap_is_told_where_someone_has_looked() -> None:
    scores = Scores(np.array([10.0, 40.0]), np.array([10, 10]), np.array([20, 20]))
    assert "overlap" not in summarize(scores).figures()
    assert summarize(scores, in_train=np.array([False, False])).figures()["overlap"] == 0
    assert summarize(scores, in_train=np.array([True, True])).figures()["overlap"] == 2


def test_a_table_has_the_interval_beside_the_figure() -> None:
    evaluation = Evaluation(2.0, (1.5, 2.5), 1.0, (0.5, 1.25), 1, 1, 1)
    assert format_figures(evaluation.figures()).splitlines()[0] == "loss           2.0000  [1.5000, 2.5000]"


@pytest.mark.parametrize("batching", ["packed", "padded"])
def test_a_batch_that_does_not_fit_in_memory_is_computed_in_halves(parts, batching: str) -> None:
    model, tokenizer, lengths, rows = parts
    data = Dataset.from_dict({"input_ids": rows})
    loader = build_loader(data, length_sorted_batches(data, len(rows)), tokenizer.eos_token_id, CPU, batching)
    whole, sizes, fits = score_examples(model, loader, RUNTIME, lengths), [], 2

    def limit(module, inputs, named) -> None:
        size = len(named["boundaries"]) - 2 if batching == "packed" else len(named["input_ids"])
        sizes.append(size)
        if size > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    hook = model.transformer.register_forward_pre_hook(limit, with_kwargs=True)
    try:
        halved = score_examples(model, loader, RUNTIME, lengths)
        fits = 0
        with pytest.raises(torch.OutOfMemoryError):
            score_examples(model, loader, RUNTIME, lengths)
    finally:
        hook.remove()
    assert sizes[0] >= len(rows) - 1 and min(sizes) <= 2
    assert np.allclose(halved.nats, whole.nats, rtol=1e-5) and np.array_equal(halved.tokens, whole.tokens)
    assert np.array_equal(halved.text_bytes, whole.text_bytes)
