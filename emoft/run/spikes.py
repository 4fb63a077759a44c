"""Steps of a run whose loss stands out: told with their texts, and left out if the flags say so."""

from dataclasses import asdict

from torch import Tensor

from emoft.data.steps import Step
from emoft.data.tokens import decode
from emoft.files import spike_file
from emoft.gradients.texts import losses_of_texts
from emoft.run.reports import origin, write_report
from emoft.run.setup import Setup
from emoft.tracking.tracker import Tracker
from emoft.training.spikes import MOST_FILES, Spike, SpikeWatch, describe


class Spikes:
    """Keeps the steps that stand out until somebody is told of them."""

    def __init__(self, setup: Setup, tracker: Tracker) -> None:
        self.setup, self.tracker = setup, tracker
        self.watch = SpikeWatch(setup.run_state)
        self._untold: list[tuple[Step, Spike]] = []
        # A text by itself, which FSDP's ranks cannot compute alone.
        self._can_measure = setup.config.parallel != "fsdp" or not setup.runtime.world.launched

    def note(self, step: Step, loss: Tensor, looks: bool) -> None:
        """Remember the loss of a step, on its device, and look at all since the last look: a CPU-GPU sync point."""
        self.watch.note(step, loss)
        if looks:
            self._untold += self.watch.look()

    def holds(self, step: Step) -> bool:
        """Say whether a step stands out that nobody has been told of."""
        return any(each is step for each, _ in self._untold)

    def forget(self, step: Step) -> None:
        """Forget a step that comes again, made anew."""
        self._untold = [(each, spike) for each, spike in self._untold if each is not step]

    def tell(self, applied: bool) -> None:
        """Tell of the steps that stood out since the last look, each with its hardest text.

        It is told above the bar, in the Text tab, and in spike-STEP.json; of many, in a run, only of the first ones.

        Args:
            applied: whether the latest step was.
        """
        setup, state = self.setup, self.setup.run_state
        spikes, self._untold = self._untold, []
        for step, spike in spikes:
            state.spikes += 1
            if state.spikes > MOST_FILES:
                continue
            with self.tracker.clock_stopped():
                ids = setup.splits["train"].select(step.examples)["input_ids"]
                texts = [decode(setup.text_model.tokenizer, each) for each in ids]
                losses = losses_of_texts(setup.text_model.model, ids) if self._can_measure else []
                file = spike_file(spike.step)
                line = describe(spike, step.examples, texts, losses, applied, str(setup.output_dir / file))
                details = {"applied": applied, "texts": texts, "losses": losses, **origin(setup, step)}
                write_report(setup, file, {**asdict(spike), **details})
                self.tracker.warn(line)
                self.tracker.events.add_text("faults/spikes", line, spike.step)
