"""What a run will write, and the disk that it will be written to."""

import os
import shutil
import tempfile
import time
from pathlib import Path

from emoft.errors import UserError
from emoft.run.setup import Setup
from emoft.run.timetable import Timetable

WRITTEN = 64 << 20  # bytes, for the rate of the disk


class Disk:
    """What a run needs of the disk, in bytes, and what there is."""

    def __init__(self, setup: Setup) -> None:
        self.output_dir = setup.output_dir
        self.of_model = sum(p.numel() * 4 for p in setup.text_model.model.parameters())
        self.of_checkpoint = 3 * self.of_model  # with AdamW's two moments
        self.checkpoints = Timetable(setup).checkpoints(setup.run_state.step)  # that are written at most
        self.kept = min(self.checkpoints, setup.config.save_total_limit or self.checkpoints)
        # A new one is written before an old one is deleted.
        self.most = self.of_checkpoint * (self.kept + (self.checkpoints > self.kept)) + self.of_model
        self.free = free_disk(self.output_dir)

    @property
    def has_room(self) -> bool:
        """Whether all fits."""
        return self.most < self.free

    def seconds_of_saving(self) -> float:
        """Return the seconds that all checkpoints and the model take; measured by writing a file that goes again.

        Raises:
            UserError: nothing can be written.
        """
        written = self.checkpoints * self.of_checkpoint + self.of_model
        return written / disk_rate(self.output_dir)


def disk_rate(output_dir: Path) -> float:
    """Return the bytes a second that can be written where the run will be.

    Raises:
        UserError: nothing can.
    """
    zeros = bytes(WRITTEN)
    try:
        with tempfile.TemporaryFile(dir=_existing(output_dir)) as file:
            started = time.perf_counter()
            file.write(zeros)
            file.flush()
            os.fsync(file.fileno())
            return WRITTEN / (time.perf_counter() - started)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error.strerror}): name another") from None


def free_disk(output_dir: Path) -> int:
    """Return the free bytes where the run will be."""
    return shutil.disk_usage(_existing(output_dir)).free


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
