"""SIGINT and SIGTERM: finish the step, save, then leave. A second signal leaves at once."""

import signal
from types import FrameType, TracebackType

from emoft.distributed.world import World


class StopSignals:
    """While this context is open, the first SIGINT or SIGTERM is only noted, for the loop to ask for."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.received: signal.Signals | None = None  # by any rank, as of the last `poll`: the same on all
        self._noted = 0  # by this one
        self._previous: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopSignals":
        for number in (signal.SIGINT, signal.SIGTERM):
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
            signal.signal(each, signal.SIG_DFL)

    def poll(self) -> signal.Signals | None:
        """Ask all ranks, and return a signal that one of them has received, if there is one; a collective."""
        number = self.world.highest(self._noted)
        self.received = signal.Signals(number) if number else None
        return self.received

    @property
    def name(self) -> str:
        """SIGINT, SIGTERM, or nothing."""
        return self.received.name if self.received else ""

    @property
    def exit_code(self) -> int:
        """130 after SIGINT, 143 after SIGTERM, by the shell's custom of 128 + number; 0 without a signal."""
        return 128 + self.received if self.received else 0
