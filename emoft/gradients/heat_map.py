"""All of a run in one picture: the gradient norm of each block at each measured step."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emoft.colors import colors


def heat_map(steps: list[int], norms: list[list[float]]) -> np.ndarray:
    """Draw the gradient norm of each block at each measured step, log10, as colors.

    Args:
        steps: the measured steps.
        norms: for each of them the norms of the blocks, the first block first.

    Returns:
        (height, width, 3) uint8. The first block is the lowest row; gray is no number.
    """
    values = np.array(norms, dtype=np.float64).T[::-1]  # (blocks, steps), the last block on top
    logs = np.log10(np.where((values > 0) & np.isfinite(values), values, np.nan))
    finite = logs[np.isfinite(logs)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    if high - low < 1:  # a tenfold difference at least, lest noise look like a pattern
        low, high = (low + high - 1) / 2, (low + high + 1) / 2
    cells = colors((logs - low) / (high - low))

    # TensorBoard shows it about 350 pixels wide unless it is clicked: letters must be large to be read there.
    cell_width, cell_height = max(1, 720 // cells.shape[1]), max(10, 360 // cells.shape[0])
    picture = Image.fromarray(cells.repeat(cell_height, axis=0).repeat(cell_width, axis=1))
    left, top, right, bottom = 70, 44, 120, 44
    image = Image.new("RGB", (left + picture.width + right, top + picture.height + bottom), "white")
    image.paste(picture, (left, top))
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(24)
    draw.text((left, 8), "log10 of the gradient norm, by block and step", "black", font)
    every = -(-len(values) * 28 // picture.height)  # as many names as have room
    for row in range(0, len(values), every):
        name = f"h{len(values) - 1 - row:02}"
        draw.text((left - 8, top + (row + 0.5) * cell_height), name, "black", font, anchor="rm")
    for column in sorted({0, len(steps) // 2, len(steps) - 1}):
        place = left + (column + 0.5) * cell_width, top + picture.height + 6
        draw.text(place, f"{steps[column]:,}", "black", font, anchor="ma")
    bar = colors(np.linspace(1, 0, picture.height)[:, None]).repeat(16, axis=1)
    image.paste(Image.fromarray(bar), (left + picture.width + 16, top))
    for y, value in ((top, high), (top + picture.height, low)):
        draw.text((left + picture.width + 40, y), f"{value:.1f}", "black", font, anchor="lm")
    return np.asarray(image)
