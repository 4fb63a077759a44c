"""The picture of a confusion matrix."""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from emoft.colors import colors

CONFUSION_TITLE = "texts by emotion (down) and predicted emotion (across)"
MOST_PIXELS = 2400  # of a confusion matrix's side


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
    font, title_font = ImageFont.load_default(20), ImageFont.load_default(22)
    names = labels if all(map(_is_latin, labels)) else [str(number) for number in range(1, len(labels) + 1)]
    longest = round(max(font.getlength(name) for name in names))
    cell = max(1, min(max(84, longest + 12), MOST_PIXELS // len(labels)))
    left, top = longest + 24, 84
    width = max(left + cell * len(labels), 12 + round(title_font.getlength(CONFUSION_TITLE)))
    image = Image.new("RGB", (width + 16, top + cell * len(labels) + 16), "white")
    image.paste(Image.fromarray(colors(shares).repeat(cell, axis=0).repeat(cell, axis=1)), (left, top))
    draw = ImageDraw.Draw(image)
    draw.text((12, 10), CONFUSION_TITLE, "black", title_font)
    for row, name in enumerate(names):
        middle = (row + 0.5) * cell
        if cell >= 24:
            draw.text((left - 12, top + middle), name, "black", font, anchor="rm")
        if cell < longest + 12:
            continue
        draw.text((left + middle, top - 8), name, "black", font, anchor="md")
        for column in range(len(labels)):
            color = "black" if shares[row, column] > 0.6 else "white"
            place = left + (column + 0.5) * cell, top + middle
            draw.text(place, f"{counts[row, column]:,}", color, font, anchor="mm")
    return np.asarray(image)


def _is_latin(text: str) -> bool:
    return all(ord(character) < 0x250 for character in text)  # what the font that comes with Pillow can write
