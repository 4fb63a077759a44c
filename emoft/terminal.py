"""What is shown while something runs: bars on a terminal, plain lines in a log file.

Both go to standard error. On a terminal a bar is redrawn in its line, for the width that the window has; nothing stays
of it but the last state of a training. A log file or a pipe gets no bar and no carriage return: a line for each log
entry of a training, and of anything else that takes long a line soon after its start and one every half a minute.
"""

import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TextIO, TypeVar

from tqdm import tqdm

from emoft.errors import bar_opened, close_bars

DELAY_SECONDS = 1.0  # what is over sooner shows nothing: it would only flash
REDRAW_SECONDS = 0.2
SILENCE_SECONDS = 30.0  # between two lines in a log file
SHORTEST_BAR = 5  # cells; in a narrower window the figures stand alone
MARGIN = 2  # cells at the right edge: there a terminal writes ^C, which must not begin another line
ERASE = "\x1b[K"  # what stands to the right of the cursor
ENTRIES = 5  # of a training's log, over which the time of a step is averaged
Item = TypeVar("Item")


def say(text: str) -> None:
    """Print what a run has found out, above the bars, at once."""
    tqdm.write(text)
    sys.stdout.flush()


def progress(items: Iterable[Item], label: str, unit: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items, and show how many of them are done; see `Bar`."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(label, unit, total) as bar:
        yield from bar.over(items)


class Bar:
    """Shows how far something is while this context is open, if that lasts longer than a moment.

    A thread of its own shows it, so that it lives while a single call takes long too.
    """

    def __init__(self, label: str, unit: str = "", total: int | None = None) -> None:
        """Prepare it.

        Args:
            label: what is being done, as in "Reading train.csv".
            unit: what is counted, in the plural; "B" for bytes. Without one no count is shown.
            total: how many there are; if nobody knows, the time is shown that it has taken.
        """
        self.label, self.unit, self.total = label, unit, total
        self.done = 0
        self.note = ""  # what it is at, shown beside the count
        self._stream = sys.stderr
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._show, name=label, daemon=True)

    def __enter__(self) -> "Bar":
        self._started = time.monotonic()
        bar_opened(self._end)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_bars(self._end)

    def advance(self, count: int = 1) -> None:
        """Count what has been done since the last call."""
        self.done += count

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield items, and count each when the next one is asked for."""
        for item in items:
            yield item
            self.advance()

    def _end(self) -> None:
        self._ended.set()
        self._thread.join()

    def _figures(self) -> list[str]:
        seconds, done = time.monotonic() - self._started, self.done
        if not self.total:
            return [f"{done:,} {self.unit}"] * bool(self.unit) + [clock(seconds)]
        count, total = (tqdm.format_sizeof(n, "B") if self.unit == "B" else f"{n:,}" for n in (done, self.total))
        counted = f"{count}/{total} {self.unit.removeprefix('B')}".strip() if self.unit else ""
        left = f"{clock(seconds * (self.total - done) / done)} left" if done else ""
        return [text for text in (counted, self.note, left) if text]

    def _show(self) -> None:
        if not self._ended.wait(DELAY_SECONDS):
            (self._draw if _shows_bars(self._stream) else self._log)()

    def _draw(self) -> None:
        def layout(width: int) -> str:
            return _layout(width, self.label, self._figures(), has_bar=bool(self.total))

        with _Line(layout, self._stream, self.total, initial=self.done, leave=False) as line:
            while not self._ended.wait(REDRAW_SECONDS):
                line.update(self.done - line.n)

    def _log(self) -> None:
        while True:
            print(f"{self.label} ... {'  '.join(self._figures())}", file=self._stream, flush=True)
            if self._ended.wait(SILENCE_SECONDS):
                return


class TrainingBar:
    """How far a training is: a bar whose last state stays, or a line in the log file for each log entry."""

    def __init__(self, total_steps: int, step: int, seconds: float) -> None:
        """Show it.

        Args:
            total_steps: optimizer steps of the whole training.
            step: the last one that is done already.
            seconds: of training, which they took.
        """
        self.total_steps, self.step = total_steps, step
        self._entries = deque([(step, seconds)], maxlen=ENTRIES + 1)
        self._seconds, self._seconds_per_step = seconds, 0.0
        self._logged: list[str] = []  # of the last log entry
        self._beside: list[str] = []  # likewise, where there is room
        self._line = None
        if _shows_bars(sys.stderr):
            self._line = _Line(self._layout, sys.stderr, total_steps, initial=step, leave=True)
        bar_opened(self._end)

    def advance(self, seconds: float) -> None:
        """Count a step.

        Args:
            seconds: of training until now, without those that evaluations, samples and checkpoints took.
        """
        self.step += 1
        step, before = self._entries[0]
        self._seconds_per_step = (seconds - before) / (self.step - step)
        self._seconds = seconds
        if self._line is not None:
            self._line.update()

    def log(
        self,
        loss: float,
        samples_per_second: float,
        tokens_per_second: float,
        share_of_peak: float,
        learning_rate: float | None = None,
    ) -> None:
        """Show a log entry: rates of the steps since the last one."""
        self._entries.append((self.step, self._seconds))
        shown_loss, rate = f"loss {loss:.3f}", f"{_short(samples_per_second)} samples/s"
        beside = [] if learning_rate is None else [f"learning rate {learning_rate:.1e}"]
        self._logged = [shown_loss, rate]
        self._beside = [f"{_short(tokens_per_second)} tokens/s", f"{share_of_peak:.0%} of peak", *beside]
        if self._line is not None:
            self._line.refresh()
            return
        figures = [f"step {self.step}/{self.total_steps}", shown_loss, *beside, rate, self._left()]
        print("  ".join(figures), file=sys.stderr, flush=True)

    def close(self) -> None:
        """End the bar's line, so that what is printed stands below it."""
        close_bars(self._end)

    def _end(self) -> None:
        if self._line is not None:
            self._line.close()

    def _left(self) -> str:
        return f"{clock((self.total_steps - self.step) * self._seconds_per_step)} left"

    def _layout(self, width: int) -> str:
        figures = [f"{self.step}/{self.total_steps}"]
        if self._logged:
            return _layout(width, "Training", [*figures, *self._logged, self._left()], self._beside)
        if self._seconds_per_step:
            figures += [f"{_short(1 / self._seconds_per_step)} steps/s", self._left()]
        return _layout(width, "Training", figures)


