import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from emoft.distributed.world import World
from emoft.training.signals import StopSignals


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_is_noted_and_the_handlers_come_back(number: signal.Signals, code: int) -> None:
    before = signal.getsignal(number)
    with StopSignals(World()) as signals:
        assert (signals.poll(), signals.exit_code) == (None, 0)
        os.kill(os.getpid(), number)
        assert signals.poll() == number
        assert (signals.received, signals.exit_code) == (number, code)
    assert signal.getsignal(number) is before


def test_the_second_ends_at_once() -> None:
    code = """
import os, signal
from emoft.distributed.world import World
from emoft.training.signals import StopSignals
with StopSignals(World()):
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60)
    assert done.returncode == -signal.SIGTERM
