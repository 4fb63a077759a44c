"""The heat map, and what a real TensorBoard shows of a real run in a real browser."""

import html
import io
import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
import screenshots
from conftest import WarmScripts
from PIL import Image, ImageFont
from test_train import flags

from emoft.colors import VIRIDIS, colors
from emoft.evaluate.confusion import confusion_map
from emoft.gradients.pictures import LEFT, TOP, WIDTH, _spread, depth_chart, heat_map
from emoft.tracking.charts import DEPTH_CHARTS, GROUPS, GUIDE, LAYOUT, TAGS


def test_the_heat_map_shows_the_norm_of_each_block_at_each_step() -> None:
    picture = heat_map([10, 20, 30, 40], [[1e-3, 1.0], [1e-2, 1.0], [1.0, float("nan")], [1.0, 0.0]])
    assert picture.dtype == np.uint8
    width, height = (WIDTH - LEFT - 52) / 4, 180 / 2  # of the cells

    def color(block: int, column: int) -> tuple[int, ...]:
        y = TOP + (1 - block) * height + height / 2  # the first block is the lowest
        return tuple(picture[int(y), int(LEFT + column * width + width / 2)])

    assert color(0, 0) == VIRIDIS[0]
    assert color(0, 2) == color(0, 3) == color(1, 0) == VIRIDIS[-1]
    assert color(0, 1) not in (VIRIDIS[0], VIRIDIS[-1])
    assert color(1, 2) == color(1, 3) == (190, 190, 190), "no number is gray"


@pytest.mark.parametrize(("blocks", "steps"), [(1, 1), (12, 1), (48, 512), (2, 900)])
def test_pictures_of_any_size(blocks: int, steps: int) -> None:
    values = [[1.0] * blocks for _ in range(steps)]
    for picture in (heat_map([*range(steps)], values), depth_chart("a title", [*range(steps)], values, True)):
        assert picture.shape[1:] == (WIDTH, 3), "as wide as TensorBoard shows it"
        assert picture.shape[0] <= 700


def test_the_lines_of_blocks_have_the_colors_of_their_depth() -> None:
    """The first block is told from the last at a glance, and its name stands beside its line's end in its color."""
    steps, blocks = 40, 12
    values = [[10.0 ** (block - 6) for block in range(blocks)]] * steps
    picture = depth_chart("gradient norm", [*range(steps)], values, True)
    shades = colors(0.92 * np.linspace(0, 1, blocks))
    middle = picture[:, LEFT + 100]
    places = [int(np.flatnonzero((middle == shade).all(-1)).mean()) for shade in shades]
    assert places == sorted(places, reverse=True), "the first is the lowest here"
    assert np.abs(shades[0].astype(int) - shades[-1]).sum() > 250
    beside = picture[:, -30:].reshape(-1, 3)
    for shade in shades:
        assert np.abs(beside.astype(int) - shade).sum(-1).min() < 60, "its name, but for smoothed edges"


def test_what_is_not_finite_leaves_a_gap() -> None:
    values = [[1.0, float("nan")], [2.0, float("inf")], [3.0, 0.0]]
    assert depth_chart("x", [1, 2, 3], values, True).shape == depth_chart("x", [1], [[float("nan")] * 2], False).shape


def test_names_beside_lines_do_not_cover_each_other() -> None:
    spread = _spread([(50.0 + n / 10, n) for n in range(12)], 11, 24, 214)
    heights = [y for y, _ in spread]
    assert all(b - a >= 11 for a, b in zip(heights, heights[1:], strict=False)) and heights[-1] <= 214
    assert len(_spread([(float(n), n) for n in range(48)], 11, 24, 214)) <= 18


def test_the_confusion_matrix_is_colored_by_the_share_of_the_true_label() -> None:
    counts = np.array([[8, 0, 0], [5, 5, 0], [0, 0, 0]])
    picture = confusion_map(["joy", "fear", "surprise"], counts)
    assert picture.dtype == np.uint8 and picture.shape[1] == WIDTH
    left = round(ImageFont.load_default(11).getlength("surprise")) + 12
    cell = (WIDTH - left - 2) // 3

    def color(row: int, column: int) -> tuple[int, ...]:
        return tuple(picture[42 + row * cell + 4, left + column * cell + 4])  # a corner, beside the count

    assert color(0, 0) == VIRIDIS[-1]
    assert color(1, 0) == color(1, 1) == VIRIDIS[4]
    assert color(0, 1) == color(1, 2) == color(2, 2) == VIRIDIS[0], "a label without texts has shares of 0"


@pytest.mark.parametrize("labels", [["a", "b"], ["x" * 30] * 20, ["ភ័យ", "joy"], [str(n) for n in range(400)]])
def test_the_confusion_matrix_of_any_labels(labels: list[str]) -> None:
    picture = confusion_map(labels, np.eye(len(labels), dtype=int))
    assert WIDTH <= picture.shape[1] < 3000, "the title fits, and so does the picture on a screen"
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
        lines = GUIDE.splitlines()
        assert len(lines) <= 25 and max(map(len, lines)) <= 108, "seen at once, without scrolling"
        assert all(line.strip() in html.unescape(guide["text"]) for line in lines)
        images = self.get(f"{address}/data/plugin/images/tags")["a/runs"]
        assert set(images) == {"gradient_norm_by_block", "confusion", *(f"by_depth/{kind}" for kind in DEPTH_CHARTS)}
        for tag in images:
            (*_, last) = self.get(f"{address}/data/plugin/images/images?run=a%2Fruns&sample=0&tag={quote(tag, '')}")
            picture = urllib.request.urlopen(f"{address}/data/plugin/images/individualImage?{last['query']}").read()
            assert Image.open(io.BytesIO(picture)).width == 350, f"{tag} is as wide as it is shown, and so sharp"
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
            for text in ("learning_rate", "eval_loss", "a", "b"):
                screenshots.wait_for(driver, screenshots.PAGE_TEXT, "", lambda page, text=text: text in str(page))
            driver.get(f"{address}/?again#images")
            screenshots.wait_for(driver, screenshots.COUNT, "img", lambda count: count >= 1)
            driver.get(f"{address}/?more#text")
            screenshots.wait_for(driver, screenshots.PAGE_TEXT, "", lambda text: "vanishing" in str(text))
