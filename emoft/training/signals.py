"""SIGINT, SIGTERM and SIGHUP: finish the step, save, then leave. A second SIGINT or SIGTERM leaves at once."""

import os
import signal
from types import FrameType, TracebackType

from emoft.distributed.world import World


class StopSignals:
    """While this context is open, the first of these signals is only noted, for the loop to ask for.

    SIGHUP comes when the terminal is closed or the connection to it is lost; what `nohup` starts ignores it, and goes
    on doing so.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.received: signal.Signals | None = None  # by any rank, as of the last `poll`: the same on all
        self._noted = 0  # by this one
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        numbers = [signal.SIGINT, signal.SIGTERM]
        if os.name == "posix" and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        for number in numbers:
            self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = number
        if self.world.launched:
            return  # Ctrl-C comes twice, from the terminal and from torchrun, which itself ends what takes too long
        for each in self._previous:
            # A terminal that is closed tells so twice, once itself and once by its shell.
            signal.signal(each, signal.SIG_DFL if each in (signal.SIGINT, signal.SIGTERM) else signal.SIG_IGN)

    def poll(self) -> signal.Signals | None:
        """Ask all ranks, and return a signal that one of them has received, if there is one; a collective."""
        number = self.world.highest(self._noted)
        self.received = signal.Signals(number) if number else None
        return self.received

    @property
    def name(self) -> str:
        """SIGINT, SIGTERM, SIGHUP, or nothing."""
        return self.received.name if self.received else ""

    @property
    def exit_code(self) -> int:
        """By the shell's custom 128 + number: 129 after SIGHUP, 130 SIGINT, 143 SIGTERM; 0 without a signal."""
        return 128 + self.received if self.received else 0
