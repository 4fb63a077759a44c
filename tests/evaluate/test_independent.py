import pytest

from emoft.evaluate.independent import IndependentClassifier

TEXTS = ["we laughed", "laughing again", "she cried", "he was crying"] * 3
LABELS = ["joy", "joy", "sadness", "sadness"] * 3


def test_letters_know_a_word_by_its_parts() -> None:
    letters = IndependentClassifier(TEXTS, LABELS, "letters")
    assert letters.predict(["a laughable cryptic sentence", "laughter", "cries"])[1:] == ["joy", "sadness"]
    assert letters.classify(TEXTS, LABELS, ["joy", "sadness"]).accuracy == 1.0


@pytest.mark.parametrize("kind", ["tfidf", "letters"])
def test_what_cannot_be_fitted_is_a_value_error(kind: str) -> None:
    with pytest.raises(ValueError):
        IndependentClassifier(["a text", "another"], ["joy", "joy"], kind)
