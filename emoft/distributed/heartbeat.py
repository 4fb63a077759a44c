"""A sign of life that all ranks of a run exchange every second, so that none waits for one that is gone."""

import os
import sys
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist

BEAT_SECONDS = 1.0
SILENCE_SECONDS = 30.0  # without a sign of life, after which a host or its link counts as lost
GRACE_SECONDS = 3.0  # in which the rank that failed can say why, before torchrun hears of the others' end


class Heartbeat:
    """A thread that exchanges signs of life, and ends this process if another rank is gone.

    The main thread may sit in a collective that never ends, out of Python's reach: so the process is ended at once,
    without cleaning up. Files are safe: they are written whole or not at all. torchrun, which hears of that, is left to
    its own time-outs.
    """

    def __init__(self, is_speaker: bool) -> None:
        """Begin. A speaker says so when the connection is lost; when a rank has failed, that one says why."""
        self.is_speaker = is_speaker
        # A group of its own, because the collectives of a group must have one order on all ranks.
        self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=SILENCE_SECONDS))
        self._leaving, self._failed = False, False
        self._lost = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def _beat(self) -> None:
        size = dist.get_world_size()
        while True:
            signs = torch.tensor([self._leaving, self._failed], dtype=torch.int64)
            began = time.monotonic()
            try:
                dist.all_reduce(signs, group=self._group)
            except Exception:  # gloo has one type for all that can happen to a connection
                if not self._failed:
                    self._end(time.monotonic() - began)
                return
            leaving, failed = signs.tolist()
            if failed:
                if not self._failed:
                    self._end(waited=0.0)
                return
            if leaving == size:
                return
            time.sleep(BEAT_SECONDS)

    def _end(self, waited: float) -> None:
        self._lost.set()
        if waited > SILENCE_SECONDS / 2 and self.is_speaker:
            text = f"no sign of life from another rank for {waited:.0f} seconds: is its host up, and the link to it?"
            # Below the bar, and not to the stream that is silenced.
            print(f"\n{os.path.basename(sys.argv[0])}: error: {text}", file=sys.__stderr__, flush=True)
        time.sleep(GRACE_SECONDS)
        os._exit(1)

    def has_lost_a_rank(self) -> bool:
        """Return whether another rank has failed; waits a moment for the news of it."""
        return self._lost.wait(2 * BEAT_SECONDS)

    def fail(self) -> None:
        """Tell the others that this rank has failed."""
        self._failed = True
        self._thread.join(2 * BEAT_SECONDS)

    def leave(self) -> None:
        """Wait until all ranks are done."""
        self._leaving = True
        self._thread.join()
