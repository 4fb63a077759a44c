"""Packed batches compute what padded ones compute, and no example sees another."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from emoft.data.batching import IGNORED, Batch, pack, pad
from emoft.model import attention
from emoft.model.attention import choose_kernel, use_packed_attention
from emoft.model.kernels import use_fast_kernels
from emoft.training.loss import cross_entropy, shift_labels

VOCABULARY = 97
LONGEST = 24
EOS = 0  # of these tests; it stands in texts, too


def small_model(dropout: float = 0.0, dtype: torch.dtype = torch.float32) -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY,
        n_layer=2,
        n_embd=16,
        n_head=2,
        n_positions=LONGEST,
        initializer_range=0.2,
        attn_pdrop=dropout,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        bos_token_id=EOS,
        eos_token_id=EOS,
    )
    model = GPT2LMHeadModel(config).to(dtype).train()
    use_packed_attention(model)
    use_fast_kernels(model)
    return model


def texts(lengths: list[int], seed: int = 0) -> list[dict[str, list[int]]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(VOCABULARY, (length,), generator=generator).tolist()} for length in lengths]


def summed_loss(model: GPT2LMHeadModel, batch: Batch) -> Tensor:
    hidden = model.transformer(**batch.inputs, use_cache=False).last_hidden_state
    return cross_entropy(hidden, model.lm_head.weight, shift_labels(batch.labels), batch.predicting).sum()


def loss_and_gradients(model: GPT2LMHeadModel, batches: list[Batch], **autocast: object) -> tuple[Tensor, list[Tensor]]:
    """As in the loop: of the mean over all targets of the batches, added up in the parameters."""
    model.zero_grad()
    total = torch.zeros(())
    tokens = sum(batch.target_tokens for batch in batches)
    for batch in batches:
        with torch.autocast("cpu", **autocast) if autocast else torch.enable_grad():
            loss = summed_loss(model, batch) / max(1, tokens)
        loss.backward()
        total += loss.detach()
    return total, [parameter.grad for parameter in model.parameters()]


def assert_close(packed: tuple, padded: tuple, tolerance: float) -> None:
    torch.testing.assert_close(packed[0], padded[0], rtol=tolerance, atol=0)
    for ours, reference in zip(packed[1], padded[1], strict=True):
        assert (ours - reference).norm() <= tolerance * reference.norm()


lengths = st.lists(st.one_of(st.just(1), st.just(LONGEST), st.integers(2, LONGEST)), min_size=1, max_size=9)


class TestPackedEqualsPadded:
    @settings(max_examples=40, deadline=None, derandomize=True)
    @given(lengths, st.sampled_from([1, 8, 64]))
    def test_in_float32(self, lengths: list[int], multiple: int) -> None:
        """Random lengths, batches of one, texts of one token and of the longest length, with and without filling."""
        rows = texts(lengths)
        packed = loss_and_gradients(small_model(), [pack(rows, EOS, multiple)])
        padded = loss_and_gradients(small_model(), [pad(rows, EOS, multiple)])
        assert_close(packed, padded, 1e-6)

    @settings(max_examples=10, deadline=None, derandomize=True)
    @given(st.lists(lengths, min_size=2, max_size=4))
    def test_under_accumulation(self, steps: list[list[int]]) -> None:
        groups = [texts(lengths, seed) for seed, lengths in enumerate(steps)]
        packed = loss_and_gradients(small_model(), [pack(rows, EOS, 8) for rows in groups])
        padded = loss_and_gradients(small_model(), [pad(rows, EOS) for rows in groups])
        together = loss_and_gradients(small_model(), [pack([row for rows in groups for row in rows], EOS)])
        assert_close(packed, padded, 1e-6)
        assert_close(packed, together, 1e-6)

    def test_is_the_models_own_loss(self) -> None:
        """Text by text, by transformers' own loss over an ordinary model: neither attention nor shift of ours."""
        rows = texts([5, 1, 24, 13])
        torch.manual_seed(0)
        plain = small_model()
        plain.set_attn_implementation("eager")
        total = sum(
            plain(torch.tensor([row["input_ids"]]), labels=torch.tensor([row["input_ids"]])).loss
            * (len(row["input_ids"]) - 1)
            for row in rows
            if len(row["input_ids"]) > 1
        )
        torch.testing.assert_close(summed_loss(small_model(), pack(rows, EOS, 8)), total, rtol=1e-6, atol=0)

    def test_in_bf16_within_its_rounding(self) -> None:
        """bf16 keeps 8 bits. The two differ by less than either differs from float32."""
        rows = texts([3, 24, 9, 1, 17])
        bf16 = {"dtype": torch.bfloat16}
        exact = loss_and_gradients(small_model(), [pad(rows, EOS)])
        packed = loss_and_gradients(small_model(), [pack(rows, EOS, 8)], **bf16)
        assert_close(packed, loss_and_gradients(small_model(), [pad(rows, EOS)], **bf16), 2**-7)
        assert_close(packed, exact, 2**-5)
        assert packed[0] != exact[0], "bf16 was meant to show"


