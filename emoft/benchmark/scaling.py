"""How a step's time grows with the number of processes: measured on this machine, and modelled for many hosts."""

import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

import torch
import torch.distributed as dist
from transformers import GPT2LMHeadModel

from emoft.benchmark.config import BenchmarkConfig, Report
from emoft.benchmark.contenders import process_context, rank_environments
from emoft.benchmark.training import ALONE, TOGETHER, model_and_lengths, take_all_turns
from emoft.device import choose_device

EXCHANGED = 1 << 24  # values of the exchange whose bandwidth is measured: 64 MiB in float32
HOSTS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Gradients:
    """Bytes of a model's gradients in float32, by when they are complete."""

    early: int  # in the course of the backward pass
    late: int  # at its end: of the embeddings

    @staticmethod
    def of(model: GPT2LMHeadModel) -> "Gradients":
        """Count them."""
        embeddings = (model.transformer.wte, model.transformer.wpe)
        late = 4 * sum(embedding.weight.numel() for embedding in embeddings)
        return Gradients(4 * sum(parameter.numel() for parameter in model.parameters()) - late, late)


def compare_processes(config: BenchmarkConfig) -> Report:
    """Let one process and several take turns at each batch size, and set the model beside what was measured."""
    rows = []
    for batch_size, (contenders, _) in take_all_turns(config, (ALONE, TOGETHER)).items():
        alone, together = (contenders[kind].seconds for kind in (ALONE, TOGETHER))
        rows.append(efficiency(batch_size, config.processes, alone, together))
    gradients = Gradients.of(model_and_lengths(config)[0])
    exchange = measure_exchange(config.processes)
    hides = choose_device(config.use_cpu).type != "cpu"
    for row in rows:
        one = row["seconds_alone"]
        row["modelled_efficiency"] = one / modelled_seconds(one, gradients, config.processes, exchange, hides)
    return Report(
        format_scaling(rows, gradients, exchange, config.link_gbit * 1e9 / 8),
        {"scaling": rows, "gradient_bytes": asdict(gradients), "exchange": exchange},
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


def modelled_seconds(alone: float, gradients: Gradients, ranks: int, bandwidth: float, hides: bool) -> float:
    """Return the time of a step of R ranks by a model; computation is taken to be as fast as on one rank.

    The backward pass, of 2/3 of a step, hides the exchange of gradients that are complete before its end. Those of the
    embeddings are not: the tied one is complete when both its uses, the head and the first layer, are.

    Args:
        alone: seconds of a step of one rank.
        gradients: what is exchanged.
        ranks: R.
        bandwidth: see `exchange_seconds`.
        hides: whether the exchange runs beside the computation. On a CPU it takes the same cores, and hides nowhere.
    """
    early = exchange_seconds(gradients.early, ranks, bandwidth)
    late = exchange_seconds(gradients.late, ranks, bandwidth)
    return alone + max(0.0, early - (alone * 2 / 3 if hides else 0.0)) + late


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


def format_scaling(rows: list[dict[str, float]], gradients: Gradients, exchange: float, link: float) -> str:
    """Return what was measured, and what the model says of it and of many hosts, as tables in Markdown.

    Args:
        rows: of `efficiency`, and what the model says.
        gradients: of the model.
        exchange: bandwidth between the processes, of `measure_exchange`.
        link: bandwidth between hosts, in bytes per second.
    """
    lines = [
        f"gradients of {(gradients.early + gradients.late) / 1e6:,.0f} MB, {gradients.late / 1e6:,.0f} MB of them"
        f" complete at the end of the backward pass only; {exchange / 1e9:.2f} GB/s measured between the processes",
        "",
        "| examples a process | processes | ms a step alone | together | efficiency | by the model |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        alone, ranks = row["seconds_alone"], int(row["processes"])
        lines.append(
            f"| {row['batch_size']} | {ranks} | {alone * 1000:,.0f} | {row['seconds_together'] * 1000:,.0f}"
            f" | {row['efficiency']:.0%} | {row['modelled_efficiency']:.0%} |"
        )
    heads = " | ".join(str(hosts) for hosts in HOSTS)
    lines += [
        "",
        f"The model, for hosts of one process each, a link of {link * 8 / 1e9:g} Gbit/s and an exchange that leaves the"
        " computing cores alone; efficiency:",
        "",
        f"| examples a process | {heads} |",
        "| ---: |" + " ---: |" * len(HOSTS),
    ]
    for row in rows:
        alone = row["seconds_alone"]
        shares = [alone / modelled_seconds(alone, gradients, hosts, link, hides=True) for hosts in HOSTS]
        lines.append(f"| {row['batch_size']} | " + " | ".join(f"{share:.0%}" for share in shares) + " |")
    return "\n".join(lines)
