"""Checks of the learning rate: that it is what the flags say, and that steps are neither too large nor too small."""

import math
import statistics

from emoft.gradients.finding import Finding
from emoft.gradients.names import NO_UPDATE
from emoft.gradients.record import CannotCheckError, Record
from emoft.gradients.thresholds import (
    ACTIVATION_GROWTH,
    DIVERGED,
    ENTRIES,
    SCHEDULE_ERROR,
    UPDATE_JUMP,
    UPDATE_TOO_LARGE,
    UPDATE_TOO_SMALL,
    WEIGHT_GROWTH,
)
from emoft.training.schedule import count_warmup_steps, schedule_factor


def check_schedule(record: Record) -> list[Finding]:
    """A learning rate that is not what the flags say."""
    tag = "train/learning_rate"
    points = record.points(tag)
    flags, epochs = record.flags, dict(record.points("train/epoch"))
    if "learning_rate" not in flags:
        raise CannotCheckError("no train_config.yaml beside the run")
    highest = float(flags["learning_rate"])
    step, epoch = max((step, epochs[step]) for step in epochs if epochs[step] > 0)
    total = int(flags["max_steps"])
    if total <= 0:
        total = math.ceil(float(flags["num_train_epochs"]) * round(step / epoch))
    warmup = count_warmup_steps(float(flags["warmup_steps"]), total)

    def by_flags(step: int, rate: float) -> float:
        """Return the rate that the schedule may have come to, the nearest to the one logged.

        A step that was left out does not move the schedule on; of those since the entry before nobody knows when.
        """
        least, most = (
            sum(_last(record, name, until) for name in ("skipped_steps", "nonfinite_steps"))
            for until in (step, step + 1)
        )
        places = range(max(0, step - 1 - int(most)), max(0, step - 1 - int(least)) + 1)
        rates = [highest * schedule_factor(flags["lr_scheduler_type"], place, warmup, total) for place in places]
        return min(rates, key=lambda each: abs(each - rate))

    expected = {step: by_flags(step, rate) for step, rate in points}
    wrong = [(step, rate) for step, rate in points if abs(rate - expected[step]) > SCHEDULE_ERROR * highest]
    if not wrong:
        return []
    step, rate = wrong[0]
    asked = f"{flags['lr_scheduler_type']} from {highest:g}, {warmup} steps of warmup, {total} in all"
    text = (
        f"the learning rate is {rate:.2e} at step {step}, where the flags ({asked}) say {expected[step]:.2e}:"
        " schedule.step() is not called once a step, or somebody sets the rate"
    )
    name = "learning_rate_jumps" if _jumps(points, expected, step) else "schedule_not_followed"
    return [Finding(name, text, tag, [step for step, _ in wrong], rate, expected[step])]


def _jumps(points: list[tuple[int, float]], expected: dict[int, float], step: int) -> bool:
    """Whether the rate was right up to the entry before and is another by far from there on."""
    before = [(at, rate) for at, rate in points if at < step]
    if not before or not expected[step]:
        return False
    at, last = before[-1]
    ratio = next(rate for each, rate in points if each == step) / expected[step]
    return math.isclose(last, expected[at], rel_tol=0.05) and not 0.5 < ratio < 2


def _last(record: Record, name: str, step: int) -> float:
    curve = record.curves.get(f"train/{name}", {})
    return max((value for at, value in curve.items() if at < step), default=0.0)


def check_rate_too_high(record: Record) -> list[Finding]:
    """Steps so large that weights, activations or the loss run away."""
    losses = record.points("train/loss", ENTRIES, how="a smaller --logging_steps, or more steps")
    evidence: list[tuple[int, str, str, float, float]] = []  # step, text, tag, figure, threshold
    smooth = [statistics.median(loss for _, loss in losses[max(0, n - 1) : n + 2]) for n in range(len(losses))]
    lowest = [min(smooth[: n + 1]) for n in range(len(smooth))]
    rises = [n for n in range(len(smooth)) if smooth[n] > DIVERGED * lowest[n]]
    if rises:
        worst = max(rises, key=lambda n: smooth[n] / lowest[n])
        step, loss, low = losses[rises[0]][0], smooth[worst], lowest[worst]
        what = f"the loss rises from {low:.2f} to {loss:.2f} nats by step {losses[worst][0]}"
        evidence.append((step, what, "train/loss", loss / low, DIVERGED))
    for name in record.blocks:
        moves = [point for point in record.points(f"update_ratio/{name}") if point[1] > NO_UPDATE]
        large = [(step, move) for step, move in moves if move > UPDATE_TOO_LARGE]
        if len(large) > len(moves) / 2:
            step, move = large[0]
            what = f"each step changes the weights of {name} by {10**move:.0%} (log10 {move:.1f}, healthy is near -3)"
            evidence.append((step, what, f"update_ratio/{name}", move, UPDATE_TOO_LARGE))
    evidence += _growth(record, "weight_norm", WEIGHT_GROWTH, "weights")
    if not evidence:
        return []
    # By itself it says nothing: in a small model from random weights, activations may grow a hundredfold and be sound.
    evidence += _growth(record, "activation_norm", ACTIVATION_GROWTH, "activations at the output")
    by_tag = {tag.partition("/")[0]: each for each in sorted(evidence, reverse=True) for tag in [each[2]]}
    told = sorted(by_tag.values())
    step, _, tag, figure, threshold = told[0]
    text = (
        f"the learning rate is too high, seen from step {step} on: {'; '.join(what for _, what, *_ in told)}. Lower"
        " --learning_rate, tenfold at first, or raise --warmup_steps"
    )
    return [Finding("learning_rate_too_high", text, tag, [step], figure, threshold)]


