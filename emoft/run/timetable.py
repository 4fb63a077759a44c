"""After which steps a run logs, samples, evaluates and saves, as its flags say; and how often that will be."""

from emoft.run.setup import Setup


class Timetable:
    """Says of each step, by its number from 1, what comes after it."""

    def __init__(self, setup: Setup) -> None:
        self.config = setup.config
        self.total_steps = setup.loader.total_steps
        self.eval_steps = setup.config.eval_steps or setup.loader.steps_per_epoch
        self.validates = "validation" in setup.splits

    def logs(self, step: int) -> bool:
        """Say whether the loss is logged; that of the last step is."""
        return step >= self.total_steps or step % self.config.logging_steps == 0

    def samples(self, step: int) -> bool:
        """Say whether sample texts are written."""
        return self.config.sample_every > 0 and step % self.config.sample_every == 0

    def evaluates(self, step: int) -> bool:
        """Say whether the validation split is evaluated; after the last step it is."""
        return self.validates and (step >= self.total_steps or step % self.eval_steps == 0)

    def saves(self, step: int) -> bool:
        """Say whether a checkpoint is written, whatever an evaluation finds."""
        return self.config.save_steps > 0 and step % self.config.save_steps == 0

    # ---- How often --------------------------------------------------------------------------------------------------

    def looks_at_gradients(self, done: int) -> int:
        """Return at how many of the steps after so many gradients are measured."""
        every = self.config.log_gradients_every
        return self.total_steps // every - done // every if every else 0

    def rounds_of_samples(self, done: int) -> int:
        """Return how often sample texts are written after so many steps; once at the end."""
        every = self.config.sample_every
        return 1 + (self.total_steps // every - done // every if every else 0)

    def evaluations(self, done: int) -> int:
        """Return how many evaluations come after so many steps, with the one before the first step."""
        total, every = self.total_steps, self.eval_steps
        if not self.validates or done >= total:
            return 0
        return total // every - done // every + (total % every > 0) + (done == 0)

    def checkpoints(self, done: int) -> int:
        """Return how many are written after so many steps at most: each evaluation may find the best model so far."""
        every = self.config.save_steps
        count = self.total_steps // every - done // every if every else 0
        return count + (self.evaluations(done) - (done == 0) if self.config.load_best_model_at_end else 0)
