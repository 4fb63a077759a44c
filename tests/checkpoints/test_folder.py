from pathlib import Path

import pytest
from torch.distributed import HashStore

from emoft.checkpoints.folder import SaveError, prepare_output_dir, remove_old_checkpoints, save_checkpoint
from emoft.checkpoints.search import checkpoints, find_checkpoint
from emoft.config import TrainConfig
from emoft.distributed.world import World
from emoft.errors import UserError


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
    for step in (2, 10, 9, 100):
        saved = save_checkpoint(tmp_path, step, lambda folder: (folder / "model.safetensors").write_bytes(b"x"), {})
    foreign = [tmp_path / "checkpoint-mine", tmp_path / "checkpoint-7", tmp_path / "checkpoint-200"]
    for folder in foreign:  # without a manifest of ours, as those of the Trainer: neither counted nor removed
        folder.mkdir()
        (folder / "pytorch_model.bin").touch()
    remove_old_checkpoints(tmp_path, limit, best, saved)
    assert [step for step in steps(tmp_path) if step not in (7, 200)] == kept
    assert all(folder.is_dir() for folder in foreign)


@pytest.mark.parametrize("harm", ["model.safetensors", "training_state.pt"])
@pytest.mark.parametrize("limit", [1, 2])
def test_what_was_just_saved_is_never_removed(tmp_path: Path, harm: str, limit: int) -> None:
    """The newest was damaged, and the run went on from the one before."""
    for step in (4, 10, 12):
        save_checkpoint(tmp_path, step, lambda folder: (folder / "model.safetensors").write_bytes(b"x"), {})
    (tmp_path / "checkpoint-12" / harm).write_bytes(b"")
    saved = save_checkpoint(tmp_path, 11, lambda folder: (folder / "model.safetensors").write_bytes(b"x"), {})
    remove_old_checkpoints(tmp_path, limit, None, saved)
    assert steps(tmp_path) == [10, 11][-limit:], "a damaged one does not count"


def test_a_save_that_fails_leaves_no_checkpoint(tmp_path: Path) -> None:
    def write_half(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(SaveError, match="No space left on device"):
        save_checkpoint(tmp_path, 7, write_half, {})
    assert not list(tmp_path.iterdir())
    save_checkpoint(tmp_path, 7, lambda folder: (folder / "model.safetensors").touch(), {})
    assert sorted(path.name for path in tmp_path.rglob("*")) == [
        "checkpoint-7",
        "manifest.json",
        "model.safetensors",
        "training_state.pt",
    ]


class TestAfterAFailure:
    """Processes that torchrun has started in place of others."""

    @pytest.fixture
    def old_run(self, tmp_path: Path) -> Path:
        """A folder that holds a run of an earlier launch."""
        save_checkpoint(tmp_path, 7, lambda folder: (folder / "model.safetensors").touch(), {})
        (tmp_path / "train_config.yaml").touch()
        return tmp_path

    def test_a_run_that_was_begun_goes_on_whatever_the_flags_say(self, old_run: Path) -> None:
        world = World(0, 2, launched=True, store=HashStore())
        world.begin_run()
        for flags in (
            {},
            {"overwrite_output_dir": True},
            {"resume_from_checkpoint": "latest"},
            {"resume_from_checkpoint": "elsewhere/checkpoint-3"},
        ):
            config = TrainConfig(output_dir=str(old_run), **flags)
            assert find_checkpoint(config, world) == old_run / "checkpoint-7"
            prepare_output_dir(config, resumes=True)
            assert steps(old_run) == [7], "its own checkpoints are not those to be overwritten"

    def test_what_an_earlier_launch_left_is_not_the_run_that_failed(self, old_run: Path) -> None:
        """They failed before they had begun, while the libraries were loading for example."""
        world = World(0, 2, launched=True, store=HashStore())
        with pytest.raises(UserError, match="already holds a run"):
            find_checkpoint(TrainConfig(output_dir=str(old_run)), world)
        config = TrainConfig(output_dir=str(old_run), overwrite_output_dir=True)
        assert find_checkpoint(config, world) is None
        prepare_output_dir(config)
        assert steps(old_run) == []

    def test_no_vocabulary_of_the_run_before_is_left(self, old_run: Path) -> None:
        """The new run's tokenizer may be one without these files."""
        for name in ("vocab.json", "merges.txt"):
            (old_run / name).touch()
        prepare_output_dir(TrainConfig(output_dir=str(old_run), overwrite_output_dir=True))
        assert list(old_run.iterdir()) == []

    def test_before_its_first_checkpoint_it_begins_as_the_flags_say(self, old_run: Path, tmp_path: Path) -> None:
        world = World(0, 2, launched=True, store=HashStore())
        world.begin_run()
        begun = tmp_path / "begun"
        begun.mkdir()
        (begun / "train_config.yaml").touch()
        assert find_checkpoint(TrainConfig(output_dir=str(begun)), world) is None
        config = TrainConfig(output_dir=str(begun), resume_from_checkpoint=str(old_run / "checkpoint-7"))
        assert find_checkpoint(config, world) == old_run / "checkpoint-7"
