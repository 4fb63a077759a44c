"""Masks that let a token see too much or too little: planted one after another, each must be found."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Result
from torch import Tensor
from transformers import GPT2LMHeadModel

from emoft.gradients.leaks import LENGTHS, WAYS, Leaks, find_leaks
from emoft.model import attention
from emoft.model.kernels import use_fast_kernels

TOKENS = sum(LENGTHS)
Mask = Callable[[Tensor, Tensor, Tensor], Tensor]  # place, text and place in its text, (N,) each -> (N, N) may see


@pytest.fixture
def model(still_model: Path) -> GPT2LMHeadModel:
    return ready(GPT2LMHeadModel.from_pretrained(still_model))


def ready(model: GPT2LMHeadModel) -> GPT2LMHeadModel:
    attention.use_packed_attention(model)
    use_fast_kernels(model)
    return model


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_found_of_a_sound_model(model: GPT2LMHeadModel, way: str, training: bool) -> None:
    model.train(training)
    before = torch.get_rng_state()
    found = find_leaks(model, way)
    assert found.is_sound and found.largest < 1e-6 and found.changed == TOKENS, found
    assert model.training == training
    assert torch.equal(torch.get_rng_state(), before)
    (line,) = found.describe()
    assert line.startswith(f"{way}: {TOKENS} tokens changed one after another: no earlier place")


def explicit(mask: Mask) -> Any:
    """Attention over a packed row by a mask that is written out."""

    def attend(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, boundaries: Any = None, **_: Any
    ) -> tuple[Tensor, None]:
        if boundaries is None:
            return attention.sdpa_attention(module, query, key, value, attention_mask)
        place = torch.arange(query.shape[2])
        text = torch.bucketize(place, boundaries[1:], right=True)
        seen = mask(place, text, place - boundaries[text])
        scores = (query @ key.transpose(2, 3) / query.shape[-1] ** 0.5).masked_fill(~seen, -torch.inf)
        return (scores.softmax(-1) @ value).transpose(1, 2).contiguous(), None

    return attend


def same(text: Tensor) -> Tensor:
    return text[:, None] == text


SOUND: Mask = lambda place, text, inside: same(text) & (place[:, None] >= place)  # noqa: E731
MASKS: dict[str, tuple[Mask, tuple[str, ...]]] = {
    "no causal mask": (lambda place, text, inside: same(text), ("earlier",)),
    "the next token too": (lambda place, text, inside: same(text) & (place[:, None] + 1 >= place), ("earlier",)),
    "the other way round": (lambda place, text, inside: same(text) & (place[:, None] <= place), ("earlier", "unseen")),
    "no boundaries": (lambda place, text, inside: place[:, None] >= place, ("neighbours",)),
    "everything": (lambda place, text, inside: torch.ones(len(place), len(place), dtype=torch.bool), ("neighbours",)),
    "boundaries too late by one": (
        lambda place, text, inside: (
            (same(text) & (place[:, None] >= place)) | ((inside[:, None] == 0) & (place[:, None] == place + 1))
        ),
        ("neighbours",),
    ),
    "the token before a text": (
        lambda place, text, inside: (place[:, None] >= place) & ((text[:, None] == text) | (inside == 0)),
        ("neighbours",),
    ),
    "itself alone": (lambda place, text, inside: place[:, None] == place, ("unseen",)),
    "not itself's last token": (
        lambda place, text, inside: (
            same(text) & (place[:, None] >= place) & ((inside != 0) | (place[:, None] == place))
        ),
        ("unseen",),
    ),
}


def plant_mask(model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch, mask: Mask) -> None:
    monkeypatch.setattr(attention, "packed_attention", explicit(mask))
    attention.use_packed_attention(model)


def test_the_written_mask_is_sound_itself(model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch) -> None:
    plant_mask(model, monkeypatch, SOUND)
    assert find_leaks(model, "packed").is_sound


@pytest.mark.parametrize("name", MASKS)
def test_a_mask(model: GPT2LMHeadModel, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    mask, kinds = MASKS[name]
    plant_mask(model, monkeypatch, mask)
    found = find_leaks(model, "packed")
    assert not found.is_sound
    for kind in kinds:
        assert getattr(found, kind), (kind, found)
    assert all(line.startswith("packed: ") for line in found.describe())
    assert find_leaks(model, "padded").is_sound, "which has a mask of its own"
    monkeypatch.undo()
    attention.use_packed_attention(model)


def mix_rows(module: Any, inputs: Any, output: Any) -> Any:
    """As a batch norm does."""
    hidden = output[0] if isinstance(output, tuple) else output
    mixed = hidden + 0.1 * hidden.mean((0, 1), keepdim=True)
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def mix_places(module: Any, inputs: Any, output: Any) -> Any:
    hidden = output[0] if isinstance(output, tuple) else output
    mixed = hidden - 0.1 * hidden.mean(1, keepdim=True)
    return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("hook", "kind"), [(mix_rows, "neighbours"), (mix_places, "earlier")])
@pytest.mark.parametrize("block", [0, 1])
def test_a_module_that_mixes(model: GPT2LMHeadModel, way: str, hook: Any, kind: str, block: int) -> None:
    handle = model.transformer.h[block].register_forward_hook(hook)
    assert getattr(find_leaks(model, way), kind)
    handle.remove()


def test_positions_that_go_on_through_the_row(model: GPT2LMHeadModel) -> None:
    def go_on(module: Any, args: Any, keywords: dict[str, Any]) -> Any:
        if "position_ids" in keywords:
            keywords["position_ids"] = torch.arange(keywords["position_ids"].numel())[None]
        return args, keywords

    handle = model.transformer.register_forward_pre_hook(go_on, with_kwargs=True)
    found = find_leaks(model, "packed")
    assert found.not_as_alone == [1, 2, 3]
    assert "positions do not begin at 0" in found.describe()[0]
    handle.remove()


def test_of_a_saved_model(run: Callable[..., Result], tiny_model: Path) -> None:
    told = run("-m", "emoft.gradients", "--leak", tiny_model)
    assert told.code == 0, told.err
    assert [line.partition(":")[0] for line in told.out.splitlines()] == list(WAYS)
    found = json.loads(run("-m", "emoft.gradients", "--leak", tiny_model, "--json").out)
    assert [each["sound"] for each in found] == [True, True]
    for words in (["run", "--leak", str(tiny_model)], ["--leak", "nowhere/to/be/found"], []):
        refused = run("-m", "emoft.gradients", *words)
        assert (refused.code, len(refused.error_lines)) == (2, 1)


def test_what_is_said_of_each_kind() -> None:
    found = Leaks("packed", 9, 0.5, [(0, 3)], [(1, 1), (2, 0)], [(0, 0)], [2])
    earlier, neighbours, unseen, alone = found.describe()
    assert "token 3 of text 0" in earlier and "causal mask" in earlier
    assert "token 1 of text 1 and 1 others" in neighbours and "boundaries" in neighbours
    assert "the context is not seen" in unseen
    assert alone.startswith("packed: text 2 is computed otherwise")
