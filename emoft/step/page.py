"""The story of a step as one page of HTML, which needs no network: light and dark, on paper and on a phone."""

from html import escape

from emoft.colors import colors
from emoft.step.story import Aligned, Bars, Figure, Picture, Story, Table, short

STYLE = """
:root { color-scheme: light dark; --ink: #1d2230; --paper: #fdfdfb; --soft: #5a6275; --line: #d9dce4; --fill: #f0f2f6;
  --bar: #3b6fb6; --good: #1c7a3f; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ee; --paper: #14171d; --soft: #9aa3b5; --line: #343a48;
  --fill: #1e232d; --bar: #6ea0e6; --good: #6fcf8f; --bad: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 60rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.6 system-ui, "Segoe UI", "Helvetica Neue", Arial, "Noto Sans Khmer", "Khmer OS", "Khmer Sangam MN",
  "Khmer UI", "Leelawadee UI", sans-serif; }
:lang(km) { line-height: 1.9; }
h1 { font-size: 1.5rem; line-height: 1.35; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .3rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; } .caption { color: var(--soft); font-size: .9rem; margin: .6rem 0 .2rem; }
code, pre, .cells, td { font-family: ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, "Noto Sans Khmer", "Khmer OS",
  monospace; font-size: .85rem; }
pre { background: var(--fill); padding: .5rem .7rem; margin: .5rem 0 0; white-space: pre-wrap; border-radius: .3rem; }
.formula { color: var(--soft); font-size: .88rem; margin: .2rem 0; }
.cells { display: flex; flex-wrap: wrap; gap: .25rem; margin: .3rem 0 .7rem; }
.cell { border: 1px solid var(--line); border-radius: .25rem; padding: .1rem .35rem; text-align: center;
  line-height: 1.5; }
.cell span { display: block; } .cell span + span { color: var(--soft); font-size: .78rem; }
.colored .cell span:nth-child(2) { font-size: .85rem; color: inherit; }
.colored .cell span:nth-child(-n+2) { border-radius: .2rem; padding: 0 .2rem; }
.names { color: var(--soft); font-size: .78rem; padding: .1rem 0; } .names span { display: block; line-height: 1.55; }
.wide { overflow-x: auto; } table { border-collapse: collapse; margin: .4rem 0; }
th { text-align: left; font-weight: 600; font-size: .85rem; color: var(--soft); }
th, td { padding: .15rem .8rem .15rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
.bars { display: grid; grid-template-columns: max-content 1fr max-content; gap: .15rem .6rem; max-width: 34rem;
  font-size: .85rem; align-items: center; }
.bar { background: var(--bar); height: .8rem; border-radius: .15rem; min-width: 1px; print-color-adjust: exact; }
.good, .bad { font-size: .88rem; margin: .15rem 0; padding-left: 1.3rem; text-indent: -1.3rem; }
.good::before { content: "✓ "; color: var(--good); } .bad { color: var(--bad); } .bad::before { content: "✗ "; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--ink); font: 9px ui-monospace, monospace; }
.cell, .bar, svg rect { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.ending { font-weight: 600; margin-top: 2rem; }
@media print { body { max-width: none; padding: 0; font-size: 10.5pt; --ink: #000; --paper: #fff; --soft: #444;
  --line: #bbb; --fill: #f4f4f4; --bar: #3b6fb6; } section { break-inside: avoid-page; } }
"""
HUES = 8  # colors by which a target is found again as the token of the next cell


