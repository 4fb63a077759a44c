"""Checks of how the loss goes, in training and in evaluation."""

import statistics

from emoft.gradients.finding import Finding, list_steps
from emoft.gradients.record import CannotCheckError, Record
from emoft.gradients.thresholds import (
    ALREADY_GOOD,
    ENTRIES,
    EVALUATION_RISE,
    LEAST_FALL,
    SPIKE_DEVIATIONS,
    SPIKE_RISE,
    SPIKE_WINDOW,
    STILL_FALLING,
)

MORE_ENTRIES = "a smaller --logging_steps, or more steps"


def check_fall(record: Record) -> list[Finding]:
    """A loss that does not fall, or not below what word frequencies alone reach."""
    losses = record.values("train/loss", ENTRIES, how=MORE_ENTRIES)
    part = max(2, len(losses) // 10)
    first, last = statistics.median(losses[:part]), statistics.median(losses[-part:])
    entropy = record.values("train/unigram_entropy")
    if not last < first * (1 - LEAST_FALL):
        if max(first, last) < entropy[-1] * ALREADY_GOOD:
            raise CannotCheckError("it began far below that, and nobody knows how much there is left to learn")
        text = (
            f"the loss does not fall: {first:.2f} nats in the beginning, {last:.2f} at the end (at least"
            f" {LEAST_FALL:.0%} less is expected). Check --learning_rate, that --template puts the text where it"
            " belongs, and that labels are shifted by one"
        )
        return [Finding("loss_does_not_fall", text, "train/loss", figure=last, threshold=first * (1 - LEAST_FALL))]
    if last >= entropy[-1]:
        fifth = max(2, len(losses) // 5)
        if last < statistics.median(losses[-3 * fifth : -2 * fifth]) * (1 - STILL_FALLING):
            raise CannotCheckError("the loss still falls, and is not yet below that of word frequencies: train longer")
        text = (
            f"the loss is {last:.2f} nats at the end, no better than knowing how frequent each token is"
            f" ({entropy[-1]:.2f}): the context is not used. Train longer; if it stays, check that each label is the"
            " next token (shifted by one, not two)"
        )
        return [Finding("context_not_used", text, "train/loss", figure=last, threshold=entropy[-1])]
    return []


def check_overfitting(record: Record) -> list[Finding]:
    """An evaluation loss that rises while the training loss falls."""
    evaluations = record.points("eval/loss", 2, "evaluations", "--validation_file and --eval_steps")
    losses = dict(record.points("train/loss"))
    best_step, best = min(evaluations, key=lambda each: each[1])
    last_step, last = evaluations[-1]
    before, after = _nearest(losses, best_step), _nearest(losses, last_step)
    if not (last > best * (1 + EVALUATION_RISE) and after < before):
        return []
    text = (
        f"overfitting: the evaluation loss rose from {best:.3f} at step {best_step} to {last:.3f} at step"
        f" {last_step} (by {last / best - 1:.0%}, {EVALUATION_RISE:.0%} is the limit), while the training loss fell"
        f" from {before:.3f} to {after:.3f}. Keep the best model (--load_best_model_at_end), train fewer epochs, or add"
        " --early_stopping_patience"
    )
    limit = best * (1 + EVALUATION_RISE)
    return [Finding("overfitting", text, "eval/loss", [best_step, last_step], last, limit)]


def check_spikes(record: Record) -> list[Finding]:
    """Log entries whose loss stands far above those before."""
    points = record.points("train/loss", ENTRIES, how=MORE_ENTRIES)
    losses = [loss for _, loss in points]
    spikes = []
    for number in range(5, len(losses)):
        window = losses[max(0, number - SPIKE_WINDOW) : number]
        median = statistics.median(window)
        deviation = 1.4826 * statistics.median(abs(value - median) for value in window)  # of a normal distribution
        limit = median + max(SPIKE_DEVIATIONS * deviation, SPIKE_RISE * median)
        if losses[number] > limit:
            spikes.append((points[number][0], losses[number], limit))
    if not spikes:
        return []
    steps, (_, loss, limit) = [step for step, _, _ in spikes], spikes[0]
    text = (
        f"the loss jumps at {list_steps(steps)}: {loss:.2f} nats, where up to {limit:.2f} is usual."
        f" {_hardest_text(record) or 'Look for a text among those of these steps that is unlike the others (--step)'},"
        " and lower --learning_rate"
    )
    return [Finding("loss_spikes", text, "train/loss", steps, loss, limit)]


def _hardest_text(record: Record) -> str:
    """Name the text that the model predicts worst in the highest spike that the run has kept; "" if it kept none."""
    kept = [each for each in record.spikes if isinstance(each.get("losses"), list) and each["losses"]]
    if not kept:
        return ""
    spike = max(kept, key=lambda each: each["loss"])
    worst = spike["losses"].index(max(spike["losses"]))
    return (
        f"Look at row {spike['examples'][worst]} of train, {str(spike['texts'][worst])[:60]!r}, which takes"
        f" {spike['losses'][worst]:.2f} nats after step {spike['step']} (spike-{spike['step']}.json)"
    )


def _nearest(curve: dict[int, float], step: int) -> float:
    return curve[min(curve, key=lambda each: abs(each - step))]
