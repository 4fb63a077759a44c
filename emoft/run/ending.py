"""The end of a run: its model, the best one if the flags say so, with figures and a few texts; or how to go on."""

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emoft.checkpoints.folder import Saver
from emoft.checkpoints.manifest import damage
from emoft.device import describe_device
from emoft.distributed.parallel import load_weights
from emoft.errors import UserError
from emoft.evaluate.scoring import format_figures
from emoft.hints import generate_command, resume_command
from emoft.model.generation import sample_texts
from emoft.model.loading import load_model
from emoft.run.evaluation import classify_rows, evaluate_rows
from emoft.run.setup import Setup
from emoft.share.card import write_card
from emoft.share.upload import upload
from emoft.tracking.tracker import Tracker


@dataclass(frozen=True)
class Ending:
    """Writes what a run leaves."""

    setup: Setup
    tracker: Tracker
    saver: Saver

    def finish(self, has_stopped_early: bool) -> int:
        """Write the model with its figures and a few texts; or say how to go on with a run that was stopped.

        Args:
            has_stopped_early: since evaluations found nothing better any more.

        Returns:
            The exit code of the script.

        Raises:
            UserError: the run was stopped and could not be saved.
        """
        state, text_model, config = self.setup.run_state, self.setup.text_model, self.setup.config
        self.tracker.close_bar()
        if state.evaluation_due or (state.step < self.setup.loader.total_steps and not has_stopped_early):
            return self._say_how_to_go_on()
        if has_stopped_early:
            print(
                f"stopped early: {state.evaluations_since_best} evaluations without a loss below step"
                f" {state.best_step}'s"
            )
        exported_step = self._take_best_model()
        self.saver.export()
        results = self._results(exported_step)
        samples = sample_texts(text_model, config.seed)
        self.tracker.log_samples(samples)
        self.tracker.log_results(results)
        self.saver.write_results(results)
        self._write_card(results)
        print(format_figures(results))
        print("\n".join(samples.values()))
        output_dir, text_format = self.setup.output_dir, text_model.text_format
        command = generate_command(output_dir, text_format.labels[0] if text_format.label_first else "")
        print(f"saved the model in {output_dir}; generate with: {command}")
        if config.push_to_hub:
            address = self.setup.runtime.world.on_main(lambda: upload(output_dir, config.push_to_hub))
            print(f"uploaded to {address}")
        return 0

    def _say_how_to_go_on(self) -> int:
        signals, step = self.setup.signals, self.setup.run_state.step
        if step == 0:
            print(f"stopped by {signals.name} before the first step, with nothing to save yet; to start, run:")
        elif self.saver.has_failed:
            raise UserError(f"stopped by {signals.name} after step {step}, which could not be saved")
        else:
            print(f"stopped by {signals.name} after step {step} and saved {self.saver.saved}; to go on, run:")
        print(f"  {resume_command(self.setup.config, self.setup.runtime.world)}")
        return signals.exit_code

    def _take_best_model(self) -> int:
        """Load the weights of the best step, if the flags ask for it and they can be had; return the model's step."""
        setup, state = self.setup, self.setup.run_state
        if not (setup.config.load_best_model_at_end and 0 < state.best_step < state.step):
            return state.step
        name = f"checkpoint-{state.best_step}"
        folders = [setup.output_dir / name]
        if setup.training_state.restored_from:  # perhaps in another folder
            folders.append(setup.training_state.restored_from.parent / name)
        reasons = []
        for folder in dict.fromkeys(folders):
            reason = setup.runtime.world.on_main(functools.partial(_why_not, folder))
            if not reason:
                load_weights(setup.text_model.model, load_model(str(folder)).state_dict())
                print(f"took the model of step {state.best_step}, the best")
                return state.best_step
            reasons.append(reason)
        self.tracker.warn(f"the best model cannot be had: {reasons[0]}; the model of the last step is kept")
        return state.step

    def _results(self, exported_step: int) -> dict[str, Any]:
        """Return the figures of the model that was exported."""
        setup, splits = self.setup, self.setup.splits
        if "validation" in splits:
            if found := classify_rows(setup, splits["validation"]):
                self.tracker.log_classification(found)
            is_known = self.tracker.has_evaluated(exported_step)
            if not is_known and (evaluation := evaluate_rows(setup, splits["validation"])):
                self.tracker.log_evaluation(evaluation)
        results = self.tracker.results(exported_step)
        if "test" in splits:
            for test in (evaluate_rows(setup, splits["test"]), classify_rows(setup, splits["test"])):
                results |= {f"test_{name}": value for name, value in (test.figures() if test else {}).items()}
        if setup.signals.received:
            self.tracker.warn(
                f"{setup.signals.name} came at the end: figures may be missing, python -m emoft.evaluate tells them"
            )
        return results

    def _write_card(self, results: dict[str, Any]) -> None:
        """Write the model's card; without room for it the run goes on."""
        setup, device = self.setup, describe_device(self.setup.runtime.device)
        text_format = setup.text_model.text_format
        try:
            setup.runtime.world.on_main(
                lambda: write_card(setup.output_dir, setup.config, text_format, results, device)
            )
        except OSError as error:
            self.tracker.warn(f"no model card: {error.strerror}")


def _why_not(checkpoint: Path) -> str:
    """Return why the model of a checkpoint cannot be taken; an empty text if it can."""
    if not checkpoint.is_dir():
        return f"{checkpoint} is missing"
    reason = damage(checkpoint)
    return f"{checkpoint} is damaged ({reason})" if reason else ""
