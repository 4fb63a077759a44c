"""The curves of a run, as TensorBoard's own reader finds them in its event files."""

from pathlib import Path

from emoft.errors import UserError
from emoft.files import EVENTS_FOLDER

Curve = dict[int, float]  # value by step


def find_events(run_dir: Path) -> Path:
    """Return the folder of a run's event files.

    Args:
        run_dir: an output folder of train.py, or a folder of event files.

    Raises:
        UserError: there are none.
    """
    folder = run_dir / EVENTS_FOLDER if (run_dir / EVENTS_FOLDER).is_dir() else run_dir
    if not any(folder.glob("events.out.tfevents.*")):
        raise UserError(f"{run_dir} holds no run (no event files in {folder}): name an --output_dir of train.py")
    return folder


def read_curves(run_dir: Path) -> dict[str, Curve]:
    """Return all scalars of a run, finished or not, by tag.

    Args:
        run_dir: see `find_events`.

    Raises:
        UserError: there are no event files, or none that can be read.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator  # here: it takes a second

    folder = find_events(run_dir)
    everything = {"scalars": 0, "tensors": 1, "images": 1, "histograms": 1, "compressedHistograms": 1}
    try:
        events = EventAccumulator(str(folder), size_guidance=everything).Reload()
    except Exception as error:  # the reader raises whatever a damaged file leads it to
        raise UserError(f"the event files in {folder} cannot be read ({error}): train again") from None
    return {tag: {event.step: event.value for event in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
