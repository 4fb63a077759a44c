"""The losses of three short runs, to 1e-5, so that no change moves the mathematics unseen.

`tests/golden.py` compares whole runs of two versions, to the bit.
"""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import Result

# The demo's model and sentences in float32, dropout on, steps of 4 x 4 examples. Different vector instructions and
# numbers of threads move them by 2e-7. They may change only with what is computed, with the bundled sentences or with
# the libraries' random numbers; say so in the commit that changes them.
LOSSES = {
    "packed": [7.347439, 7.341236, 7.085345, 6.786964, 6.709308, 6.572243, 6.412564, 6.299979],
    "padded": [7.348265, 7.350861, 7.078443, 6.802397, 6.621741, 6.571743, 6.392998, 6.286989],
    "contrast": [7.354656, 7.324101, 7.108718, 6.846992, 6.630006, 6.569149, 6.434878, 6.303481],
}
GRAD_NORMS = {
    "packed": [4.261965, 3.990987, 2.327021, 1.500294, 2.611019, 1.976116, 1.295223, 1.435605],
    "padded": [4.263766, 3.917192, 2.364644, 1.479099, 1.723296, 2.063499, 1.283644, 1.323318],
    "contrast": [6.440509, 6.280209, 3.50682, 1.589331, 1.554928, 1.856039, 1.426773, 1.407414],
}
FLAGS = {"packed": [], "padded": ["--batching=padded"], "contrast": ["--label_contrast=0.2"]}


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_steps_of_the_demo(run: Callable[..., Result], tmp_path: Path, name: str) -> None:
    shape = ["--per_device_train_batch_size=4", "--gradient_accumulation_steps=4", "--max_steps=8", "--logging_steps=1"]
    words = ["--config=demo", "--mixed_precision=no", "--validation_file=", "--output_dir=run", *shape, *FLAGS[name]]
    result = run("train.py", *words)
    assert result.code == 0, result.err
    history = json.loads((tmp_path / "run" / "trainer_state.json").read_text())["log_history"]
    assert [entry["loss"] for entry in history] == pytest.approx(LOSSES[name], rel=1e-5)
    assert [entry["grad_norm"] for entry in history] == pytest.approx(GRAD_NORMS[name], rel=1e-4)
