"""torchrun: which rank this process is, its share of the data, and what all ranks do together.

Without torchrun there is one rank, and everything here returns at once what it was given.
"""

import contextlib
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # public, but not listed
from torch.distributed.rendezvous import rendezvous

from emoft.errors import UserError
from emoft.heartbeat import Heartbeat

# Of a collective. No rank waits so long for one that has died: the heartbeat ends it. But one that saves a large model
# or compiles for minutes is waited for.
PATIENCE = timedelta(days=1)
CPU = torch.device("cpu")
Value = TypeVar("Value")


@dataclass(frozen=True)
class World:
    """All processes of a run, as one of them sees it. Collectives are called by all ranks in the same order."""

    rank: int = 0  # of this process, among all; rank 0 writes the files
    size: int = 1  # how many there are
    local_rank: int = 0  # of this process, on its host
    launched: bool = False  # by torchrun
    hosts: int = 1  # on which torchrun was started
    restarts: int = 0  # of the run, by torchrun, after a failure

    @staticmethod
    def of_environment() -> "World":
        """Return what torchrun wrote into the environment; a world of one process without it."""
        if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return World()
        rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
        return World(rank, size, local_rank, True, hosts, restarts)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files, bars and event files."""
        return self.rank == 0

    def share(self, examples: Sequence[int], batch_size: int) -> list[list[int]]:
        """Return this rank's micro-batches of a batch that all ranks compute together.

        A batch of R x b examples is the same for R ranks as for a single one. Shares differ by one example at most,
        the first ranks have the larger ones; and all ranks have as many micro-batches, of which the last may be empty,
        since a collective belongs to each.

        Args:
            examples: of the batch, as indices into a split.
            batch_size: most examples in a micro-batch.
        """
        shares = np.array_split(np.asarray(examples, dtype=int), self.size)
        mine = shares[self.rank].tolist()
        count = -(-len(shares[0]) // batch_size)
        return [mine[number * batch_size : (number + 1) * batch_size] for number in range(count)]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, elementwise; on the device, without waiting for it."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def highest(self, number: int) -> int:
        """Return the highest of all ranks' numbers. By the CPU, so that no GPU is waited for."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX)
        return int(numbers)

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in their order, on all of them."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def on_main(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 only, and return its result on all ranks, which wait for it."""
        results: list[Any] = [function() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(results, src=0, device=CPU)
        return results[0]

    @contextlib.contextmanager
    def first_on_host(self) -> Iterator[None]:
        """Let one process of each host do what follows before the others, which then find it in the cache."""
        if self.local_rank > 0:
            self.highest(0)
        yield
        if self.local_rank == 0:
            self.highest(0)

    def read_alike(self, function: Callable[[], Value]) -> Value:
        """Return what a function returns that finds the same on all ranks, an error too, which rank 0 tells.

        Raises:
            UserError: on rank 0, the function's.
            SystemExit: on the others.
        """
        try:
            return function()
        except UserError:
            if self.is_main:
                raise
            sys.exit(2)

    @contextlib.contextmanager
    def only_main_speaks(self) -> Iterator[None]:
        """Keep all ranks but 0 silent, bars included. An error of theirs is printed after this context, by `errors`."""
        with contextlib.ExitStack() as stack:
            if not self.is_main:
                nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    @contextlib.contextmanager
    def connected(self) -> Iterator[None]:
        """Connect the ranks. If one of them fails, or its host or link does, all end within seconds.

        Raises:
            SystemExit: another rank failed; that one tells why.
        """
        if not self.launched:
            yield
            return
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        store = _meeting_place(next(rendezvous("env://"))[0], self.rank, self.size)
        dist.init_process_group(backend, store=store, rank=self.rank, world_size=self.size, timeout=PATIENCE)
        heartbeat = Heartbeat(is_speaker=self.local_rank == 0)
        try:
            yield
        except UserError:
            if not self.is_main:
                if heartbeat.has_lost_a_rank():
                    sys.exit(2)  # all of them found the same, and rank 0 tells it
                print(file=sys.__stderr__)  # end the line of rank 0's bar
            heartbeat.fail()
            raise
        except Exception:
            # A rank that has lost another one fails too, in whatever it was doing with it: only the other tells why.
            if heartbeat.has_lost_a_rank():
                sys.exit(1)
            heartbeat.fail()
            raise
        heartbeat.leave()
        dist.destroy_process_group()


def _meeting_place(store: Store, rank: int, size: int) -> Store:
    """Return a part of torchrun's store that holds nothing yet.

    The store outlives a restart, and with it the addresses of dead ranks, which the new ones would try to reach. Rank 0
    draws a name for the new part, and answers whoever asks for it by a name of their own that no dead rank had.
    """
    me = uuid.uuid4().hex
    if rank > 0:
        store.set(f"asking/{rank}", me)
        place = store.get(f"answer/{me}").decode()
        store.set(f"{place}/here/{rank}", "")
        return PrefixStore(place, store)
    waiting = set(range(1, size))
    while waiting:
        for other in [other for other in waiting if store.check([f"asking/{other}"])]:
            store.set(f"answer/{store.get(f'asking/{other}').decode()}", me)
        waiting -= {other for other in waiting if store.check([f"{me}/here/{other}"])}
        time.sleep(0.05)
    return PrefixStore(me, store)
