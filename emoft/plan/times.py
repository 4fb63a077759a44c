"""How long a run will take, from a few of its steps and of its evaluations, samples and writes."""

from collections.abc import Callable

from datasets import Dataset

from emoft import device as devices
from emoft.model.generation import sample_texts
from emoft.plan.disk import Disk
from emoft.plan.measured import Measured
from emoft.run.evaluation import can_classify, classify_rows, evaluate_rows
from emoft.run.setup import Setup
from emoft.run.timetable import Timetable

EVALUATED = 64  # texts, for the time of an evaluation


def times_of(setup: Setup, measured: Measured, disk: Disk) -> dict[str, float]:
    """Return the seconds of each part of a run, by what it is; measures those that are no steps.

    Raises:
        UserError: nothing can be written where the run will be.
    """
    config, text_model, done = setup.config, setup.text_model, setup.run_state.step
    timetable, device = Timetable(setup), setup.runtime.device
    times = {"start": measured.seconds_of_start + measured.seconds_of_first}
    times[f"{setup.steps_left:,} steps"] = setup.steps_left * measured.seconds_of_a_step(tokens_of_a_step(setup))
    if config.log_gradients_every:
        looks = timetable.looks_at_gradients(done)
        times[f"{looks:,} looks at the gradients"] = looks * measured.seconds_measuring
    parts = (("validation", timetable.evaluations(done), 1 + (done == 0)), ("test", 1, 1))
    for name, count, classified in parts:
        if name in setup.splits:
            rows = setup.splits[name]
            seconds = _seconds_of(setup, rows, lambda some: evaluate_rows(setup, some))
            times[f"{count} evaluations of {name}"] = count * seconds
            if can_classify(setup):
                share = len(text_model.text_format.labels)
                seconds = _seconds_of(setup, rows, lambda some: classify_rows(setup, some), share)
                times[f"emotions told of {name}"] = classified * seconds
    samples = timetable.rounds_of_samples(done)
    times[f"{samples:,} rounds of samples"] = samples * devices.seconds_of(
        lambda: sample_texts(text_model, config.seed), device
    )
    times["saving"] = disk.seconds_of_saving()
    return times


def tokens_of_a_step(setup: Setup) -> float:
    """Return the tokens of a step on average."""
    return float(setup.loader.lengths.sum()) / setup.loader.steps_per_epoch


def _seconds_of(setup: Setup, rows: Dataset, function: Callable[[Dataset], object], share: int = 1) -> float:
    """Return the seconds of a function of rows, from some of them: as many as take a second or two."""
    count = max(1, EVALUATED // share)
    while True:
        some = rows.select(range(min(count, len(rows))))
        seconds = devices.seconds_of(lambda: function(some), setup.runtime.device)  # noqa: B023
        if seconds > 0.5 or len(some) == len(rows):
            return seconds * len(rows) / len(some)
        count *= 4