class _Line(tqdm):  # type: ignore[type-arg]  # it takes one in the stubs only
    """A bar whose text is made for the width of the terminal whenever it is drawn."""

    def __init__(self, layout: Callable[[int], str], stream: Any, total: int | None, **options: Any) -> None:
        self._text_for = layout
        super().__init__(total=total, file=stream, ncols=80, nrows=24, mininterval=0.1, miniters=0, **options)

    @property
    def format_dict(self) -> Any:
        """What tqdm draws from; overriding it is the way to a format of one's own that its README names."""
        width = max(1, _columns(self.fp) - 1 - MARGIN)
        return {**super().format_dict, "ncols": width, "bar_format": self._text_for(width)}

    @staticmethod
    def status_printer(file: Any) -> Callable[[str], None]:
        """Return what writes a line over the one that stands there.

        tqdm's own covers what it has written with blanks: not a ^C, and too many where the window is narrower now.
        """

        def print_status(line: str) -> None:
            file.write(f"\r{line}{ERASE}")
            file.flush()

        return print_status


def _shows_bars(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb"  # which cannot go back in what it shows


def _columns(stream: TextIO) -> int:
    """Return how wide a terminal is, now; 80 where it does not tell, as one that is made by a program may not."""
    try:
        return os.get_terminal_size(stream.fileno()).columns or 80
    except (OSError, ValueError):
        return 80


def _layout(width: int, label: str, figures: list[str], beside: Iterable[str] = (), has_bar: bool = True) -> str:
    """Return the format of a bar: all figures, and of those beside them as many as there is room for.

    Where the window is too narrow, first the bar goes, then the label, then one figure after another.
    """
    if len(label) > width // 2:
        label = label[: width // 2 - 3] + "..."
    around = len(f"{label} 100% || ") + SHORTEST_BAR
    text = "  ".join(figures)
    for figure in beside:
        if around + len(f"{text}  {figure}") > width:
            break
        text += f"  {figure}"
    if has_bar and around + len(text) <= width:
        return f"{_escaped(label)} {{percentage:3.0f}}% |{{bar}}| {_escaped(text)}"
    texts = [f"{label} {text}", *("  ".join(figures[first:]) for first in range(len(figures)))]
    return _escaped(next((text for text in texts if len(text) <= width), texts[-1]))


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def clock(seconds: float) -> str:
    """Return a time as 1:02 or 1:00:02."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _short(number: float) -> str:
    """Return a number to three digits at least, and without an exponent."""
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"
