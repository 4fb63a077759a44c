"""The picture of a confusion matrix."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emoft.colors import colors

CONFUSION_TITLE = "texts by emotion (down) and predicted emotion (across)"
WIDTH = 350  # pixels: so wide TensorBoard shows it, and only what is as wide is sharp
MOST_PIXELS = 2400  # of the side of one with more labels than that has room for
LEAST_CELL = 24  # pixels, in which a count can be read
FONT_ROOM = 12  # pixels from one name to the next


def confusion_map(labels: list[str], counts: np.ndarray) -> np.ndarray:
    """Draw a confusion matrix: each cell with its count, in the color of its share of the true label's texts.

    Names and counts are left out where many labels leave them no room. Labels that the font cannot write stand as
    their numbers, in the order of the table that is shown as text.

    Args:
        labels: L names.
        counts: (L, L), true labels down, predicted ones across.

    Returns:
        (height, width, 3) uint8.
    """
    shares = counts / np.maximum(1, counts.sum(1, keepdims=True))
    font = ImageFont.load_default(11)
    names = labels if all(map(_is_latin, labels)) else [str(number) for number in range(1, len(labels) + 1)]
    longest = round(max(font.getlength(name) for name in names))
    left, top = longest + 12, 42
    cell = (WIDTH - left - 2) // len(labels)
    if cell < LEAST_CELL:
        cell = max(1, min(LEAST_CELL, MOST_PIXELS // len(labels)))
    width = max(left + cell * len(labels) + 2, WIDTH)
    image = Image.new("RGB", (width, top + cell * len(labels) + 2), "white")
    image.paste(Image.fromarray(colors(shares).repeat(cell, axis=0).repeat(cell, axis=1)), (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((6, 5), CONFUSION_TITLE, "black", font)
    for row, name in enumerate(names):
        middle = (row + 0.5) * cell
        if cell >= FONT_ROOM:
            draw.text((left - 6, top + middle), name, "black", font, anchor="rm")
        if cell >= font.getlength(name) + 2:
            draw.text((left + middle, top - 4), name, "black", font, anchor="md")
        for column in range(len(labels)):
            count = f"{counts[row, column]:,}"
            if cell >= font.getlength(count) + 4 and cell >= FONT_ROOM:
                color = "black" if shares[row, column] > 0.6 else "white"
                place = left + (column + 0.5) * cell, top + middle
                draw.text(place, count, color, font, anchor="mm")
    return np.asarray(image)


def _is_latin(text: str) -> bool:
    return all(ord(character) < 0x250 for character in text)  # what the font that comes with Pillow can write