class TestNeighbours:
    def test_no_gradient_leaks(self) -> None:
        """The gradient of one example's loss with respect to the others' embeddings is exactly zero, in float64."""
        model = small_model(dtype=torch.float64)
        batch = pack(texts([7, 12, 1, 5]), EOS, 8)
        boundaries = batch.inputs["boundaries"].tolist()
        ids = batch.inputs.pop("input_ids")
        for number in (0, 1, 3):
            start, end = boundaries[number : number + 2]
            embeddings = model.transformer.wte(ids).detach().requires_grad_()
            hidden = model.transformer(inputs_embeds=embeddings, **batch.inputs, use_cache=False).last_hidden_state
            places = torch.arange(ids.numel())
            mine = (places >= start) & (places < end)
            targets = torch.where(mine, shift_labels(batch.labels), IGNORED)
            cross_entropy(hidden, model.lm_head.weight, targets, batch.predicting).sum().backward()
            reached = embeddings.grad[0].abs().sum(dim=1)
            others = torch.cat([reached[:start], reached[end:]])
            assert (others == 0).all()
            assert (reached[start : end - 1] > 0).all()

    def test_do_not_change_a_texts_hidden_states(self) -> None:
        """Bit for bit, in place: only the neighbours' tokens differ."""
        model = small_model(dtype=torch.float64).eval()
        states = []
        for seed in (1, 2):
            rows = texts([6, 9, 4], seed)
            rows[1] = texts([9], seed=3)[0]
            states.append(model.transformer(**pack(rows, EOS).inputs, use_cache=False).last_hidden_state[0])
        assert torch.equal(states[0][6:15], states[1][6:15])
        assert not torch.equal(states[0][:6], states[1][:6])
        assert not torch.equal(states[0][15:], states[1][15:])


def test_dropout_is_active_in_training_only() -> None:
    """Of the attention weights alone: all other dropout is off."""
    model = small_model()
    for block in model.transformer.h:
        block.attn.attn_dropout.p = 0.5
    batch = pack(texts([8, 20]), EOS)
    draws = {summed_loss(model, batch).item() for _ in range(4)}
    assert len(draws) == 4
    model.eval()
    assert len({summed_loss(model, batch).item() for _ in range(2)}) == 1


def test_attention_dropout_keeps_the_mean() -> None:
    """Over many draws the attention's output is that without dropout."""
    model = small_model(dtype=torch.float64)
    attention = model.transformer.h[0].attn
    batch = pack(texts([8, 20]), EOS)
    torch.manual_seed(0)
    hidden = torch.randn(1, 28, 16, dtype=torch.float64)
    where = {name: batch.inputs[name] for name in ("boundaries", "padded_index", "longest")}
    with torch.no_grad():
        expected = attention(hidden, **where)[0]
        attention.attn_dropout.p = 0.1
        draws = torch.stack([attention(hidden, **where)[0] for _ in range(3000)])
    error = draws.std(dim=0) / 3000**0.5
    assert ((draws.mean(dim=0) - expected).abs() <= 5 * error + 1e-12).all()


def test_other_batches_go_to_sdpa() -> None:
    """A padded batch and generation with its cache give what the model gives by transformers' own attention."""
    model, plain = small_model().eval(), small_model().eval()
    plain.set_attn_implementation("sdpa")
    inputs = {
        "input_ids": torch.tensor([[0, 0, 5, 6], [3, 4, 5, 6]]),
        "attention_mask": torch.tensor([[0, 0, 1, 1], [1] * 4]),
    }
    options = {
        "max_new_tokens": 6,
        "do_sample": False,
        "pad_token_id": EOS,
        "output_scores": True,
        "return_dict_in_generate": True,
    }
    ours, reference = (each.generate(**inputs, **options) for each in (model, plain))
    assert torch.equal(ours.sequences, reference.sequences)
    assert all(torch.equal(a, b) for a, b in zip(ours.scores, reference.scores, strict=True))


def test_a_saved_model_knows_nothing_of_it(tmp_path) -> None:
    small_model().save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text()
    assert "packed" not in text and "gelu_new" in text


@pytest.mark.parametrize(
    ("device", "dtype", "capability", "head_size", "kernel"),
    [
        ("cpu", torch.bfloat16, (9, 0), 64, "repadded"),
        ("xpu", torch.bfloat16, (9, 0), 64, "repadded"),
        ("cuda", torch.bfloat16, (9, 0), 64, "varlen"),
        ("cuda", torch.float16, (8, 0), 256, "varlen"),
        ("cuda", torch.float16, (7, 5), 64, "repadded"),  # FlashAttention needs an Ampere GPU or a later one
        ("cuda", torch.float32, (9, 0), 64, "repadded"),
        ("cuda", torch.bfloat16, (9, 0), 10, "repadded"),
        ("cuda", torch.bfloat16, (9, 0), 264, "repadded"),
    ],
)
def test_choice_of_kernel(
    monkeypatch: pytest.MonkeyPatch,
    device: str,
    dtype: torch.dtype,
    capability: tuple[int, int],
    head_size: int,
    kernel: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    # The trial runs on the CPU here, by the kernel that stands in for FlashAttention's.
    zeros, tensor = torch.zeros, torch.tensor
    monkeypatch.setattr(torch, "zeros", lambda *size, **named: zeros(*size, **named | {"device": "cpu"}))
    monkeypatch.setattr(torch, "tensor", lambda *value, **named: tensor(*value, **named | {"device": "cpu"}))
    monkeypatch.setattr(attention, "varlen_attention", lambda query, *others: query)
    assert choose_kernel(torch.device(device), dtype, head_size) == kernel


def test_a_kernel_that_torch_was_not_built_with_is_replaced(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """FlashAttention's operator really fails here, where there is no GPU: as where torch was built without it."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    zeros, tensor = torch.zeros, torch.tensor
    monkeypatch.setattr(torch, "zeros", lambda *size, **named: zeros(*size, **named | {"device": "cpu"}))
    monkeypatch.setattr(torch, "tensor", lambda *value, **named: tensor(*value, **named | {"device": "cpu"}))
    assert choose_kernel(torch.device("cuda"), torch.bfloat16, 64) == "repadded"
    assert "FlashAttention does not run here" in capsys.readouterr().err
