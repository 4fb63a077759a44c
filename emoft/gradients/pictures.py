"""All of a run in one picture: a figure of each block at each measured step."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emoft.colors import colors

# TensorBoard shows a picture 350 pixels wide, whatever its size: only what is as wide is sharp.
WIDTH = 350
LEFT, TOP, BOTTOM = 42, 24, 20
FONT_SIZE = 11


def heat_map(steps: list[int], norms: list[list[float]]) -> np.ndarray:
    """Draw the gradient norm of each block at each measured step, log10, as colors.

    Args:
        steps: the measured steps.
        norms: for each of them the norms of the blocks, the first block first.

    Returns:
        (height, WIDTH, 3) uint8. The first block is the lowest row; gray is no number.
    """
    logs = _logarithms(norms)[::-1]  # (blocks, steps), the last block on top
    low, high = _range(logs)
    cells = colors((logs - low) / (high - low))
    right = 52
    width, height = WIDTH - LEFT - right, max(len(cells) * 12, 180)
    picture = Image.fromarray(cells).resize((width, height), Image.Resampling.NEAREST)
    image, draw, font = _canvas("log10 of the gradient norm, by block and step", height)
    image.paste(picture, (LEFT, TOP))
    for row in range(len(cells)):
        place = LEFT - 5, TOP + (row + 0.5) * height / len(cells)
        draw.text(place, f"h{len(cells) - 1 - row:02}", "black", font, anchor="rm")
    _draw_steps(draw, font, steps, width, height)
    bar = colors(np.linspace(1, 0, height)[:, None]).repeat(12, axis=1)
    image.paste(Image.fromarray(bar), (LEFT + width + 8, TOP))
    for y, value in ((TOP + 5, high), (TOP + height - 5, low)):
        draw.text((LEFT + width + 24, y), f"{value:.1f}", "black", font, anchor="lm")
    return np.asarray(image)


def depth_chart(title: str, steps: list[int], values: list[list[float]], in_logs: bool) -> np.ndarray:
    """Draw a figure of each block over the steps, each in the color of its depth: dark is the first, bright the last.

    Args:
        title: of the picture.
        steps: the measured steps.
        values: for each of them the figures of the blocks, the first block first.
        in_logs: draw log10 of them.

    Returns:
        (height, WIDTH, 3) uint8. Beside each line's end, as far as there is room, stands its block.
    """
    curves = _logarithms(values) if in_logs else np.array(values, dtype=np.float64).T  # (blocks, steps)
    low, high = _range(curves)
    right, height = 34, 190
    width = WIDTH - LEFT - right
    image, draw, font = _canvas(title, height)
    draw.rectangle((LEFT, TOP, LEFT + width, TOP + height), outline=(190, 190, 190))
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = TOP + height * (1 - share)
        draw.line((LEFT, y, LEFT + width, y), (225, 225, 225))
        draw.text((LEFT - 4, y), f"{low + share * (high - low):.1f}", "black", font, anchor="rm")
    xs = LEFT + width * np.linspace(0, 1, len(steps)) if len(steps) > 1 else np.array([LEFT + width / 2])
    ys = TOP + height * (1 - (curves - low) / (high - low))
    shades = colors(0.92 * np.linspace(0, 1, len(curves)))  # the very brightest is not seen on white
    ends = []
    for number, (line, shade) in enumerate(zip(ys, shades, strict=True)):
        known = np.isfinite(line)
        points = [(float(x), float(y)) for x, y in zip(xs[known], line[known], strict=True)]
        if len(points) > 1:
            draw.line(points, tuple(map(int, shade)), 2)
        if points:
            ends.append((points[-1][1], number))
    for y, number in _spread(ends, FONT_SIZE, TOP, TOP + height):
        draw.text((LEFT + width + 5, y), f"h{number:02}", tuple(map(int, shades[number])), font, anchor="lm")
    _draw_steps(draw, font, steps, width, height)
    return np.asarray(image)


def _logarithms(values: list[list[float]]) -> np.ndarray:
    """Return log10 of figures by step and block, (blocks, steps); NaN where there is none."""
    found = np.array(values, dtype=np.float64).T
    return np.log10(np.where((found > 0) & np.isfinite(found), found, np.nan))


def _range(values: np.ndarray) -> tuple[float, float]:
    """Return the ends of an axis: a unit at least, lest noise look like a pattern."""
    finite = values[np.isfinite(values)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return ((low + high - 1) / 2, (low + high + 1) / 2) if high - low < 1 else (low, high)


def _canvas(title: str, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, ImageFont.FreeTypeFont]:
    image = Image.new("RGB", (WIDTH, TOP + height + BOTTOM), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(FONT_SIZE)
    draw.text((LEFT, 5), title, "black", font)
    return image, draw, font  # type: ignore[return-value]  # with a size it is of this kind


def _draw_steps(
    draw: ImageDraw.ImageDraw, font: ImageFont.FreeTypeFont, steps: list[int], width: int, height: int
) -> None:
    """Write the first, the middle and the last step below a picture."""
    for share, column, anchor in ((0.0, 0, "la"), (0.5, len(steps) // 2, "ma"), (1.0, len(steps) - 1, "ra")):
        if len(steps) > 2 or column == 0:
            draw.text((LEFT + share * width, TOP + height + 4), f"{steps[column]:,}", "black", font, anchor=anchor)


def _spread(ends: list[tuple[float, int]], room: float, top: float, bottom: float) -> list[tuple[float, int]]:
    """Return heights for names beside the ends of lines, in the order of these, none over another.

    Of more names than there is room for, only some are kept, evenly.
    """
    most = int((bottom - top) // room) + 1
    kept = sorted(ends)[:: -(-len(ends) // most)] if ends else []
    spread: list[tuple[float, int]] = []
    for y, number in kept:
        spread.append((max(y, spread[-1][0] + room) if spread else y, number))
    limit = bottom
    for place in range(len(spread) - 1, -1, -1):  # pushed up again from below
        spread[place] = min(spread[place][0], limit), spread[place][1]
        limit = spread[place][0] - room
    return spread
