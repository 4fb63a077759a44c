"""The numbers of a step as a story in ten parts: sentences, figures, the lines of train.py, formulas and sources."""

import math
import re
from dataclasses import dataclass, field
from pathlib import Path

import train
from emoft.sentences import Sentences
from emoft.step.numbers import Agreement, Numbers


@dataclass(frozen=True)
class Aligned:
    """Lines whose cells stand below each other."""

    caption: str
    rows: list[tuple[str, list[str]]]  # what each line holds, and its cells; "" where there is none
    colored: bool = False  # whether a cell of one line belongs to that of the next line, one place on


@dataclass(frozen=True)
class Table:
    """A table with a line of headings."""

    header: list[str]
    rows: list[list[str]]


@dataclass(frozen=True)
class Bars:
    """Bars as long as their values, all from 0."""

    caption: str
    bars: list[tuple[str, float]]


@dataclass(frozen=True)
class Picture:
    """Where each place (line) looks (column), as a share of 1; drawn on the page only."""

    caption: str
    tokens: list[str]
    shares: list[list[float]]


Figure = Aligned | Table | Bars | Picture


@dataclass(frozen=True)
class Check:
    """Two numbers that must agree, in words."""

    text: str
    holds: bool


@dataclass(frozen=True)
class Part:
    """A part of the story."""

    title: str
    sentences: str
    figures: list[Figure]
    code: list[str]  # lines of train.py
    formula: str
    source: str
    checks: list[Check] = field(default_factory=list)


@dataclass(frozen=True)
class Story:
    """All of it."""

    title: str
    about: str
    parts: list[Part]
    ending: str
    language: str
    labels: dict[str, str]  # of what stands in each part


FORMULAS = {
    "texts": ("text -> bytes -> pieces of words -> ids", "byte-level BPE: Sennrich et al., 2016; Radford et al., 2019"),
    "row": ("softmax(Q K^T / sqrt(d) + mask) V; the mask is -inf at later places", "Vaswani et al., 2017, section 3.2"),
    "shift": ("target[t] = token[t + 1]", "Bengio et al., 2003: p(text) = product of p(token | tokens before)"),
    "loss": ("loss = (1 / N) sum of -ln softmax(h W^T)[target]", "cross-entropy; perplexity = e^loss"),
    "backward": (
        "dL/dw = (L(w + e) - L(w - e)) / 2e for a small e",
        "Rumelhart et al., 1986; tied head: Press and Wolf, 2017",
    ),
    "precision": ("gradient = unscale(d(scale * L)/dw)", "Micikevicius et al., 2018"),
    "clipping": ("g <- g * min(1, limit / |g|)", "Pascanu et al., 2013"),
    "accumulation": ("sum over micro-batches of sum(losses) / N", "Goyal et al., 2017, section 2.3"),
    "adamw": (
        "m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w = w - lr (m' / (sqrt(v') + eps) + d w)",
        "Kingma and Ba, 2015, algorithm 1; Loshchilov and Hutter, 2019",
    ),
    "after": ("L(w + u) - L(w) = g . u + terms of higher order", "Taylor, 1715"),
}
# By part, expressions that find the lines of train.py's loop that do it.
LINES = {
    "texts": [r"for step in run\.steps"],
    "row": [r"\bhidden = "],
    "shift": [r"\btargets = "],
    "loss": [r"\blosses = ", r"\bloss = "],
    "backward": [r"\.backward\("],
    "precision": [r"precision\.autocast\(", r"scaler\.unscale_\("],
    "clipping": [r"\bgrad_norm = "],
    "accumulation": [r"in enumerate\(step\.micro_batches"],
    "adamw": [r"scaler\.step\(", r"schedule\.step\("],
    "after": [r"optimizer\.zero_grad\(", r"run\.finish_step\("],
}