def write_page(story: Story) -> str:
    """Return the page."""
    parts = []
    for part in story.parts:
        checks = "".join(
            f'<p class="{"good" if each.holds else "bad"}">{escape(each.text)}</p>' for each in part.checks
        )
        code = f"<pre>{escape(chr(10).join(part.code))}</pre>" if part.code else ""
        parts.append(
            f"<section><h2>{escape(part.title)}</h2><p>{escape(part.sentences)}</p>"
            f"{''.join(map(_figure, part.figures))}{checks}{code}"
            f'<p class="formula"><code>{escape(part.formula)}</code> — {escape(part.source)}</p></section>'
        )
    return (
        f'<!doctype html>\n<html lang="{story.language}"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(story.title)}</title><style>{STYLE}</style></head>\n<body><h1>{escape(story.title)}</h1>"
        f"<p>{escape(story.about)}</p>\n" + "\n".join(parts) + f'\n<p class="ending">{escape(story.ending)}</p>'
        "</body></html>\n"
    )


def _figure(figure: Figure) -> str:
    if isinstance(figure, Aligned):
        return _aligned(figure)
    if isinstance(figure, Table):
        head = "".join(f"<th>{escape(text)}</th>" for text in figure.header)
        rows = "".join(f"<tr>{''.join(f'<td>{escape(text)}</td>' for text in row)}</tr>" for row in figure.rows)
        return f'<div class="wide"><table><tr>{head}</tr>{rows}</table></div>'
    if isinstance(figure, Bars):
        return _bars(figure)
    return _picture(figure)


def _aligned(figure: Aligned) -> str:
    """Return a cell for each token; where a target is the next cell's token, both have the same color."""
    names = "".join(f"<span>{escape(label)}</span>" for label, _ in figure.rows)
    found = []
    for place, column in enumerate(zip(*(row for _, row in figure.rows), strict=True)):
        spans = []
        for line, text in enumerate(column):
            hue = ""
            if figure.colored and line < 2 and text not in ("", "-"):
                hue = f' style="background:hsl({(place + line) % HUES * 360 // HUES} 65% 60% / .33)"'
            spans.append(f"<span{hue}>{escape(text) or '&nbsp;'}</span>")
        found.append(f'<div class="cell">{"".join(spans)}</div>')
    caption = f'<p class="caption">{escape(figure.caption)}</p>' if figure.caption else ""
    kind = "cells colored" if figure.colored else "cells"
    return f'{caption}<div class="{kind}"><div class="names">{names}</div>{"".join(found)}</div>'


def _bars(figure: Bars) -> str:
    most = max((value for _, value in figure.bars), default=0.0) or 1.0
    lines = "".join(
        f'<span>{escape(name)}</span><div class="bar" style="width:{100 * value / most:.1f}%"></div>'
        f"<span>{short(value)}</span>"
        for name, value in figure.bars
    )
    return f'<p class="caption">{escape(figure.caption)}</p><div class="bars">{lines}</div>'


def _picture(figure: Picture) -> str:
    """Return a square of a color for each place that a place looks at; where it cannot look, there is none."""
    import numpy as np  # here, since the page alone needs it

    size, left, top = 14, 70, 60
    count = len(figure.tokens)
    squares, names = [], []
    shades = colors(np.array(figure.shares))
    for t, token in enumerate(figure.tokens):
        text = escape(token[:10])
        names.append(f'<text x="{left - 4}" y="{top + t * size + 10}" text-anchor="end">{text}</text>')
        x = left + t * size + 10
        names.append(f'<text x="{x}" y="{top - 4}" transform="rotate(-60 {x} {top - 4})">{text}</text>')
        for s in range(t + 1):
            red, green, blue = shades[t, s]
            squares.append(
                f'<rect x="{left + s * size}" y="{top + t * size}" width="{size - 1}" height="{size - 1}"'
                f' fill="rgb({red},{green},{blue})"><title>{text} → {escape(figure.tokens[s])}:'
                f" {figure.shares[t][s]:.1%}</title></rect>"
            )
    width, height = left + count * size + 40, top + count * size + 4
    return (
        f'<p class="caption">{escape(figure.caption)}</p><svg viewBox="0 0 {width} {height}" width="{width}"'
        f' height="{height}" role="img" aria-label="{escape(figure.caption)}">{"".join(squares)}{"".join(names)}</svg>'
    )
