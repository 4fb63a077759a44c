"""Evaluations of the model of a run, as it is now."""

from datasets import Dataset

from emoft.evaluate.classification import Classification, classify
from emoft.evaluate.scoring import Evaluation, evaluate
from emoft.run.setup import Setup
from emoft.tracking.tracker import Tracker


def evaluate_rows(setup: Setup, rows: Dataset) -> Evaluation | None:
    """Evaluate tokenized rows; None if a signal ended it."""
    batch_size = setup.config.per_device_eval_batch_size
    return evaluate(setup.text_model, rows, setup.runtime, batch_size, setup.config.batching)


def can_classify(setup: Setup) -> bool:
    """Say whether the model can be asked for the emotion of a text: the template must name several."""
    text_format = setup.text_model.text_format
    return text_format.has_label and len(text_format.labels) > 1


def classify_rows(setup: Setup, rows: Dataset) -> Classification | None:
    """Let the model tell the emotions of tokenized rows; None if it cannot, or if a signal ended it."""
    if not can_classify(setup):
        return None
    return classify(setup.text_model, rows, setup.runtime, setup.config.per_device_eval_batch_size)


def validate(setup: Setup, tracker: Tracker) -> bool:
    """Evaluate the validation split and log it; after a signal, leave it to the resumed run.

    Returns:
        Whether the model is the best so far.
    """
    setup.run_state.evaluation_due = True
    with tracker.clock_stopped():
        evaluation = evaluate_rows(setup, setup.splits["validation"])
        if evaluation is None:
            return False
        setup.run_state.evaluation_due = False
        return tracker.log_evaluation(evaluation)
