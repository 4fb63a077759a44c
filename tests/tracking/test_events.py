"""An event file that cannot be written ends no run, and is told of in a line."""

from pathlib import Path

from conftest import ROOT

from emoft.config import TrainConfig
from emoft.tracking.events import EventFile

FULL_AT_THE_END = f"""
import resource, sys
from pathlib import Path
sys.path.insert(0, {str(ROOT)!r})
from emoft.config import TrainConfig
from emoft.tracking.events import EventFile
events = EventFile(Path("runs"), TrainConfig(), is_wanted=True, warn=print)
events.open(0)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
events.add_text("samples/joy", "x" * 20_000, 1)
events.close()
"""


def test_in_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    told: list[str] = []
    events = EventFile(tmp_path / "file" / "runs", TrainConfig(), is_wanted=True, warn=told.append)
    for step in (0, 5):
        events.open(step)
        events.add_scalars({"train/loss": 1.0}, step + 1)
    events.close()
    assert len(told) == 2, "once whenever it was tried"
    assert all("cannot be written (Not a directory); training goes on" in line for line in told)


def test_the_thread_may_end_after_the_file_is_closed(run, tmp_path: Path) -> None:
    """Its last words come whenever it is its turn."""
    late = "import time\n"
    late += "from tensorboard.summary.writer import event_file_writer as writer\n"
    late += "run = writer._AsyncWriterThread.run\n"
    late += (
        "def slow(self):\n    try:\n        run(self)\n    except OSError:\n        time.sleep(0.5)\n        raise\n"
    )
    late += "writer._AsyncWriterThread.run = slow\n"
    (tmp_path / "full.py").write_text(late + FULL_AT_THE_END + "time.sleep(1)\n")
    result = run(str(tmp_path / "full.py"))
    assert (len(result.out.splitlines()), result.err) == (1, "")


def test_on_a_disk_that_is_full_when_it_is_closed(run, tmp_path: Path) -> None:
    (tmp_path / "full.py").write_text(FULL_AT_THE_END)
    result = run(str(tmp_path / "full.py"))
    (line,) = result.out.splitlines()
    assert line.startswith("the event file in runs cannot be written (File too large)")
    assert result.err == "", "no traceback of TensorBoard's thread"
