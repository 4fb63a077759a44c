from pathlib import Path

import pytest

from emoft.checkpoint import SaveError, checkpoints, remove_old_checkpoints, save_checkpoint


def make(folder: Path, *steps: int) -> None:
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoints(folder)]


@pytest.mark.parametrize(
    ("limit", "best", "kept"),
    [
        (0, None, [2, 9, 10, 100]),  # no limit
        (2, None, [10, 100]),  # by number, not by name
        (2, 9, [9, 100]),  # the best counts among them
        (2, 100, [10, 100]),
        (1, 9, [9, 100]),  # the newest stays too: a resume from an older one would lose steps
        (1, None, [100]),
        (9, 2, [2, 9, 10, 100]),
    ],
)
def test_which_checkpoints_are_kept(tmp_path: Path, limit: int, best: int | None, kept: list[int]) -> None:
    make(tmp_path, 2, 10, 9, 100)
    (tmp_path / "checkpoint-mine").mkdir()  # not ours: neither counted nor removed
    remove_old_checkpoints(tmp_path, limit, best)
    assert steps(tmp_path) == kept
    assert (tmp_path / "checkpoint-mine").is_dir()


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    def write_half(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match="No space left on device"):
        save_checkpoint(tmp_path, 7, write_half, {})
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path, 7, lambda folder: (folder / "model.safetensors").touch(), {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "checkpoint-7", "manifest.json", "model.safetensors", "training_state.pt",
    ]  # fmt: skip
