"""Judges that have nothing in common with the model that wrote: linear models over words, or over runs of letters."""

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np
from datasets import Dataset

from emoft.data.template import TextFormat
from emoft.errors import warn
from emoft.evaluate.classification import Classification, compare

KINDS = ("tfidf", "letters")


class IndependentClassifier:
    """A linear model by scikit-learn over the TF-IDF of what a text consists of.

    - "tfidf": of words and pairs of words, logistic regression.
    - "letters": of runs of three to five characters within words, a linear support vector machine. It knows an ending
      or a misspelt word where the other one knows nothing.
    """

    def __init__(self, texts: Sequence[str], labels: Sequence[str], kind: str = "tfidf") -> None:
        """Fit it.

        Raises:
            ValueError: fewer than two labels, or texts without words.
        """
        # Here, since it need not be installed.
        from sklearn.feature_extraction.text import TfidfVectorizer
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.svm import LinearSVC

        steps: tuple[Any, Any]
        if kind == "tfidf":
            # C = 10 is right for 0.877 of the validation messages of dair-ai/emotion, the default of 1 for 0.804.
            steps = TfidfVectorizer(ngram_range=(1, 2)), LogisticRegression(C=10, max_iter=1000)
        else:
            # Right for 0.858 of the validation messages with half of train, where words and pairs are for 0.831.
            steps = TfidfVectorizer(analyzer="char_wb", ngram_range=(3, 5), sublinear_tf=True), LinearSVC()
        self.pipeline = make_pipeline(*steps)
        self.pipeline.fit(list(texts), list(labels))

    @staticmethod
    def is_available() -> bool:
        """Whether scikit-learn is installed."""
        return find_spec("sklearn") is not None

    def predict(self, texts: Sequence[str]) -> list[str]:
        """Return the likeliest label of each text."""
        return [str(label) for label in self.pipeline.predict(list(texts))]

    def classify(self, texts: Sequence[str], labels: Sequence[str], names: list[str]) -> Classification:
        """Return how it does on texts whose labels are known, all of them among the names."""
        numbers = {label: number for number, label in enumerate(names)}
        true, predicted = (np.array([numbers[label] for label in each]) for each in (labels, self.predict(texts)))
        return compare(names, true, predicted)


def fit_independent(train: Dataset, text_format: TextFormat) -> dict[str, IndependentClassifier]:
    """Return the independent classifiers by kind, fitted on the texts whose label the model knows; none if in vain."""
    if not IndependentClassifier.is_available():
        warn("no independent classifier without the package scikit-learn: run pip install scikit-learn")
        return {}
    known = train.filter(lambda label: label in text_format.labels, input_columns="label", keep_in_memory=True)
    try:
        return {kind: IndependentClassifier(known["text"], known["label"], kind) for kind in KINDS}
    except ValueError as error:
        warn(f"no independent classifier, which cannot be fitted on the train split ({str(error).splitlines()[0]})")
        return {}
