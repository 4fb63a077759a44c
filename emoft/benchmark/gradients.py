"""What --log_gradients_every costs: a training step with it and without it."""

import statistics

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.contenders import Contender
from emoft.benchmark.training import EMOFT, MEASURED, take_all_turns


def compare_gradients(config: BenchmarkConfig) -> Report:
    """Let both take turns at each batch size."""
    all_turns = take_all_turns(config, (EMOFT, MEASURED))
    costs = [costs_of(batch_size, contenders) for batch_size, (contenders, _) in all_turns.items()]
    return Report(format_costs(costs), {"costs": costs})


def costs_of(batch_size: int, contenders: dict[str, Contender]) -> dict[str, float]:
    """Return what measuring gradients costs at one batch size, as shares of a step that measures none.

    Turn by turn, since the steps of a turn have the same texts; the median over the turns.
    """
    pairs = zip(contenders[MEASURED].seconds, contenders[EMOFT].seconds, strict=True)
    cost = statistics.median(measured / plain - 1 for measured, plain in pairs)
    return {
        "batch_size": batch_size,
        "seconds_per_step": statistics.median(contenders[EMOFT].seconds),
        "every_step": cost,
        "every_100_steps": cost / 100,
    }


def format_costs(costs: list[dict[str, float]]) -> str:
    """Return the costs of measuring gradients as a table in Markdown."""
    lines = ["| batch | ms a step | at every step | at every 100th step |", "| ---: | ---: | ---: | ---: |"]
    for each in costs:
        lines.append(
            f"| {each['batch_size']} | {each['seconds_per_step'] * 1000:,.0f} | {each['every_step']:+.0%}"
            f" | {each['every_100_steps']:+.1%} |"
        )
    return "\n".join(lines)
