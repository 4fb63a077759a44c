"""Checks of the model: its weights as they start, and the way of the gradient through its blocks."""

import math
import statistics

from emoft.gradients.finding import Finding
from emoft.gradients.names import KINDS, NO_UPDATE
from emoft.gradients.record import CannotCheckError, Record
from emoft.gradients.thresholds import (
    ATTENTION_ENTROPY,
    ATTENTION_LOGIT,
    DEPTH_RATIO,
    DROPOUT,
    FIRST_LOSS,
    KURTOSIS_RISE,
    KURTOSIS_SHARE,
    LARGEST_WEIGHTS,
    LAYER_RATIO,
    SATURATION,
    SMALLEST_WEIGHTS,
)

AT_START = "weights at the start"
# Entries of a matrix of GPT-2, as multiples of the squared width C. The other two matrices of a block start smaller in
# a deep model than in a shallow one (Radford et al., 2019, section 2.3).
ENTRIES = {"attn.c_attn": 3, "mlp.c_fc": 4}


def check_start(record: Record) -> list[Finding]:
    """Weights that are too large or too small from the start, all of them."""
    sizes = matrix_sizes(record)
    size = statistics.median(sizes.values())
    if size > LARGEST_WEIGHTS:
        text = (
            f"the model starts with matrices of {size:.2g} in root mean square (GPT-2 starts at 0.02; at most"
            f" {LARGEST_WEIGHTS} is usual). Initialize it smaller: initializer_range=0.02, or take another model"
        )
        return [Finding("initialization_too_large", text, "weight_norm/h00", [0], size, LARGEST_WEIGHTS)]
    if size < SMALLEST_WEIGHTS:
        text = (
            f"the model starts with matrices of {size:.2g} in root mean square (GPT-2 starts at 0.02; at least"
            f" {SMALLEST_WEIGHTS} is usual): hardly anything passes through it. Initialize it larger:"
            " initializer_range=0.02"
        )
        return [Finding("initialization_too_small", text, "weight_norm/h00", [0], size, SMALLEST_WEIGHTS)]
    return []


def check_first_loss(record: Record) -> list[Finding]:
    """A loss above that of knowing nothing, before anything has been learned."""
    uniform = record.values("train/uniform_loss")[0]
    # The loss of the first step is that of the model as it came, and is known if every step is logged.
    losses = {tag: record.curves.get(tag, {}).get(step) for tag, step in (("eval/loss", 0), ("train/loss", 1))}
    known = [(tag, loss) for tag, loss in losses.items() if loss is not None and math.isfinite(loss)]
    if not known:
        raise CannotCheckError("no evaluation before the first step: --validation_file")
    tag, loss = known[0]
    if loss <= FIRST_LOSS * uniform:
        return []
    text = (
        f"the model starts worse than knowing nothing: {loss:.1f} nats, where {uniform:.1f} (ln V) is the loss if all"
        f" tokens are equally likely (at most {FIRST_LOSS} times that is usual). Its weights are too large, or not"
        " those that belong to its tokenizer"
    )
    return [Finding("first_loss_too_high", text, tag, [0], loss, FIRST_LOSS * uniform)]


def check_dropout(record: Record) -> list[Finding]:
    """Dropout that leaves too little of what a block computes."""
    tag = "model/dropout"
    dropout = record.values(tag, unit=AT_START)[0]
    if dropout <= DROPOUT:
        return []
    text = (
        f"dropout of {dropout:g} leaves {1 - dropout:.0%} of what the blocks compute (up to {DROPOUT} is usual, GPT-2"
        " has 0.1): lower embd_pdrop, resid_pdrop and attn_pdrop, by --config_overrides"
    )
    return [Finding("dropout_too_strong", text, tag, [0], dropout, DROPOUT)]


def matrix_sizes(record: Record) -> dict[str, float]:
    """Return the root mean square at the start of each block's first matrices, by "h00.attn.c_attn" and so on.

    Raises:
        CannotCheckError: nothing was measured.
    """
    blocks = record.measured_blocks()
    width = record.values("model/width", unit=AT_START)[0]
    places = [f"{name}.{kind}" for name in blocks for kind in ENTRIES]
    norms = {place: norm for place in places if (norm := start_norm(record, place)) is not None}
    if not norms:
        raise CannotCheckError("the weights that the run began with were not measured: --log_gradients_every")
    return {place: norm / (width * ENTRIES[place[4:]] ** 0.5) for place, norm in norms.items()}


