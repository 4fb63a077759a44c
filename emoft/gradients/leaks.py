"""Does a token see only what it should? Each is changed in turn, and what must not move is watched.

The hidden states of earlier places of the same text, and of all places of the texts beside it, must stay; those of
later places of the same text must not, or the model does not use its context; and a text among others must be computed
as by itself.
"""

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GPT2LMHeadModel

from emoft.data.batching import Batch, pack, pad
from emoft.model.attention import use_packed_attention
from emoft.model.kernels import use_fast_kernels
from emoft.model.loading import load_model
from emoft.terminal import progress

LENGTHS = (7, 2, 11, 5)  # tokens of the texts; the shortest that has a later place, and no two alike
# Of the largest hidden state: rounding moves a state that nothing reaches by 1e-6, the weakest of a trained model's
# connections by more than 1e-4.
TOLERANCE = 2e-5
WAYS = {"packed": pack, "padded": pad}
SEED = 0


@dataclass
class Leaks:
    """What was found of one way to lay texts into a batch. Places are (text, place in it), both from 0."""

    way: str  # "packed" or "padded"
    changed: int  # tokens, one after another
    largest: float = 0.0  # move of a state that must stay, as a share of the largest state
    earlier: list[tuple[int, int]] = field(default_factory=list)  # tokens whose change moves an earlier place
    neighbours: list[tuple[int, int]] = field(default_factory=list)  # or a place of another text
    unseen: list[tuple[int, int]] = field(default_factory=list)  # or no later place of its own text
    not_as_alone: list[int] = field(default_factory=list)  # texts that are computed otherwise among others

    @property
    def is_sound(self) -> bool:
        """Whether nothing was found."""
        return not (self.earlier or self.neighbours or self.unseen or self.not_as_alone)

    def describe(self) -> list[str]:
        """Return it in words, a line for each thing that is wrong, or one if nothing is."""
        moved = f"by up to {self.largest:.1e} of the largest state (rounding: {TOLERANCE:.0e})"
        lines = []
        if self.earlier:
            lines.append(
                f"a token moves places before it, at {_places(self.earlier)}, {moved}: the future leaks into the past."
                " Look at the causal mask"
            )
        if self.neighbours:
            lines.append(
                f"a token moves the texts beside its own, at {_places(self.neighbours)}, {moved}: texts see each other."
                f" Look at {'the boundaries' if self.way == 'packed' else 'the mask of the padding'}"
            )
        if self.unseen:
            lines.append(
                f"a token moves no later place of its text, at {_places(self.unseen)}: the context is not seen. Look at"
                " the mask and the positions"
            )
        if self.not_as_alone:
            texts = ", ".join(str(number) for number in self.not_as_alone)
            lines.append(
                f"text {texts} is computed otherwise than by itself: positions do not begin at 0, or something of the"
                " batch reaches it"
            )
        if not lines:
            lines = [
                f"{self.changed} tokens changed one after another: no earlier place and no other text moved (largest"
                f" {self.largest:.1e} of a state), every later place could, and each text is computed as by itself"
            ]
        return [f"{self.way}: {line}" for line in lines]


def _places(places: list[tuple[int, int]]) -> str:
    text, place = places[0]
    return f"token {place} of text {text}" + (f" and {len(places) - 1} others" if len(places) > 1 else "")


def check_model(name: str) -> list[Leaks]:
    """Check a saved model as the training computes it, in float32 and without dropout.

    Raises:
        UserError: it cannot be loaded.
    """
    model = load_model(name)
    use_packed_attention(model)
    use_fast_kernels(model)
    return [find_leaks(model, way) for way in WAYS]


@torch.no_grad()
def find_leaks(model: GPT2LMHeadModel, way: str) -> Leaks:
    """Change each token of some texts in turn, and see which places it moves.

    Args:
        model: made ready as for training; its mode is left as it was.
        way: "packed" or "padded".
    """
    was_training = model.training
    model.eval()
    vocabulary = model.config.vocab_size
    generator = torch.Generator().manual_seed(SEED)
    longest = model.config.n_positions
    texts = [torch.randint(vocabulary, (min(n, longest),), generator=generator).tolist() for n in LENGTHS]
    before = hidden_states(model, texts, way)
    scale = max(float(states.abs().max()) for states in before)
    found = Leaks(way, sum(map(len, texts)))
    for number, place in progress(
        [(number, place) for number, text in enumerate(texts) for place in range(len(text))],
        f"Checking {way}",
        "tokens",
    ):
        changed = [list(text) for text in texts]
        changed[number][place] = (changed[number][place] + 1 + place) % vocabulary
        after = hidden_states(model, changed, way)
        moves = [(b - a).abs().amax(-1) / scale for a, b in zip(before, after, strict=True)]  # (T,) of each text
        earlier = float(moves[number][:place].max()) if place else 0.0
        beside = max(float(each.max()) for other, each in enumerate(moves) if other != number)
        found.largest = max(found.largest, earlier, beside)
        if earlier > TOLERANCE:
            found.earlier.append((number, place))
        if beside > TOLERANCE:
            found.neighbours.append((number, place))
        if place + 1 < len(texts[number]) and float(moves[number][place + 1 :].max()) <= 0.0:
            found.unseen.append((number, place))
    for number, text in enumerate(texts):
        (alone,) = hidden_states(model, [text], "padded")
        if float((alone - before[number]).abs().max()) / scale > TOLERANCE:
            found.not_as_alone.append(number)
    model.train(was_training)
    return found


def hidden_states(model: GPT2LMHeadModel, texts: list[list[int]], way: str) -> list[Tensor]:
    """Return the hidden states (T, C) of each text, computed together."""
    batch: Batch = WAYS[way]([{"input_ids": text} for text in texts], pad_id=0).to(model.device)
    states = model.transformer(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, C)
    owners = batch.owners()
    return [states[owners.to(states.device) == number].float() for number in range(len(texts))]


def as_json(found: list[Leaks]) -> list[dict[str, Any]]:
    """Return what was found as objects of JSON."""
    return [{**asdict(each), "sound": each.is_sound} for each in found]
