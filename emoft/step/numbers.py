"""What is known of a step once it has been watched: every number that is shown, by its name."""

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class Text:
    """A text of the step, token by token; lists are as long as it has tokens."""

    row: int  # of the train split, from 0
    text: str  # the filled template
    ids: list[int]
    tokens: list[str]  # spelled; a blank is shown as "·", end-of-text as "<eos>"
    positions: list[int]  # that the model is given
    targets: list[int | None]  # what each place was told to predict; None: nothing
    losses: list[float | None]  # cross-entropy in nats, of the places with a target
    target_tokens: list[str | None] = field(default_factory=list)
    sees: list[int] = field(default_factory=list)  # tokens that move the place's hidden state; measured for few texts


@dataclass
class Prediction:
    """What the model thinks comes after a place."""

    text: int  # among those shown
    place: int
    likeliest: list[str]  # the five likeliest tokens
    probabilities: list[float]  # of them
    target: str
    probability: float  # of the target
    loss: float  # its cross-entropy, -ln probability, in nats


@dataclass
class Agreement:
    """Two ways to the same number."""

    name: str
    one: float
    other: float
    difference: float
    tolerance: float

    @property
    def holds(self) -> bool:
        """Whether they agree; a NaN does not."""
        return self.difference <= self.tolerance


@dataclass
class Cut:
    """The step cut into micro-batches in another way, in float32 and without dropout."""

    micro_batches: int
    size: int  # texts in each
    loss: float
    grad_norm: float
    difference: float  # largest of any weight's gradient to the first way's, as a share of the largest gradient


@dataclass
class Weight:
    """A weight, and what AdamW makes of its gradient."""

    name: str
    index: list[int]
    gradient: float  # of the step, unscaled, before clipping
    gradient_float32: float  # in float32, with the same dropout
    finite_difference: float  # of the loss in float64, with the same dropout
    nudge: float  # by which the weight was moved for that, up and down
    before: float
    after: float
    m_before: float
    v_before: float
    m: float
    v: float
    m_hat: float
    v_hat: float
    decay: float  # what weight decay takes away
    update: float  # by the formula: after - before
    optimizer_update: float  # likewise, as the optimizer made it
    steps: int  # AdamW's count, this one included


@dataclass
class Numbers:
    """All numbers of a step. Losses are in nats, norms are L2."""

    step: int
    total_steps: int
    epoch: float
    learning_rate: float
    precision: str
    batching: str
    dropout: bool
    parameters: int
    texts: list[Text]  # those shown
    examples: int  # in the step
    tokens: int  # targets in the step
    predictions: list[Prediction]
    loss_sum: float
    loss: float  # of the loop
    mean_of_means: float  # of the mean losses of the texts
    label_contrast: float  # the part of the loss that --label_contrast adds; 0 without it
    uniform_loss: float  # ln V
    attention: list[list[list[float]]]  # of each text shown (T, T), mean over the heads of the first block
    gradient_norms: dict[str, float]
    grad_norm: float
    embedding_from_input: float  # norm of the part of the embedding's gradient that comes through its input
    embedding_from_head: float  # and through the head
    head_is_tied: bool
    loss_float32: float
    grad_norm_float32: float
    largest_loss_difference: float  # between a token's loss in the step's precision and in float32
    largest_hidden_difference: float  # of a last hidden state, as a share of the largest one
    loss_scale: float
    max_grad_norm: float
    clip_factor: float
    cuts: list[Cut]
    weight: Weight
    adam: dict[str, float]  # beta1, beta2, epsilon, weight_decay
    update_ratios: dict[str, float]  # norm of a block's update by that of its weights
    predicted_change: float  # of the loss, to first order
    loss_after: float  # in float32, with the same dropout
    agreements: list[Agreement]

    @property
    def agrees(self) -> bool:
        """Whether everything agrees that must."""
        return all(each.holds for each in self.agreements)

    def as_json(self) -> dict[str, Any]:
        """Return all of it as an object of JSON."""
        content = asdict(self)
        content["agreements"] = [{**asdict(each), "holds": each.holds} for each in self.agreements]
        return content
