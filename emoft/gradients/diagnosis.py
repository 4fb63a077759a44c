"""From the curves of a run to plain words: what is wrong, in which layer and at which step, and what to change."""

import json
import math
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

from emoft.config import GradientsConfig
from emoft.gradients.curves import Curve, read_curves
from emoft.gradients.names import KINDS, NO_UPDATE

FEW_ENTRIES = 10  # log entries below which nothing is said of how the loss goes
LEAST_ALIGNED = 0.99  # of the targets; two equal tokens in a row make a wrong shift right now and then
DIVERGED = 1.25  # times the first loss
LEAST_FALL = 0.02  # of the loss over a run, as a share of it
DEPTH_RATIO = 100.0  # between the gradient norms of the first block and the last
LAYER_RATIO = 10.0  # between the weight norms of a layer and of the same layer in other blocks
UPDATE_RATIO = (-5.0, -1.0)  # log10; guide is -3, and small models from random weights learn well at -1.5
CLIPPED_SHARE = 0.9
CLIPPED_NORM = 3.0  # times --max_grad_norm; AdamW evens out a milder clipping
SATURATION = 0.9
SKIPPED_SHARE = 0.05  # of steps, by fp16's loss scaling
EVAL_RISE = 0.02  # of the evaluation loss above its lowest, as a share of it
SPIKE_WINDOW = 15  # log entries before one that tell whether it stands out
SPIKE_DEVIATIONS = 8.0  # standard deviations, estimated from the median absolute deviation
SPIKE_RISE = 0.25  # and at least so much above the median, as a share of it


@dataclass(frozen=True)
class Finding:
    """Something that is wrong."""

    name: str
    text: str  # what, where, and what to change
    tag: str  # to open in TensorBoard
    steps: list[int] = field(default_factory=list)


def diagnose(curves: dict[str, Curve]) -> list[Finding]:
    """Return all that is wrong with a run."""
    checks = (
        check_finite,
        check_labels,
        check_loss,
        check_evaluation,
        check_spikes,
        check_depth,
        check_weights,
        check_frozen,
        check_updates,
        check_clipping,
        check_saturation,
        check_skipped,
    )
    return [finding for check in checks for finding in check(curves)]


def check_finite(curves: dict[str, Curve]) -> list[Finding]:
    """Steps whose loss or gradient was not finite."""
    tag = "train/nonfinite_steps"
    counts = sorted(curves.get(tag, {}).items())
    steps = [step for (step, count), (_, before) in zip(counts, [(0, 0.0), *counts], strict=False) if count > before]
    if not steps:
        return []
    text = (
        f"{counts[-1][1]:.0f} steps had a loss or gradient that was not finite ({_list(steps)}): the files"
        " nonfinite-STEP.json name the module and the texts where it began"
    )
    return [Finding("not_finite", text, tag, steps)]


def check_labels(curves: dict[str, Curve]) -> list[Finding]:
    """Targets that are not the next token."""
    tag = "train/label_alignment"
    shares = _values(curves, tag)
    if not shares or (share := statistics.median(shares)) > LEAST_ALIGNED:
        return []
    text = (
        f"only {share:.0%} of the targets are the token right after the place that predicts them: the labels are not"
        " shifted, or shifted twice. Shift them once"
    )
    return [Finding("labels_misaligned", text, tag)]


