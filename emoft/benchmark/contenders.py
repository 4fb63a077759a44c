"""Contenders: each runs in a process of its own, a few steps whenever it is its turn."""

import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, SpawnContext
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from emoft.device import peak_memory, reset_peak_memory, synchronize
from emoft.errors import UserError


class Turns:
    """A contender's side of the turns: called at the start of each step, it waits there while it is others' turn."""

    def __init__(self, pipe: Connection | None, device: torch.device, steps: int, warmup_steps: int) -> None:
        self.pipe, self.device, self.steps = pipe, device, steps
        self.left = warmup_steps
        self.waits = True  # for its first turn
        self.started = 0.0

    def __call__(self) -> None:
        """Count a step; at the end of a turn report its seconds and peak memory, and wait for the next turn."""
        if self.pipe is None:  # not rank 0, which the others wait for
            return
        if self.left == 0:
            synchronize(self.device)
            self.pipe.send({"seconds": time.perf_counter() - self.started, "peak": peak_memory(self.device)})
            self.waits, self.left = True, self.steps
        if self.waits:
            self.pipe.recv()
            self.waits = False
            reset_peak_memory(self.device)
            self.started = time.perf_counter()
        self.left -= 1


def rank_environments(processes: int) -> list[dict[str, str]]:
    """Return what torchrun puts into the environment of each process of a host."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    meeting_place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
    return [{**meeting_place, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def process_context() -> SpawnContext | ForkServerContext:
    """Return how processes are started that share nothing but what they have imported.

    Importing the libraries takes seconds: where the system can fork, it is done once, in a server that computes
    nothing, and each process begins as a fork of that.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["emoft.benchmark.training"])
    return context


def run_logged(
    log: Path, rank: dict[str, str], run: Callable[..., None], pipe: Connection | None, *arguments: Any
) -> None:
    """Run in a process of its own, as a rank if it is told so; what it prints goes into a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(rank)
    tqdm.set_lock(threading.RLock())  # its own, between processes, would be left over by one that is killed
    run(pipe, *arguments)


class Contender:
    """The benchmark's side of a contender, which runs `run(pipe, *arguments)`."""

    def __init__(self, kind: str, folder: Path, run: Callable[..., None], *arguments: Any, processes: int = 1) -> None:
        self.kind = kind
        self.log = folder / f"{kind}.log"
        context = process_context()
        self.pipe, theirs = context.Pipe()
        ranks = rank_environments(processes) if processes > 1 else [{}]
        self.processes = [
            context.Process(target=run_logged, args=(self.log, rank, run, pipe, *arguments), daemon=True)
            for rank, pipe in zip(ranks, [theirs, *[None] * (len(ranks) - 1)], strict=True)
        ]
        for process in self.processes:
            process.start()
        theirs.close()
        self.seconds: list[float] = []
        self.peak: int | None = None

    def turn(self) -> dict[str, Any]:
        """Let it run a turn.

        Raises:
            UserError: the process has ended, with the last line that it printed.
        """
        try:
            self.pipe.send("go")
            result: dict[str, Any] = self.pipe.recv()
            return result
        except (EOFError, BrokenPipeError, ConnectionResetError):
            lines = self.log.read_text(errors="replace").strip().splitlines() if self.log.exists() else []
            raise UserError(f"{self.kind} ended: {lines[-1] if lines else 'without a word'}") from None

    def count(self, seconds: float, peak: int | None) -> None:
        """Add what a turn took."""
        self.seconds.append(seconds)
        self.peak = max(filter(None, (self.peak, peak)), default=None)

    def stop(self) -> None:
        """End the process, at once: asked to stop, a training would finish its step first, which is not its turn."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
