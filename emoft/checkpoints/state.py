"""What a run needs besides its model to go on as if it had not stopped: training_state.pt of a checkpoint."""

import math
import warnings
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from emoft.config import TrainConfig
from emoft.data.tokenized import checksum
from emoft.device import random_state, set_random_state
from emoft.distributed.parallel import load_optimizer_state, whole_optimizer_state
from emoft.distributed.world import World
from emoft.errors import UserError, warn
from emoft.files import TRAINING_STATE_FILE
from emoft.flags import flags_on_resume
from emoft.tracking.run_state import RunState
from emoft.training.randomness import seed_rank
from emoft.training.runtime import Runtime

STATE = {"examples_per_step", "data_checksum", "optimizer", "schedule", "scaler", "random_states", "run"}
# Each flag says where it is declared whether a resumed run may change it. What the data flags stand for, the tokens
# themselves, is compared by checksum.
FREE_TO_CHANGE = flags_on_resume(TrainConfig, "free", "data")
DATA = flags_on_resume(TrainConfig, "data")
# Together with the number of ranks they say how many examples a step has: see `examples_per_step`.
STEP_SIZE = flags_on_resume(TrainConfig, "step_size")


class TrainingState:
    """All that a run needs, besides the model, to continue as if it had not stopped.

    The position in the data is the step itself, since the order is a function of seed and epoch.
    """

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        optimizer: Optimizer,
        schedule: LambdaLR,
        examples_per_step: int,
        splits: dict[str, Dataset],
    ) -> None:
        """Remember what makes up the state.

        Args:
            config: all flags.
            runtime: ranks and precision.
            optimizer: of the model.
            schedule: of its learning rate.
            examples_per_step: of all ranks and micro-batches.
            splits: tokenized; what a figure was measured on must be known to compare with it.
        """
        self.checksums = {name: checksum(rows) for name, rows in splits.items()}
        self.data_checksum = self.checksums["train"]
        self.validation_checksum = self.checksums.get("validation", "")
        self.config, self.runtime, self.optimizer, self.schedule = config, runtime, optimizer, schedule
        self.examples_per_step = examples_per_step
        self.restored_from: Path | None = None

    def capture(self, run: dict[str, Any]) -> dict[str, Any]:
        """Return the state with the figures of the run; a collective.

        What other ranks than 0 return lacks the optimizer's state.
        """
        return {
            "config": asdict(self.config),
            "examples_per_step": self.examples_per_step,
            "data_checksum": self.data_checksum,
            "validation_checksum": self.validation_checksum,
            "precision": self.runtime.precision.name,
            "optimizer": whole_optimizer_state(self.optimizer, self.runtime.world),
            "schedule": self.schedule.state_dict(),
            "scaler": self.runtime.precision.scaler.state_dict(),
            "random_states": self.runtime.world.gather(random_state(self.runtime.device)),
            "run": run,
        }

    def return_to(self, schedule: dict[str, Any]) -> None:
        """Take back steps of the schedule; the optimizer has applied none of them.

        Args:
            schedule: the state of the schedule before them.
        """
        self.schedule.load_state_dict(schedule)
        for group, learning_rate in zip(self.optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = learning_rate

    def restore(self, saved: dict[str, Any], checkpoint: Path) -> RunState:
        """Put a loaded state back. The model is loaded by itself, from the same folder.

        On another number of ranks, dropout draws new random numbers.

        Returns:
            What the run knows about itself.

        Raises:
            UserError: the state is not of this model, or not of these texts.
        """
        check_data(saved, self.data_checksum, checkpoint, self.config)
        self.restored_from = checkpoint
        world = self.runtime.world
        try:
            load_optimizer_state(self.optimizer, saved["optimizer"])
            self.schedule.load_state_dict(saved["schedule"])
            self.runtime.precision.scaler.load_state_dict(saved["scaler"])
            run = RunState(**saved["run"])
            self._tell_changes(saved, run)
            if len(saved["random_states"]) == world.size:
                set_random_state(saved["random_states"][world.rank], self.runtime.device)
            else:
                seed_rank(self.config.seed, world.rank, run.step)
            return run
        except (ValueError, KeyError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            raise UserError(
                f"{TRAINING_STATE_FILE} does not fit the model ({error}): resume from another checkpoint"
            ) from None

    def _tell_changes(self, saved: dict[str, Any], run: RunState) -> None:
        """Tell what is not as it was when the checkpoint was saved; forget a best model that cannot be compared."""
        # Older checkpoints do not say.
        if saved.get("validation_checksum", self.validation_checksum) != self.validation_checksum:
            if math.isfinite(run.best_loss):
                warn(
                    f"the validation data are not those of before: the best model so far, of step {run.best_step}, is"
                    " measured on others and is forgotten"
                )
            run.best_loss, run.best_step, run.evaluations_since_best = math.inf, 0, 0
            run.other_validation_until = run.step
        before, now = saved.get("precision", self.runtime.precision.name), self.runtime.precision.name
        if before != now:
            warn(
                f"the run was begun in {before} and goes on in {now}, so that it does not end with the same bits;"
                f" --mixed_precision {before} keeps it"
            )


def load_state(checkpoint: Path, config: TrainConfig) -> dict[str, Any]:
    """Read the state of `TrainingState.capture`; only tensors and plain values are loaded, no code.

    Tensors stay in the file until they are used, so that the ranks of a host do not each hold all of them.

    Raises:
        UserError: it cannot be read, or belongs to a run that computes something else.
    """
    path = checkpoint / TRAINING_STATE_FILE
    try:
        with warnings.catch_warnings(action="ignore"):  # of a strange file: the refusal below says enough
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        saved = state["config"]
        missing = STATE - set(state)
        if missing:
            raise KeyError(", ".join(sorted(missing)))
    except Exception as error:  # torch.load raises dozens of types for what is one case to the user
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({reason}): resume from another checkpoint") from None
    now = asdict(config)
    changed = {
        name: value
        for name, value in saved.items()
        if name not in FREE_TO_CHANGE and name not in STEP_SIZE and value != now.get(name)
    }
    if changed.get("mixed_precision") == "auto":
        if config.mixed_precision == state.get("precision"):  # the same under its own name
            del changed["mixed_precision"]
        else:
            changed["mixed_precision"] = f"auto, which was {state.get('precision', 'chosen by the device')}"
    if changed:
        told = "; ".join(f"--{name} {before}, not {now.get(name)}" for name, before in changed.items())
        raise UserError(
            f"{checkpoint} was trained with {told}: resume with the same values, or start anew in another --output_dir"
        )
    return state


def examples_per_step(config: TrainConfig, world: World, saved: dict[str, Any] | None) -> int:
    """Return how many examples an optimizer step has, over all ranks and micro-batches.

    A resumed run keeps the number it began with, on as many ranks as there are now, so that it computes the same.

    Args:
        config: all flags.
        world: all ranks.
        saved: the state that the run resumes from, of `load_state`.

    Raises:
        UserError: the flags ask a resumed run for another number.
    """
    asked = world.size * config.per_device_train_batch_size * config.gradient_accumulation_steps
    if not saved or saved["examples_per_step"] == asked:
        return asked
    kept = int(saved["examples_per_step"])
    changed = [name for name in STEP_SIZE if saved["config"].get(name) != getattr(config, name)]
    if changed:
        raise UserError(
            f"the run that you resume has {kept} examples a step, which --{changed[0]} {getattr(config, changed[0])}"
            f" makes {asked}: leave it as it was ({saved['config'].get(changed[0])}), on any number of processes, or"
            " start anew in another --output_dir"
        )
    return kept


def check_data(state: dict[str, Any], data_checksum: str, checkpoint: Path, config: TrainConfig) -> None:
    """See that a run goes on with the texts that it began with.

    Raises:
        UserError: it does not.
    """
    if state["data_checksum"] == data_checksum:
        return
    now = asdict(config)
    changed = [
        f"--{name} {state['config'][name]}, not {now[name]}" for name in DATA if state["config"].get(name) != now[name]
    ]
    raise UserError(
        f"{checkpoint} was trained on other texts ({'; '.join(changed) or 'the data themselves have changed'}): resume"
        " with the same data, or start anew in another --output_dir"
    )
