"""torchrun: which rank this process is, its share of the data, and what all ranks do together.

Without torchrun there is one rank, and everything here returns at once what it was given.
"""

import atexit
import contextlib
import os
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, ProcessGroup, Store  # type: ignore[attr-defined]  # public, but not listed
from torch.distributed.rendezvous import rendezvous

from emoft.device import backend
from emoft.distributed.heartbeat import Heartbeat
from emoft.errors import UserError

# How long a rank waits in a collective. For one that has died it never waits so long: the heartbeat ends it. These are
# for ranks that live but do not come, since they call other collectives, or hang in a device.
FIRST_STEP = timedelta(minutes=30)  # before it is done: kernels are loaded, and compiled
LATER_STEPS = timedelta(minutes=10)
PATIENCE = timedelta(days=1)  # of the CPUs, for what one rank does alone, such as to save or upload a large model
MEETING_SECONDS = 300.0  # in which all ranks must have come together: imports may be slow on some hosts
BEGUN = "emoft/begun"  # a key of torchrun's store
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
    store: Store | None = None  # torchrun's, once connected; it outlives the processes that torchrun starts anew
    cpus: ProcessGroup | None = None  # by which the ranks talk without their devices, once connected

    @staticmethod
    def of_environment() -> "World":
        """Return what torchrun wrote into the environment; a world of one process without it."""
        if "LOCAL_RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
            return World()
        rank, size, local_rank = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        hosts = int(os.environ.get("GROUP_WORLD_SIZE", 1))
        return World(rank, size, local_rank, True, hosts)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes files, bars and event files."""
        return self.rank == 0

    def begin_run(self) -> None:
        """Let the processes that torchrun may start in place of these know that the run is in its folder."""
        if self.store:
            self.store.set(BEGUN, "")

    def has_begun_run(self) -> bool:
        """Whether earlier processes of this same launch by torchrun have begun the run, and then failed.

        torchrun's own count of restarts does not tell: it differs between hosts, and grows if processes fail that had
        not begun anything.
        """
        return self.store is not None and self.store.check([BEGUN])

    def share(self, examples: Sequence[int], batch_size: int) -> list[list[int]]:
        """Return this rank's micro-batches of a batch that all ranks compute together.

        A batch of R x b examples is the same for R ranks as for a single one. Shares differ by one example at most,
        the first ranks have the larger ones; and all ranks have as many micro-batches, of which the last may be empty,
        since a collective belongs to each.

        Args:
            examples: of the batch, as indices into a split.
            batch_size: most examples in a micro-batch.
        """
        least, larger = divmod(len(examples), self.size)
        start = self.rank * least + min(self.rank, larger)
        mine = list(examples[start : start + least + (self.rank < larger)])
        count = -(-(least + (larger > 0)) // batch_size)
        return [mine[number * batch_size : (number + 1) * batch_size] for number in range(count)]

    def sum(self, values: Tensor) -> Tensor:
        """Return the sum over all ranks, elementwise; on the device, without waiting for it."""
        if self.size > 1:
            values = values.clone()
            dist.all_reduce(values)
        return values

    def first_step_is_done(self) -> None:
        """Wait less long from now on: what is done once has been done."""
        if dist.is_initialized() and dist.group.WORLD:
            dist.group.WORLD.set_timeout(LATER_STEPS)

    def highest(self, number: int) -> int:
        """Return the highest of all ranks' numbers. By the CPU, so that no GPU is waited for."""
        if self.size == 1:
            return number
        numbers = torch.tensor(number)
        dist.all_reduce(numbers, op=dist.ReduceOp.MAX, group=self.cpus)
        return int(numbers)

    def gather(self, value: Value) -> list[Value]:
        """Return the values of all ranks, in their order, on all of them."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, group=self.cpus)
        return values

    def on_main(self, function: Callable[[], Value]) -> Value:
        """Call a function on rank 0 only, and return its result on all ranks, which wait for it."""
        results: list[Any] = [function() if self.is_main else None]
        if self.size > 1:
            dist.broadcast_object_list(results, src=0, device=CPU, group=self.cpus)
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
        """Return what a function returns that finds the same on all ranks of a host, an error too, which one tells.

        Raises:
            UserError: on the first rank of each host, the function's: hosts may differ.
            SystemExit: on the others.
        """
        try:
            return function()
        except UserError:
            if self.local_rank == 0:
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
    def connected(self) -> Iterator["World"]:
        """Connect the ranks, and give the connected world. If a rank fails, or its host or link, all end in seconds.

        Raises:
            UserError: not all ranks could be reached.
        """
        if not self.launched:
            yield self
            return
        try:
            with self._meeting():
                launch_store = next(rendezvous("env://"))[0]
                store = _meeting_place(launch_store, self.rank, self.size)
                dist.init_process_group(
                    backend(), store=store, rank=self.rank, world_size=self.size, timeout=FIRST_STEP
                )
                cpus = dist.new_group(backend="gloo", timeout=PATIENCE)
                heartbeat = Heartbeat(is_speaker=self.local_rank == 0)
        except RuntimeError as error:
            _leave_without_finalizing(2)
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(
                f"rank {self.rank} of {self.size} cannot reach the others ({reason}): see what the other hosts printed,"
                " and whether the link to them is up"
            ) from None
        try:
            yield replace(self, store=launch_store, cpus=cpus)
        except UserError:
            if not self.is_main:
                if heartbeat.has_lost_a_rank():
                    _leave(2)  # all of them found the same, and rank 0 tells it
                print(file=sys.__stderr__)  # end the line of rank 0's bar
            heartbeat.fail()
            _leave_without_finalizing(2)
            raise
        except Exception:
            # A rank that has lost another one fails too, in whatever it was doing with it: only the other tells why.
            if heartbeat.has_lost_a_rank():
                _leave(1)
            heartbeat.fail()
            _leave_without_finalizing(1)
            raise
        heartbeat.leave()
        dist.destroy_process_group()

    @contextlib.contextmanager
    def _meeting(self) -> Iterator[None]:
        """End this process if what follows takes too long. It waits where no exception reaches it."""

        def give_up() -> None:
            if self.local_rank == 0:
                text = f"after {MEETING_SECONDS:.0f} seconds not all {self.size} processes are there"
                print(
                    f"{os.path.basename(sys.argv[0])}: error: {text}: see what the others printed, and that each host"
                    " runs the same command",
                    file=sys.__stderr__,
                    flush=True,
                )
            os._exit(2)

        timer = threading.Timer(MEETING_SECONDS, give_up)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()


def _leave_without_finalizing(code: int) -> None:
    """Let this process end at once when it is about to: threads of gloo's would abort an interpreter that finalizes.

    They still hold what they were to give back to Python, for a rank that failed leaves its collectives unfinished.
    """
    atexit.register(_leave, code)


def _leave(code: int) -> None:
    for stream in (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()  # type: ignore[union-attr]
    os._exit(code)


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
