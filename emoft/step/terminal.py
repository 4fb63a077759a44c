"""The story of a step as plain text."""

import textwrap
import unicodedata

from emoft.step.story import Aligned, Bars, Figure, Part, Story, Table, short

WIDTH = 120
MARGIN = "   "
BAR = 10  # cells


def describe(story: Story, width: int = WIDTH) -> str:
    """Return the story as lines of text, about as wide as told."""
    lines = [story.title, *_wrapped(story.about, width)]
    for part in story.parts:
        lines += ["", *_part(part, story, width)]
    return "\n".join([*lines, "", story.ending])


def _part(part: Part, story: Story, width: int) -> list[str]:
    lines = [part.title, *_wrapped(part.sentences, width)]
    for figure in part.figures:
        lines += [MARGIN + line for line in _figure(figure, width - len(MARGIN))]
    for check in part.checks:
        lines.append(f"{MARGIN}[{story.labels['agrees' if check.holds else 'disagrees']}] {check.text}")
    code = f"{MARGIN}{story.labels['line']}: {'; '.join(part.code)}"
    formula = f"{MARGIN}{story.labels['formula']}: {part.formula} ({part.source})"
    together = code + formula
    return [*lines, together] if cells(together) <= width else [*lines, code, formula]


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, break_long_words=False, break_on_hyphens=False)


def _figure(figure: Figure, width: int) -> list[str]:
    if isinstance(figure, Aligned):
        return _aligned(figure, width)
    if isinstance(figure, Table):
        return _table([figure.header, *figure.rows])
    if isinstance(figure, Bars):
        return _bars(figure, width)
    return []


def cells(text: str) -> int:
    """Return how many cells of a terminal a text takes: a mark stands on its letter, a wide letter takes two."""
    return sum(
        0 if unicodedata.category(c) in ("Mn", "Me", "Cf") else 2 if unicodedata.east_asian_width(c) in "WF" else 1
        for c in text
    )


def _padded(text: str, width: int) -> str:
    return text + " " * (width - cells(text))


def _aligned(figure: Aligned, width: int) -> list[str]:
    lines = _wrapped(figure.caption, width) if figure.caption else []
    first = max(cells(label) for label, _ in figure.rows)
    columns = list(zip(*(row for _, row in figure.rows), strict=True))
    widths = [max(map(cells, column)) for column in columns]
    start = 0
    while start < len(columns):
        end, used = start, first
        while end < len(columns) and (end == start or used + widths[end] + 1 <= width):
            used, end = used + widths[end] + 1, end + 1
        for number, (label, _) in enumerate(figure.rows):
            shown = " ".join(_padded(columns[k][number], widths[k]) for k in range(start, end))
            lines.append(f"{_padded(label, first)} {shown}".rstrip())
        start = end
    return lines


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(cells(row[k]) for row in rows) for k in range(len(rows[0]))]
    return ["  ".join(_padded(text, width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _bars(figure: Bars, width: int) -> list[str]:
    """Return the bars, side by side where there is room, since a model may have many blocks."""
    most, label = max((value for _, value in figure.bars), default=0.0), max(cells(name) for name, _ in figure.bars)
    shown = [
        f"{_padded(name, label)} {'█' * round(BAR * value / most) if most else '':<{BAR}} {short(value):<9}"
        for name, value in figure.bars
    ]
    columns = max(1, (width + 2) // (len(shown[0]) + 2))
    height = -(-len(shown) // columns)
    lines = ["  ".join(shown[row::height]).rstrip() for row in range(height)]
    return [figure.caption, *lines]