def check_loss(curves: dict[str, Curve]) -> list[Finding]:
    """A loss that does not fall, or not below what word frequencies alone reach."""
    losses = _values(curves, "train/loss")
    entropy = _values(curves, "train/unigram_entropy")
    if len(losses) < FEW_ENTRIES:
        return []
    steps = [step for step, value in sorted(curves["train/loss"].items()) if math.isfinite(value)]
    # The middle one of three in a row, so that a single spike is not taken for it.
    smooth = [statistics.median(losses[max(0, n - 1) : n + 2]) for n in range(len(losses))]
    highest = max(smooth)
    if highest > losses[0] * DIVERGED:
        step = steps[smooth.index(highest)]
        text = (
            f"the loss diverges: from {losses[0]:.2f} nats it rises to {highest:.2f} near step {step}. Lower"
            " --learning_rate, tenfold at first, or raise --warmup_steps"
        )
        return [Finding("diverged", text, "train/loss", [step])]
    part = max(2, len(losses) // 10)
    first, last = statistics.median(losses[:part]), statistics.median(losses[-part:])
    if not last < first * (1 - LEAST_FALL):
        text = (
            f"the loss does not fall: {first:.2f} nats in the beginning, {last:.2f} at the end. Check"
            " --learning_rate, that --template puts the text where it belongs, and that labels are shifted by one"
        )
        return [Finding("loss_does_not_fall", text, "train/loss")]
    if entropy and last >= entropy[-1]:
        text = (
            f"the loss is {last:.2f} nats at the end, no better than knowing how frequent each token is"
            f" ({entropy[-1]:.2f}): the context is not used. Train longer; if it stays, check that each label is the"
            " next token (shifted by one, not two)"
        )
        return [Finding("context_not_used", text, "train/loss")]
    return []


def check_evaluation(curves: dict[str, Curve]) -> list[Finding]:
    """An evaluation loss that rises while the training loss falls."""
    evaluations = sorted(curves.get("eval/loss", {}).items())
    losses = curves.get("train/loss", {})
    if len(evaluations) < 2 or not losses:
        return []
    best_step, best = min(evaluations, key=lambda each: each[1])
    last_step, last = evaluations[-1]
    before, after = _nearest(losses, best_step), _nearest(losses, last_step)
    if last > best * (1 + EVAL_RISE) and after < before:
        text = (
            f"overfitting: the evaluation loss rose from {best:.3f} at step {best_step} to {last:.3f} at step"
            f" {last_step}, while the training loss fell from {before:.3f} to {after:.3f}. Keep the best model"
            " (--load_best_model_at_end), train fewer epochs, or add --early_stopping_patience"
        )
        return [Finding("overfitting", text, "eval/loss", [best_step, last_step])]
    return []


def check_spikes(curves: dict[str, Curve]) -> list[Finding]:
    """Log entries whose loss stands far above those before."""
    steps, losses = list(curves.get("train/loss", {})), _values(curves, "train/loss")
    spikes = []
    for number in range(5, len(losses)):
        window = losses[max(0, number - SPIKE_WINDOW) : number]
        median = statistics.median(window)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in window)  # of a normal distribution
        if losses[number] > median + max(SPIKE_DEVIATIONS * deviation, SPIKE_RISE * median):
            spikes.append(steps[number])
    if not spikes:
        return []
    text = f"the loss jumps at {_list(spikes)}: look at the texts of these steps, and lower --learning_rate"
    return [Finding("loss_spikes", text, "train/loss", spikes)]


def check_depth(curves: dict[str, Curve]) -> list[Finding]:
    """A gradient that fades or grows on its way from the last block to the first."""
    trend = depth_trend(curves)
    if trend is None or max(trend, 1 / trend) < DEPTH_RATIO:
        return []
    if trend < 1:
        text = (
            f"vanishing gradient: its norm in the first block is 1/{1 / trend:,.0f} of that in the last. Check the"
            " initialization of the blocks between (weight_norm), and raise --warmup_steps"
        )
        return [Finding("vanishing", text, "gradient_norm/h00")]
    text = (
        f"exploding gradient: its norm in the first block is {trend:,.0f} times that in the last. Lower"
        " --learning_rate, raise --warmup_steps, and check the initialization of the blocks (weight_norm)"
    )
    return [Finding("exploding", text, "gradient_norm/h00")]


def depth_trend(curves: dict[str, Curve]) -> float | None:
    """Return the gradient norm of the first block divided by that of the last, the median of the measured steps."""
    blocks = [curves[f"gradient_norm/{name}"] for name in _blocks(curves)]
    learning = [block for block in blocks if any(block.values())]  # without frozen ones
    if len(learning) < 2:
        return None
    first, last = learning[0], learning[-1]
    ratios = [first[step] / last[step] for step in first if first[step] > 0 and last.get(step, 0) > 0]
    return statistics.median(ratios) if ratios else None


def check_weights(curves: dict[str, Curve]) -> list[Finding]:
    """A layer whose weights are far larger or smaller than those of the same layer in the other blocks."""
    findings = []
    for kind in KINDS:
        tags = [f"weight_norm/{name}.{kind}" for name in _blocks(curves)]
        norms = {tag: next(iter(curves[tag].values())) for tag in tags if tag in curves}
        for tag, norm in norms.items():
            others = [each for name, each in norms.items() if name != tag]
            if not others or not norm or not (middle := statistics.median(others)):
                continue
            if (ratio := max(norm / middle, middle / norm)) > LAYER_RATIO and (len(others) > 1 or norm > middle):
                text = (
                    f"the weights of {tag.partition('/')[2]} are {ratio:,.0f} times as"
                    f" {'large' if norm > middle else 'small'} as those of {kind} in the other blocks (norm {norm:.3g},"
                    f" there {middle:.3g}): initialize that layer like the others"
                )
                findings.append(Finding("layer_scale", text, tag))
    return findings


def check_frozen(curves: dict[str, Curve]) -> list[Finding]:
    """Blocks that do not change while others do."""
    ratios = {name: curves.get(f"update_ratio/{name}", {}) for name in _blocks(curves)}
    frozen = [name for name, curve in ratios.items() if curve and max(curve.values()) <= NO_UPDATE]
    if not frozen or len(frozen) == len(ratios):
        return []
    text = (
        f"{', '.join(frozen)} {'do' if len(frozen) > 1 else 'does'} not learn: no update in any measured step, while"
        " other blocks change. Check that requires_grad is on and that the gradient reaches it"
    )
    return [Finding("frozen", text, f"update_ratio/{frozen[0]}")]