def lines_of_the_loop(part: str) -> list[str]:
    """Return the lines of train.py, as it is now, that do a part of a step; without their comments."""
    lines = [line.partition("#")[0].strip() for line in Path(train.__file__).read_text(encoding="utf-8").splitlines()]
    start = next((number for number, line in enumerate(lines) if re.search(LINES["texts"][0], line)), 0)
    # What only lets go of a value computes nothing.
    computing = [line for line in lines[start:] if not line.endswith("= None")]
    found = (next((line for line in computing if re.search(piece, line)), "") for piece in LINES[part])
    return [line for line in found if line]


def short(number: float) -> str:
    """Return a number to four digits."""
    return f"{number:.4g}"


def tell(numbers: Numbers, language: str) -> Story:
    """Return the story of a step in a language."""
    say = Sentences(language)
    figures = _figures(numbers, say)
    values = _values(numbers, say)
    checks = _checks(numbers, say)
    parts = []
    for name, (formula, source) in FORMULAS.items():
        text = say(f"step.{name}.say", **values)
        parts.append(
            Part(
                say(f"step.{name}.title"),
                f"{text} {_also(name, numbers, say, values)}".strip(),
                figures.get(name, []),
                lines_of_the_loop(name),
                formula,
                source,
                checks.get(name, []),
            )
        )
    held = sum(each.holds for each in numbers.agreements)
    count = len(numbers.agreements)
    ending = say("step.ending.all", count=count) if held == count else say("step.ending.some", held=held, count=count)
    labels = {name: say(f"step.label.{name}") for name in ("line", "formula", "agrees", "disagrees")}
    return Story(say("step.title", **values), say("step.about", **values), parts, ending, language, labels)


def _values(n: Numbers, say: Sentences) -> dict[str, object]:
    """Return what the sentences are filled with."""
    head, inside = n.embedding_from_head**2, n.embedding_from_input**2
    return {
        "step": n.step,
        "total": f"{n.total_steps:,}",
        "epoch": f"{n.epoch + 1:.2f}",
        "parameters": f"{n.parameters:,}",
        "examples": n.examples,
        "shown": len(n.texts),
        "tokens": n.tokens,
        "layout": say(f"step.row.{n.batching}"),
        "loss_sum": f"{n.loss_sum:,.2f}",
        "loss": f"{n.loss:.4f}",
        "perplexity": short(math.exp(min(n.loss, 80))),
        "uniform": f"{n.uniform_loss:.2f}",
        "means": f"{n.mean_of_means:.4f}",
        "precision": n.precision,
        "loss_float32": f"{n.loss_float32:.6f}",
        "loss_difference": short(n.largest_loss_difference),
        "hidden_difference": f"{n.largest_hidden_difference:.2%}",
        "norm_float32": short(n.grad_norm_float32),
        "scale": f"{n.loss_scale:g}",
        "norm": short(n.grad_norm),
        "limit": f"{n.max_grad_norm:g}",
        "factor": short(n.clip_factor),
        "weight": f"{n.weight.name}[{', '.join(map(str, n.weight.index))}]",
        "gradient": short(n.weight.gradient),
        "nudge": f"{n.weight.nudge:g}",
        "head_norm": short(n.embedding_from_head),
        "input_norm": short(n.embedding_from_input),
        "head_share": f"{head / (head + inside or 1.0):.0%}",
        "rate": short(n.learning_rate),
        "t": n.weight.steps,
        "predicted": f"{n.predicted_change:+.4f}",
        "came": f"{n.loss_after - n.loss_float32:+.4f}",
        "before": f"{n.loss_float32:.4f}",
        "after": f"{n.loss_after:.4f}",
        "contrast": short(n.label_contrast),
    }


def _also(part: str, n: Numbers, say: Sentences, values: dict[str, object]) -> str:
    """Return the sentences that stand only where they are so."""
    conditions = {
        "loss": {"contrast": n.label_contrast != 0},
        "backward": {"tied": n.head_is_tied, "untied": not n.head_is_tied},
        "precision": {"float32": n.precision == "no", "lower": n.precision != "no", "scaled": n.loss_scale != 1},
        "clipping": {
            "clipped": n.clip_factor < 1,
            "not_clipped": n.clip_factor == 1 and n.max_grad_norm > 0,
            "no_limit": n.max_grad_norm == 0,
        },
        "after": {"no_rate": n.learning_rate == 0},
    }
    found = [name for name, holds in conditions.get(part, {}).items() if holds]
    return " ".join(say(f"step.{part}.{name}", **values) for name in found)


