"""Checks of the optimization steps: that they are finite, and what clipping, decay and the batch do in them."""

import math
import re
import statistics

from emoft.gradients.finding import Finding, list_steps
from emoft.gradients.record import CannotCheckError, Record
from emoft.gradients.thresholds import (
    BATCH_ABOVE_NOISE,
    CLIPPED_NORM,
    CLIPPED_SHARE,
    DISTANCE,
    NOISE_MEASUREMENTS,
    SKIPPED_SHARE,
    USUAL_DECAY,
    WEIGHT_DECAY,
    WEIGHT_LOSS,
)


def check_finite(record: Record) -> list[Finding]:
    """Steps whose loss or gradient was not finite."""
    tag = "train/nonfinite_steps"
    counts = record.points(tag)
    before = [0.0, *(count for _, count in counts)]
    steps = [step for (step, count), last in zip(counts, before, strict=False) if count > last]
    if not steps:
        return []
    text = f"{list_steps(steps)} had a loss or gradient that was not finite"
    if fault := next(iter(record.faults), None):
        text += f": {_where_it_began(fault)}"
    return [Finding("not_finite", text, tag, steps, counts[-1][1], 0)]


def _where_it_began(fault: dict[str, object]) -> str:
    """Put the report of a bad step into words, with what to change."""
    module = _short(str(fault.get("module", "")))
    parameters = fault.get("parameters_not_finite")
    if isinstance(parameters, list) and parameters:
        return f"the weights {_short(str(parameters[0]))} are not finite. Start from sound ones"
    found = fault.get("found")
    if found == "loop":
        return "it began in train.py itself, behind the model, whose logits are finite. Look at the loop's own lines"
    if found == "nowhere":
        return "it did not come again when the step was repeated twice: the device may be faulty"
    texts, at_fault = fault.get("texts"), fault.get("examples_at_fault")
    which = ""
    if isinstance(texts, list) and isinstance(at_fault, list) and 0 < len(at_fault) < len(texts):
        which = f", at the text {str(texts[at_fault[0]])[:60]!r}"
    what = {"forward": "output", "backward": "gradient of the output"}.get(str(found), "gradient")
    return (
        f"it began in the {what} of {module}{which}. Lower --learning_rate, raise --warmup_steps, or leave such steps"
        f" out by --on_nonfinite skip (all of it is in nonfinite-{fault['step']}.json)"
    )


def _short(name: str) -> str:
    """Return a module's name as the charts have it: "h03.attn.c_proj"."""
    name = re.sub(r"^transformer\.", "", name)
    return re.sub(r"^h\.(\d+)", lambda match: f"h{int(match[1]):02}", name)


def check_decay(record: Record) -> list[Finding]:
    """Weight decay that takes away what is learned."""
    flags = record.flags
    if "weight_decay" not in flags:
        raise CannotCheckError("no train_config.yaml beside the run")
    share = float(flags["learning_rate"]) * float(flags["weight_decay"])
    if share <= WEIGHT_DECAY or float(flags["weight_decay"]) <= USUAL_DECAY:  # then it is the learning rate
        return []
    evidence = ""
    for name in record.blocks:
        points = sorted(record.curves.get(f"weight_norm/{name}", {}).items())
        if points and points[-1][1] < WEIGHT_LOSS * points[0][1]:
            evidence = f", and the weights of {name} shrink from a norm of {points[0][1]:.3g} to {points[-1][1]:.3g}"
            break
    text = (
        f"weight decay takes {share:.2%} of each weight at every step (--learning_rate times --weight_decay; up to"
        f" {WEIGHT_DECAY:.1%} is usual){evidence}. Lower --weight_decay to {USUAL_DECAY} or less"
    )
    return [
        Finding(
            "weights_decay",
            text,
            f"weight_norm/{record.blocks[0] if record.blocks else 'h00'}",
            [],
            share,
            WEIGHT_DECAY,
        )
    ]