def start_norm(record: Record, place: str) -> float | None:
    """Return the norm of some weights at the start, or at the first measurement; None if they were never measured."""
    block, _, kind = place.partition(".")
    if kind:  # told of each kind at once, at the number of the block in place of a step
        return record.curves.get(f"weights_at_start/{kind}", {}).get(int(block[1:]))
    points = sorted(record.curves.get(f"weight_norm/{place}", {}).items())
    return points[0][1] if points and math.isfinite(points[0][1]) else None


def check_layers(record: Record) -> list[Finding]:
    """A layer whose weights are far larger or smaller at the start than those of the same layer in the other blocks."""
    blocks = record.measured_blocks()
    findings = []
    for kind in KINDS:
        norms = {f"{name}.{kind}": norm for name in blocks if (norm := start_norm(record, f"{name}.{kind}"))}
        for place, norm in norms.items():
            others = [each for name, each in norms.items() if name != place]
            if not others or not (middle := statistics.median(others)):
                continue
            ratio = max(norm / middle, middle / norm)
            if ratio > LAYER_RATIO and (len(others) > 1 or norm > middle):
                text = (
                    f"the weights of {place} are {ratio:,.0f} times as {'large' if norm > middle else 'small'} as those"
                    f" of {kind} in the other blocks (norm {norm:.3g}, there {middle:.3g}; up to {LAYER_RATIO:g} times"
                    " is usual): initialize that layer like the others"
                )
                findings.append(Finding("layer_scale", text, f"weights_at_start/{kind}", [0], ratio, LAYER_RATIO))
    return findings + _embeddings(record)


def _embeddings(record: Record) -> list[Finding]:
    """The two embeddings, which stand alone, by the size of their entries."""
    width = record.curves.get("model/width", {})
    rows = {
        "wte": [math.exp(value) for value in record.curves.get("train/uniform_loss", {}).values()],
        "wpe": list(record.curves.get("model/positions", {}).values()),
    }
    findings = []
    for place, count in rows.items():
        norm = start_norm(record, place)
        if not (width and count and norm):
            continue
        size = norm / math.sqrt(next(iter(width.values())) * count[0])
        if not SMALLEST_WEIGHTS <= size <= LARGEST_WEIGHTS:
            text = (
                f"the embedding {place} has entries of {size:.2g} in root mean square at the start (GPT-2 starts at"
                f" 0.02; {SMALLEST_WEIGHTS} to {LARGEST_WEIGHTS} is usual): initialize it like GPT-2's"
            )
            threshold = LARGEST_WEIGHTS if size > LARGEST_WEIGHTS else SMALLEST_WEIGHTS
            findings.append(Finding("layer_scale", text, f"weight_norm/{place}", [0], size, threshold))
    return findings


def check_depth(record: Record) -> list[Finding]:
    """A gradient that fades or grows on its way from the last block to the first."""
    trend = depth_trend(record)
    if max(trend, 1 / trend) < DEPTH_RATIO:
        return []
    if trend < 1:
        text = (
            f"vanishing gradient: its norm in the first block is 1/{1 / trend:,.0f} of that in the last (up to"
            f" 1/{DEPTH_RATIO:.0f} is usual). Check the initialization of the blocks between (weight_norm), and raise"
            " --warmup_steps"
        )
        return [Finding("vanishing", text, "gradient_norm/h00", figure=trend, threshold=1 / DEPTH_RATIO)]
    text = (
        f"exploding gradient: its norm in the first block is {trend:,.0f} times that in the last (up to"
        f" {DEPTH_RATIO:.0f} is usual). Lower --learning_rate, raise --warmup_steps, and check the initialization of"
        " the blocks (weight_norm)"
    )
    return [Finding("exploding", text, "gradient_norm/h00", figure=trend, threshold=DEPTH_RATIO)]


def depth_trend(record: Record) -> float:
    """Return the gradient norm of the first block divided by that of the last, the median of the measured steps.

    Raises:
        CannotCheckError: fewer than two blocks get a gradient, or none was measured.
    """
    blocks = [record.curves[f"gradient_norm/{name}"] for name in record.measured_blocks()]
    learning = [block for block in blocks if any(block.values())]  # without frozen ones
    first, last = (learning[0], learning[-1]) if len(learning) > 1 else ({}, {})
    ratios = [first[step] / last[step] for step in first if first[step] > 0 and last.get(step, 0) > 0]
    if not ratios:
        raise CannotCheckError(f"{len(learning)} blocks with a gradient, 2 needed")
    return statistics.median(ratios)