def _growth(record: Record, kind: str, limit: float, what: str) -> list[tuple[int, str, str, float, float]]:
    """Return the blocks in which a norm has grown beyond a limit, as evidence."""
    found = []
    for name in record.blocks:
        tag = f"{kind}/{name}"
        points = [(step, value) for step, value in sorted(record.curves.get(tag, {}).items()) if value > 0]
        if len(points) < 2:
            continue
        first = points[0][1]
        step = next((step for step, value in points if value > limit * first), None)
        if step is not None:
            last = points[-1][1]
            text = (
                f"the {what} of {name} grow from a norm of {first:.3g} to {last:.3g} (up to {limit:g} times is usual)"
            )
            found.append((step, text, tag, last / first, limit))
    return found


def check_rate_too_low(record: Record) -> list[Finding]:
    """Steps that hardly move the weights."""
    moves = {
        name: statistics.median(values)
        for name in record.measured_blocks()
        if (values := [v for v in record.values(f"update_ratio/{name}", unit="measurements") if v > NO_UPDATE])
    }
    if not moves:
        return []
    middle = statistics.median(moves.values())
    if middle >= UPDATE_TOO_SMALL:
        return []
    text = (
        f"the steps are too small: each changes the weights by {10**middle:.5%} (log10 {middle:.1f}, healthy is near"
        f" -3, below {UPDATE_TOO_SMALL:g} is too little). Raise --learning_rate"
    )
    tag = f"update_ratio/{min(moves, key=lambda name: moves[name])}"
    return [Finding("learning_rate_too_low", text, tag, figure=middle, threshold=UPDATE_TOO_SMALL)]


def check_update_jumps(record: Record) -> list[Finding]:
    """Updates that become much larger or smaller from one measurement to the next, more than the schedule does."""
    blocks = record.measured_blocks(3)
    rates = record.curves.get("train/learning_rate", {})
    moves = [record.curves.get(f"update_ratio/{name}", {}) for name in blocks]
    middles = {
        step: statistics.median(each.get(step, NO_UPDATE) for each in moves) for step in sorted(set().union(*moves))
    }
    points = [(step, move) for step, move in middles.items() if move > NO_UPDATE]
    for (earlier, before), (step, after) in zip(points, points[1:], strict=False):
        by_schedule = math.log10(rate_at(rates, step) / rate_at(rates, earlier)) if rates else 0.0
        jump = after - before - by_schedule
        if min(abs(jump), abs(after - before)) > UPDATE_JUMP:
            text = (
                f"from step {earlier} to {step} the updates become {10 ** abs(jump):,.0f} times as"
                f" {'large' if jump > 0 else 'small'} (log10 {before:.1f} to {after:.1f}; the schedule explains"
                f" {by_schedule:+.1f}): somebody changed the optimizer's learning rate, or gradients stopped coming"
            )
            return [Finding("learning_rate_jumps", text, f"update_ratio/{blocks[0]}", [step], abs(jump), UPDATE_JUMP)]
    return []


def rate_at(rates: dict[int, float], step: int) -> float:
    """Return the learning rate at a step, on a line between the log entries around it; never quite 0."""
    before = max((at for at in rates if at <= step), default=min(rates))
    after = min((at for at in rates if at >= step), default=max(rates))
    share = (step - before) / (after - before) if after > before else 0.0
    return max(rates[before] + share * (rates[after] - rates[before]), 1e-12)


def check_warmup(record: Record) -> list[Finding]:
    """A start without warmup that the loss or the weights do not stand."""
    if "warmup_steps" not in record.flags:
        raise CannotCheckError("no train_config.yaml beside the run")
    if float(record.flags["warmup_steps"]) > 0:
        return []
    losses = record.points("train/loss", ENTRIES, how="a smaller --logging_steps, or more steps")
    early = losses[: max(3, len(losses) // 5)]
    highest = max(range(len(early)), key=lambda n: early[n][1])
    if highest == 0 or early[highest][1] < DIVERGED * min(loss for _, loss in early[:highest]):
        return []
    step, loss = early[highest]
    text = (
        f"the loss rises to {loss:.2f} nats at step {step}, before it falls: the first steps are too large. Begin"
        " gently, by --warmup_steps 0.1"
    )
    return [Finding("no_warmup", text, "train/loss", [step], loss, early[0][1])]
