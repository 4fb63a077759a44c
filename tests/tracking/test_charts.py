"""The heat map, and what a real TensorBoard shows of a real run in a real browser."""

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import screenshots
from conftest import WarmScripts
from PIL import ImageFont
from test_train import flags

from emoft.colors import VIRIDIS
from emoft.evaluate.confusion import confusion_map
from emoft.gradients.heat_map import heat_map
from emoft.tracking.charts import GROUPS, LAYOUT, TAGS


def test_the_heat_map_shows_the_norm_of_each_block_at_each_step() -> None:
    picture = heat_map([10, 20, 30, 40], [[1e-3, 1.0], [1e-2, 1.0], [1.0, float("nan")], [1.0, 0.0]])
    assert picture.dtype == np.uint8
    left, top, width, height = 70, 44, 180, 180  # of the cells: 720 / 4 wide, 360 / 2 high

    def color(block: int, column: int) -> tuple[int, ...]:
        y = top + (1 - block) * height + height // 2  # the first block is the lowest
        return tuple(picture[y, left + column * width + width // 2])

    assert color(0, 0) == VIRIDIS[0]
    assert color(0, 2) == color(0, 3) == color(1, 0) == VIRIDIS[-1]
    assert color(0, 1) not in (VIRIDIS[0], VIRIDIS[-1])
    assert color(1, 2) == color(1, 3) == (190, 190, 190), "no number is gray"


@pytest.mark.parametrize(("blocks", "steps"), [(1, 1), (12, 1), (48, 512), (2, 900)])
def test_the_heat_map_of_any_size(blocks: int, steps: int) -> None:
    picture = heat_map(list(range(1, steps + 1)), [[1.0] * blocks for _ in range(steps)])
    assert picture.ndim == 3
    assert picture.shape[1] <= 1100
    assert picture.shape[0] <= 700


def test_the_confusion_matrix_is_colored_by_the_share_of_the_true_label() -> None:
    counts = np.array([[8, 0, 0], [5, 5, 0], [0, 0, 0]])
    picture = confusion_map(["joy", "fear", "surprise"], counts)
    assert picture.dtype == np.uint8
    cell = 84 if picture.shape[0] == 84 + 3 * 84 + 16 else (picture.shape[0] - 100) // 3
    left = round(ImageFont.load_default(20).getlength("surprise")) + 24

    def color(row: int, column: int) -> tuple[int, ...]:
        return tuple(picture[84 + row * cell + 4, left + column * cell + 4])  # a corner, beside the count

    assert color(0, 0) == VIRIDIS[-1]
    assert color(1, 0) == color(1, 1) == VIRIDIS[4]
    assert color(0, 1) == color(1, 2) == color(2, 2) == VIRIDIS[0], "a label without texts has shares of 0"


@pytest.mark.parametrize("labels", [["a", "b"], ["x" * 30] * 20, ["ភ័យ", "joy"], [str(n) for n in range(400)]])
def test_the_confusion_matrix_of_any_labels(labels: list[str]) -> None:
    picture = confusion_map(labels, np.eye(len(labels), dtype=int))
    assert 550 < picture.shape[1] < 3000, "the title fits, and so does the picture on a screen"
    assert picture.shape[0] < 2700


class TestInTensorBoard:
    @pytest.fixture(scope="class")
    @classmethod
    def runs(cls, scripts: WarmScripts, tmp_path_factory, tiny_model, train_file, validation_file) -> Path:
        """Two runs of different learning rates, one of them interrupted and resumed."""
        folder = tmp_path_factory.mktemp("runs")
        settings = {
            "validation_file": validation_file,
            "max_steps": 12,
            "eval_steps": 4,
            "log_gradients_every": 2,
            "sample_every": 6,
            "template": "{label}: {text}",
            "logging_steps": 2,
            "load_best_model_at_end": False,
        }
        first = scripts("train.py", *flags(tiny_model, train_file, "a", **settings), cwd=folder)
        assert first.code == 0, first.err
        settings |= {"learning_rate": 3e-4, "save_steps": 6}
        second = scripts("train.py", *flags(tiny_model, train_file, "b", **settings), cwd=folder)
        assert second.code == 0, second.err
        for path in (folder / "b").glob("checkpoint-12"):  # as if it had stopped between 6 and 12
            path.rename(folder / "away")
        again = flags(tiny_model, train_file, "b", **settings, resume_from_checkpoint="latest")
        resumed = scripts("train.py", *again, cwd=folder)
        assert resumed.code == 0, resumed.err
        return folder

    @pytest.fixture(scope="class")
    @classmethod
    def address(cls, runs: Path) -> Iterator[str]:
        with screenshots.tensorboard(runs, "--load_fast=false") as address:  # the fast reader knows no descriptions
            yield address

    @staticmethod
    def get(address: str) -> object:
        return json.loads(urllib.request.urlopen(address).read())

    def test_curves_have_descriptions_and_a_resumed_one_no_overlap(self, address: str) -> None:
        tags = self.get(f"{address}/data/plugin/scalars/tags")
        assert set(tags) == {"a/runs", "b/runs"}, "one run each: no second one for HParams"
        names = {tag for tag, _ in TAGS.values()} - {"train/loss_scale", "train/skipped_steps", "train/label_contrast"}
        assert names <= set(tags["a/runs"])
        for tag in tags["a/runs"]:
            assert tags["a/runs"][tag]["description"], tag
            assert tag in names or tag.partition("/")[0] in GROUPS
        points = self.get(f"{address}/data/plugin/scalars/scalars?tag=train%2Floss&run=b%2Fruns")
        assert [step for _, step, _ in points] == [2, 4, 6, 8, 10, 12]

    def test_every_chart_of_the_layout_has_curves(self, address: str) -> None:
        tags = self.get(f"{address}/data/plugin/scalars/tags")["a/runs"]
        layout = self.get(f"{address}/data/plugin/custom_scalars/layout")
        titles = {chart["title"] for category in layout["category"] for chart in category["chart"]}
        assert titles == {title for charts in LAYOUT.values() for title in charts}
        for charts in LAYOUT.values():
            for title, (_, patterns) in charts.items():
                if title != "steps that were not finite or skipped":
                    assert all(any(re.search(pattern, tag) for tag in tags) for pattern in patterns), title

    def test_text_images_and_histograms(self, address: str) -> None:
        texts = self.get(f"{address}/data/plugin/text/tags")["a/runs"]
        assert {"guide/text_summary", "samples/joy/text_summary", "samples/fear/text_summary"} <= set(texts)
        samples = self.get(f"{address}/data/plugin/text/text?run=a%2Fruns&tag=samples%2Fjoy%2Ftext_summary")
        assert [each["step"] for each in samples] == [6, 12, 12], "every six steps, and of the final model"
        assert "joy:" in samples[0]["text"]
        (guide,) = self.get(f"{address}/data/plugin/text/text?run=a%2Fruns&tag=guide%2Ftext_summary")
        assert "<table>" in guide["text"]
        images = self.get(f"{address}/data/plugin/images/tags")["a/runs"]
        assert set(images) == {"gradient_norm_by_block", "confusion"}
        histograms = self.get(f"{address}/data/plugin/histograms/tags")["a/runs"]
        assert {f"{kind}/{name}" for kind in ("weights", "gradients") for name in ("h00", "h01", "wte")} == set(
            histograms
        )

    @pytest.mark.skipif(bool(screenshots.missing()), reason=screenshots.missing())
    def test_in_a_browser(self, address: str, tmp_path: Path) -> None:
        with screenshots.browser(1400, 1000) as driver:
            driver.get(f"{address}/#custom_scalars")
            screenshots.wait_for(driver, screenshots.COUNT, "vz-line-chart2", lambda count: count >= 3)
            text = driver.execute_script(screenshots.PAGE_TEXT)
            assert all(category in text for category in LAYOUT)
            assert "gradient norm by depth" in text
            points = screenshots.wait_for(
                driver, screenshots.POINTS, "vz-line-chart2", lambda points: bool(points) and min(points) > 0
            )
            assert len(points) >= 3, "each chart has lines with points"
            driver.get(f"{address}/?#hparams")
            for text in ("learning_rate", "final/eval_loss", "a/runs", "b/runs"):
                screenshots.wait_for(driver, screenshots.PAGE_TEXT, "", lambda page, text=text: text in str(page))
            driver.get(f"{address}/?again#images")
            screenshots.wait_for(driver, screenshots.COUNT, "img", lambda count: count >= 1)
            driver.get(f"{address}/?more#text")
            screenshots.wait_for(driver, screenshots.PAGE_TEXT, "", lambda text: "vanishing" in str(text))
