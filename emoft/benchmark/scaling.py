"""How a step's time grows with the number of processes: measured on this machine, and modelled for many hosts."""

import os
import statistics
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.contenders import process_context, rank_environments
from emoft.benchmark.training import ALONE, TOGETHER, model_and_lengths, take_all_turns

EXCHANGED = 1 << 24  # values of the exchange whose bandwidth is measured: 64 MiB in float32
HOSTS = (1, 2, 4, 8, 16, 32, 64)


def compare_processes(config: BenchmarkConfig) -> Report:
    """Let one process and several take turns at each batch size, and set the model beside what was measured."""
    rows = []
    for batch_size, (contenders, _) in take_all_turns(config, (ALONE, TOGETHER)).items():
        alone, together = (contenders[kind].seconds for kind in (ALONE, TOGETHER))
        rows.append(efficiency(batch_size, config.processes, alone, together))
    gradient_bytes = 4 * sum(parameter.numel() for parameter in model_and_lengths(config)[0].parameters())
    exchange = measure_exchange(config.processes)
    link = config.link_gbit * 1e9 / 8
    return Report(
        format_scaling(rows, gradient_bytes, exchange, link),
        {"scaling": rows, "gradient_bytes": gradient_bytes, "exchange": exchange},
    )


def efficiency(batch_size: int, processes: int, alone: Sequence[float], together: Sequence[float]) -> dict[str, float]:
    """Return the efficiency of weak scaling: of as many examples a process on one process and on several.

    Args:
        batch_size: examples of each process in a step.
        processes: how many the several are.
        alone: seconds a step of one process, turn by turn.
        together: of several.
    """
    ratios = [one / several for one, several in zip(alone, together, strict=True)]
    return {
        "batch_size": batch_size,
        "processes": processes,
        "seconds_alone": statistics.median(alone),
        "seconds_together": statistics.median(together),
        "efficiency": statistics.median(ratios),
    }


def exchange_seconds(gradient_bytes: float, ranks: int, bandwidth: float) -> float:
    """Return the time of an all-reduce by a ring: each rank sends and receives 2 (R - 1) / R of all bytes.

    Patarasuk and Yuan, 2009. Latency is left out, which gradients of a hundred megabytes hide.

    Args:
        gradient_bytes: of all gradients.
        ranks: R.
        bandwidth: bytes per second that a rank can send while it receives as many.
    """
    return 2 * (ranks - 1) / ranks * gradient_bytes / bandwidth


def modelled_seconds(alone: float, gradient_bytes: float, ranks: int, bandwidth: float) -> float:
    """Return the time of a step of R ranks by a model: the exchange runs beside the backward pass, of 2/3 of a step.

    What does not fit beside it is waited for. Computation is taken to be as fast as on one rank.
    """
    return alone + max(0.0, exchange_seconds(gradient_bytes, ranks, bandwidth) - alone * 2 / 3)


def measure_exchange(processes: int) -> float:
    """Return the bandwidth of the exchange between processes of this machine, in the sense of `exchange_seconds`."""
    context = process_context()
    ours, theirs = context.Pipe()
    ranks = [
        context.Process(target=_exchange, args=(environment, theirs if number == 0 else None), daemon=True)
        for number, environment in enumerate(rank_environments(processes))
    ]
    for rank in ranks:
        rank.start()
    seconds: float = ours.recv()
    for rank in ranks:
        rank.join()
    return 2 * (processes - 1) / processes * 4 * EXCHANGED / seconds


def _exchange(environment: dict[str, str], pipe: Connection | None) -> None:
    os.environ.update(environment)
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    values, seconds = torch.zeros(EXCHANGED), []
    for _ in range(5):
        dist.barrier()
        started = time.perf_counter()
        dist.all_reduce(values)
        seconds.append(time.perf_counter() - started)
    if pipe:
        pipe.send(min(seconds))
    dist.destroy_process_group()


def format_scaling(rows: list[dict[str, float]], gradient_bytes: float, exchange: float, link: float) -> str:
    """Return what was measured, and what the model says of it and of many hosts, as tables in Markdown.

    Args:
        rows: of `efficiency`.
        gradient_bytes: of all gradients.
        exchange: bandwidth between the processes, of `measure_exchange`.
        link: bandwidth between hosts, in bytes per second.
    """
    lines = [
        f"gradients of {gradient_bytes / 1e6:,.0f} MB, {exchange / 1e9:.2f} GB/s measured between the processes",
        "",
        "| examples a process | processes | ms a step alone | together | efficiency | by the model |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        alone, ranks = row["seconds_alone"], int(row["processes"])
        model = alone / modelled_seconds(alone, gradient_bytes, ranks, exchange)
        lines.append(
            f"| {row['batch_size']} | {ranks} | {alone * 1000:,.0f} | {row['seconds_together'] * 1000:,.0f}"
            f" | {row['efficiency']:.0%} | {model:.0%} |"
        )
    heads = " | ".join(str(hosts) for hosts in HOSTS)
    lines += [
        "",
        f"The model, for hosts of one process each and a link of {link * 8 / 1e9:g} Gbit/s; efficiency:",
        "",
        f"| examples a process | {heads} |",
        "| ---: |" + " ---: |" * len(HOSTS),
    ]
    for row in rows:
        alone = row["seconds_alone"]
        shares = [alone / modelled_seconds(alone, gradient_bytes, hosts, link) for hosts in HOSTS]
        lines.append(f"| {row['batch_size']} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(lines)