def _figures(n: Numbers, say: Sentences) -> dict[str, list[Figure]]:

    def label(name: str) -> str:
        return say(f"step.label.{name}")

    none = label("none")
    texts: list[Figure] = []
    rows: list[Figure] = []
    shifts: list[Figure] = []
    for text in n.texts:
        caption = f"{label('row')} {text.row}: {text.text}"
        texts.append(Aligned(caption, [(label("token"), text.tokens), (label("id"), [str(i) for i in text.ids])]))
        cells = [(label("token"), text.tokens), (label("position"), [str(i) for i in text.positions])]
        if text.sees:
            cells.append((label("sees"), [str(i) for i in text.sees]))
        rows.append(Aligned("", cells))
        losses = ["" if loss is None else f"{loss:.2f}" for loss in text.losses]
        targets = [none if token is None else token for token in text.target_tokens]
        shifts.append(
            Aligned("", [(label("token"), text.tokens), (label("target"), targets), (label("loss"), losses)], True)
        )
    pictures = [
        Picture(label("attention"), text.tokens, shares) for text, shares in zip(n.texts, n.attention, strict=False)
    ]
    w = n.weight
    return {
        "texts": texts,
        "row": [*rows, *pictures],
        "shift": shifts,
        "loss": [
            Table(
                [label("place"), label("likeliest"), label("target"), label("probability"), label("loss")],
                [
                    [
                        f"{n.texts[p.text].row}/{p.place} {n.texts[p.text].tokens[p.place]}",
                        "  ".join(f"{t} {c:.1%}" for t, c in zip(p.likeliest, p.probabilities, strict=True)),
                        p.target,
                        f"{p.probability:.2%}",
                        f"{p.loss:.3f}",
                    ]
                    for p in n.predictions
                ],
            )
        ],
        "backward": [Bars(label("gradient_norm"), list(n.gradient_norms.items()))],
        "accumulation": [
            Table(
                [label("cut"), label("loss"), label("norm"), label("difference")],
                [
                    [f"{c.micro_batches} x {c.size}", f"{c.loss:.6f}", f"{c.grad_norm:.6f}", f"{c.difference:.1e}"]
                    for c in n.cuts
                ],
            )
        ],
        "adamw": [
            Table(
                ["g", "m", "v", "m' = m / (1 - b1^t)", "v' = v / (1 - b2^t)", label("decay"), label("update")],
                [[short(x) for x in (w.gradient * n.clip_factor, w.m, w.v, w.m_hat, w.v_hat, w.decay, w.update)]],
            ),
            Bars(label("update_ratio"), list(n.update_ratios.items())),
        ],
    }


def _checks(n: Numbers, say: Sentences) -> dict[str, list[Check]]:
    """Return each agreement in words, under the part that it belongs to."""
    parts = {
        "targets": "shift",
        "sight": "row",
        "losses": "loss",
        "mean": "loss",
        "gradient": "backward",
        "update": "adamw",
    }
    found: dict[str, list[Check]] = {}
    for each in n.agreements:
        part = parts.get(each.name, "accumulation")
        key = "cut" if part == "accumulation" else each.name
        found.setdefault(part, []).append(Check(_in_words(each, key, say), each.holds))
    return found


def _in_words(each: Agreement, key: str, say: Sentences) -> str:
    digits = {"mean": ".6f", "gradient": ".6g", "update": ".6g"}.get(key, ".3g")
    return say(
        f"step.check.{key}",
        cut=each.name.removeprefix("cut_").replace("x", " x "),
        one=format(each.one, digits),
        other=format(each.other, digits),
        wrong=f"{each.one:.0f}",
        share=f"{each.one:.0%}",
        difference=f"{each.difference:.1e}",
        tolerance=f"{each.tolerance:.1e}",
    )