def check_frozen(record: Record) -> list[Finding]:
    """Blocks that do not change while others do."""
    blocks = record.measured_blocks()
    ratios = {name: record.curves.get(f"update_ratio/{name}", {}) for name in blocks}
    frozen = [name for name, curve in ratios.items() if curve and max(curve.values()) <= NO_UPDATE]
    if not frozen or len(frozen) == len(blocks):
        return []
    tag = f"update_ratio/{frozen[-1]}"
    positions = record.curves.get("update_ratio/wpe", {})
    if frozen == blocks[: len(frozen)] and positions and max(positions.values()) <= NO_UPDATE:
        text = (
            f"the gradient is cut behind {frozen[-1]}: that block and all before it, the positions too, get none in any"
            " measured step, while later blocks change. Look for detach() or no_grad() on the output of that block"
        )
        return [Finding("gradient_cut", text, tag, [min(ratios[frozen[-1]])], NO_UPDATE)]
    text = (
        f"{', '.join(frozen)} {'do' if len(frozen) > 1 else 'does'} not learn: no update in any measured step, while"
        " other blocks change. Check that requires_grad is on and that the gradient reaches it"
    )
    return [Finding("frozen", text, tag, [min(ratios[frozen[-1]])], NO_UPDATE)]


def check_saturation(record: Record) -> list[Finding]:
    """Blocks whose MLP lets almost no gradient through."""
    findings = []
    for name in record.measured_blocks():
        tag = f"activation_saturation/{name}"
        points = record.points(tag, unit="measurements")
        share = statistics.median(value for _, value in points[-5:])
        if share > SATURATION:
            first = next((step for step, value in points if value > SATURATION), points[-1][0])
            text = (
                f"{share:.0%} of the MLP's units of {name} are dead (GELU of less than -3; {SATURATION:.0%} is the"
                " limit): "
                + ("lower --learning_rate" if first > points[0][0] else "its weights start so, initialize it anew")
            )
            findings.append(Finding("dead_units", text, tag, [first], share, SATURATION))
    return findings


def check_attention(record: Record) -> list[Finding]:
    """Attention that looks at single tokens, by scores so large that no gradient can move it."""
    for name in record.measured_blocks():
        scores = record.points(f"attention_logit/{name}", unit="measurements")
        shares = dict(record.points(f"attention_entropy/{name}", unit="measurements with texts of two tokens"))
        stuck = [
            (step, score)
            for step, score in scores
            if score > ATTENTION_LOGIT and shares.get(step, 1.0) < ATTENTION_ENTROPY
        ]
        if len(stuck) > len(scores) / 2:
            step, score = stuck[0]
            text = (
                f"attention of {name} looks at single tokens: its largest score is {score:.0f} (up to"
                f" {ATTENTION_LOGIT:.0f} is usual) and its entropy {shares[step]:.1%} of what is possible, so that"
                f" hardly a gradient passes. Initialize {name}.attn.c_attn smaller, or lower --learning_rate"
            )
            return [Finding("attention_stuck", text, f"attention_logit/{name}", [step], score, ATTENTION_LOGIT)]
    return []


def check_kurtosis(record: Record) -> list[Finding]:
    """A block in whose output a single number comes to hold nearly everything."""
    width = record.values("model/width", unit=AT_START)[0]
    limit = KURTOSIS_SHARE * width
    for name in record.measured_blocks(2):
        points = record.points(f"kurtosis/{name}", 2, "measurements")
        first = points[0][1]
        high = [(step, value) for step, value in points if value > max(limit, KURTOSIS_RISE * first)]
        if high:
            step, value = high[0]
            text = (
                f"a single number holds nearly all of the output of {name}: kurtosis {value:.0f} from step {step} on,"
                f" at first {first:.1f} (up to {limit:.0f}, {KURTOSIS_SHARE:.0%} of n_embd, is usual): half precision"
                " rounds away what lies beside it. Lower --learning_rate, or raise --weight_decay"
            )
            return [Finding("outlier_features", text, f"kurtosis/{name}", [step], value, limit)]
    return []