def check_clipping(record: Record) -> list[Finding]:
    """Clipping at nearly every step by a large factor, which makes all steps equally long."""
    tag = "train/clipped_share"
    shares, norms = record.values(tag), record.values("train/grad_norm")
    limits = [value for value in record.curves.get("train/max_grad_norm", {}).values() if math.isfinite(value)]
    if not limits or (share := statistics.fmean(shares)) <= CLIPPED_SHARE:
        return []
    norm = statistics.median(norms)
    if norm <= CLIPPED_NORM * limits[-1]:
        return []
    text = (
        f"{share:.0%} of the steps are clipped, to {limits[-1]:g} from a median of {norm:.3g} (up to {CLIPPED_NORM:g}"
        f" times the limit is usual): raise --max_grad_norm to about {2 * norm:.2g}, or lower --learning_rate if the"
        " loss is unsteady"
    )
    return [Finding("clipped_too_often", text, tag, [], norm / limits[-1], CLIPPED_NORM)]


def check_skipped(record: Record) -> list[Finding]:
    """fp16 steps dropped too often."""
    tag = "train/skipped_steps"
    if tag not in record.curves:
        return []  # not fp16
    step, count = record.points(tag)[-1]
    if (share := count / step) <= SKIPPED_SHARE:
        return []
    text = (
        f"fp16 dropped {share:.0%} of the steps (up to {SKIPPED_SHARE:.0%} is usual), because gradients overflowed: use"
        " --mixed_precision bf16 or no"
    )
    return [Finding("skipped_too_often", text, tag, [], share, SKIPPED_SHARE)]


def check_distance(record: Record) -> list[Finding]:
    """Pretrained weights that are farther from where they began than they are long: nothing of them is left."""
    if "model_name_or_path" not in record.flags:
        raise CannotCheckError("no train_config.yaml beside the run")
    if not record.flags["model_name_or_path"]:
        return []  # random weights may go anywhere
    for name in record.measured_blocks():
        points = record.points(f"distance/{name}", unit="measurements since the run began")
        far = [(step, value) for step, value in points if value > DISTANCE]
        if far:
            step, value = far[0]
            text = (
                f"the weights of {name} are {value:.1f} times their own length away from where they began, from step"
                f" {step} on (up to {DISTANCE:g} is usual): nothing of the pretrained model is left. Lower"
                " --learning_rate, tenfold at first"
            )
            return [Finding("pretraining_lost", text, f"distance/{name}", [step], value, DISTANCE)]
    return []


def noise_scale(record: Record) -> float:
    """Return the batch, in texts, that would use the data as well: the simple noise scale over all measured steps.

    It grows as the model learns, so that a large one is no fault of a run. Both of its parts are averaged before they
    are divided (McCandlish et al., 2018, appendix A.1). Infinite where the texts' gradients have nothing in common.

    Raises:
        CannotCheckError: it was measured too seldom.
    """
    how = "--log_gradients_every, with several texts a step and without --label_contrast"
    scatter = record.values("gradient_noise/scatter", NOISE_MEASUREMENTS, "measurements", how)
    common = record.values("gradient_noise/common", NOISE_MEASUREMENTS, "measurements", how)
    return sum(scatter) / sum(common) if sum(common) > 0 else math.inf


def describe_batch(record: Record) -> str:
    """Return what the noise of gradients says of the size of a batch, in one line; "" if it was not measured."""
    try:
        scale, size = noise_scale(record), record.values("train/examples_per_step")[0]
    except CannotCheckError:
        return ""
    if not math.isfinite(scale):
        return f"gradient noise: the {size:.0f} texts of a step have nothing in common that could be told from noise"
    return f"gradient noise: a batch of about {max(1, scale):,.0f} texts would use the data as well (it has {size:.0f})"


def check_batch(record: Record) -> list[Finding]:
    """A batch whose texts all say the same."""
    scale, size = noise_scale(record), record.values("train/examples_per_step")[0]
    tag = "gradient_noise/scatter"
    if size > BATCH_ABOVE_NOISE * max(1.0, scale):
        text = (
            f"the texts of a step say the same: a batch of about {max(1, scale):,.0f} would use the data as well, and a"
            f" step has {size:.0f} (up to {BATCH_ABOVE_NOISE:.0f} times as much is usual). Lower"
            " --per_device_train_batch_size, and look for texts that repeat"
        )
        return [Finding("batch_too_large", text, tag, [], size / max(1.0, scale), BATCH_ABOVE_NOISE)]
    return []
