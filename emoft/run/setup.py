"""What train.py sets up before its loop: what always travels together from there."""

from dataclasses import dataclass
from pathlib import Path

from datasets import Dataset

from emoft.checkpoints.state import TrainingState
from emoft.config import TrainConfig
from emoft.data.steps import StepLoader
from emoft.gradients.monitor import GradientMonitor
from emoft.model.loading import TextModel
from emoft.tracking.run_state import RunState
from emoft.training.contrast import LabelContrast
from emoft.training.runtime import Runtime
from emoft.training.signals import StopSignals


@dataclass(frozen=True)
class Setup:
    """All that stands around the loop is given this: a run, a plan of one, or a step that is watched."""

    config: TrainConfig  # all flags
    runtime: Runtime  # with the signals that stop the run
    text_model: TextModel  # what is trained
    splits: dict[str, Dataset]  # tokenized; "train" and, where there are any, "validation" and "test"
    loader: StepLoader  # of the train split
    training_state: TrainingState  # what a checkpoint holds besides the model
    run_state: RunState  # what the run knows about itself, a fresh one or that of a checkpoint
    monitor: GradientMonitor  # measures gradients at some steps
    label_contrast: LabelContrast  # of the loss

    @property
    def output_dir(self) -> Path:
        """The folder of the run."""
        return Path(self.config.output_dir)

    @property
    def signals(self) -> StopSignals:
        """The signals that stop the run."""
        assert self.runtime.signals is not None
        return self.runtime.signals

    @property
    def shards(self) -> int:
        """On how many ranks each has only its part of the weights; 1: each rank has all of them."""
        return self.runtime.world.size if self.config.parallel == "fsdp" else 1

    @property
    def steps_left(self) -> int:
        """How many steps come after those that were taken."""
        return max(0, self.loader.total_steps - self.run_state.step)