def check_updates(curves: dict[str, Curve]) -> list[Finding]:
    """Steps too large or too small for the weights they change."""
    moves = {
        name: statistics.median(values)
        for name in _blocks(curves)
        if (values := [v for v in _values(curves, f"update_ratio/{name}") if v > NO_UPDATE])
    }
    if not moves:
        return []
    low, high = UPDATE_RATIO
    middle = statistics.median(moves.values())
    fastest = max(moves, key=lambda name: moves[name])
    tag = f"update_ratio/{fastest}"
    if moves[fastest] > high:
        text = (
            f"the steps are too large: each changes the weights of {fastest} by {10 ** moves[fastest]:.1%} (log10"
            f" {moves[fastest]:.1f}, healthy is near -3). Lower --learning_rate, tenfold at first"
        )
        return [Finding("update_too_large", text, tag)]
    if middle < low:
        text = (
            f"the steps are too small: each changes the weights by {10**middle:.5%} (log10 {middle:.1f}, healthy is"
            " near -3). Raise --learning_rate"
        )
        return [Finding("update_too_small", text, tag)]
    return []


def check_clipping(curves: dict[str, Curve]) -> list[Finding]:
    """Clipping at nearly every step by a large factor, which makes all steps equally long."""
    tag = "train/clipped_share"
    shares, norms = _values(curves, tag), _values(curves, "train/grad_norm")
    limits = _values(curves, "train/max_grad_norm")
    if not (shares and norms and limits) or (share := statistics.fmean(shares)) <= CLIPPED_SHARE:
        return []
    norm = statistics.median(norms)
    if norm <= CLIPPED_NORM * limits[-1]:
        return []
    text = (
        f"{share:.0%} of the steps are clipped, to {limits[-1]:g} from a median of {norm:.3g}: raise --max_grad_norm"
        f" to about {2 * norm:.2g}, or lower --learning_rate if the loss is unsteady"
    )
    return [Finding("clipped_too_often", text, tag)]


def check_saturation(curves: dict[str, Curve]) -> list[Finding]:
    """Blocks whose MLP lets almost no gradient through."""
    findings = []
    for name in _blocks(curves):
        tag = f"activation_saturation/{name}"
        values = _values(curves, tag)
        if values and statistics.median(values[-5:]) > SATURATION:
            text = (
                f"{values[-1]:.0%} of the MLP's units of {name} are dead (GELU of less than -3): lower --learning_rate"
            )
            findings.append(Finding("dead_units", text, tag))
    return findings


def check_skipped(curves: dict[str, Curve]) -> list[Finding]:
    """fp16 steps dropped too often."""
    tag = "train/skipped_steps"
    counts = curves.get(tag, {})
    if not counts or (share := counts[max(counts)] / max(counts)) <= SKIPPED_SHARE:
        return []
    text = f"fp16 dropped {share:.0%} of the steps, because gradients overflowed: use --mixed_precision bf16 or no"
    return [Finding("skipped_too_often", text, tag)]


def describe_depth(curves: dict[str, Curve]) -> str:
    """Return the trend by depth in one line."""
    names = _blocks(curves)
    trend = depth_trend(curves)
    if trend is None:
        return "gradients by depth: not measured; train with --log_gradients_every 100 to see them"
    norms = [statistics.median(curves[f"gradient_norm/{name}"].values()) for name in names]
    return f"gradient norm by depth: {', '.join(f'{n} {v:.3g}' for n, v in zip(names, norms, strict=True))}"


def report(config: GradientsConfig) -> None:
    """Read a run and print its diagnosis.

    Raises:
        UserError: the folder holds no run.
    """
    curves = read_curves(Path(config.run_dir))
    findings = diagnose(curves)
    steps = sorted(curves.get("train/loss", {}))
    if config.json:
        depth = {name: statistics.median(curves[f"gradient_norm/{name}"].values()) for name in _blocks(curves)}
        found = {"steps": steps[-1] if steps else 0, "depth": depth, "findings": [asdict(each) for each in findings]}
        print(json.dumps(found, indent=2))
        return
    measured = len(next((curves[f"gradient_norm/{name}"] for name in _blocks(curves)), {}))
    print(f"{config.run_dir}: {len(steps)} log entries, gradients measured at {measured} steps")
    print(describe_depth(curves))
    for finding in findings:
        print(f"- {finding.text}\n  open: {finding.tag}")
    if not findings:
        print("nothing is wrong")


def _blocks(curves: dict[str, Curve]) -> list[str]:
    return sorted({match[1] for tag in curves if (match := re.fullmatch(r"gradient_norm/(h\d+)", tag))})


def _values(curves: dict[str, Curve], tag: str) -> list[float]:
    return [value for _, value in sorted(curves.get(tag, {}).items()) if math.isfinite(value)]


def _nearest(curve: Curve, step: int) -> float:
    return curve[min(curve, key=lambda each: abs(each - step))]


def _list(steps: list[int]) -> str:
    more = len(steps) - 5
    return f"step{'s' * (len(steps) > 1)} {', '.join(map(str, steps[:5]))}" + (f" and {more} more" if more > 0 else "")
