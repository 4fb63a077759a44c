"""A plan in words: the data, an example, memory, the disk, the time, and whether it fits."""

from emoft import device as devices
from emoft.data.batching import IGNORED
from emoft.data.duplicates import overlap
from emoft.data.spelling import spell
from emoft.data.tokenized import cut_share, distinct_share
from emoft.hints import less_memory
from emoft.plan.disk import Disk
from emoft.plan.measured import Measured
from emoft.plan.times import tokens_of_a_step
from emoft.run.setup import Setup
from emoft.terminal import clock

Rows = list[tuple[str, str]]  # names and what is told of them


def report(setup: Setup, measured: Measured, disk: Disk, times: dict[str, float]) -> str:
    """Return a plan.

    Args:
        setup: of the run.
        measured: on a few steps of it.
        disk: what it needs of it.
        times: of `times_of`; none of a run that does not fit, or of which nothing is left.
    """
    parts = {
        "Data": _data(setup),
        "Example": _example(setup),
        "Memory": _memory(setup, measured),
        "Disk": _disk(disk),
    }
    if times:
        parts["Time"] = [("all", _about(sum(times.values())))] + [(name, _about(s)) for name, s in times.items()]
    lines = []
    for title, rows in parts.items():
        width = max((len(name) for name, _ in rows), default=0)
        lines += ["", title, *(f"  {name:{width}}  {text}" for name, text in rows)]
    verdict = _verdict(setup, measured, disk)
    return "\n".join([*lines, "", f"{verdict}; this was a plan: nothing was trained or written"])


def _data(setup: Setup) -> Rows:
    rows, loader = [], setup.loader
    for name, split in setup.splits.items():
        found = [f"{len(split):,} texts", f"{cut_share(split, setup.config.max_length):.1%} of them cut"]
        found.append(f"{1 - distinct_share(split):.1%} the same as an earlier one")
        in_train = overlap(split)
        if in_train is not None:
            found.append(f"{in_train.mean():.1%} in train too")
        rows.append((name, ", ".join(found)))
    lengths = loader.lengths
    per_epoch = int(lengths.sum())
    rows.append(("a text", f"{lengths.mean():.1f} tokens on average, {lengths.max()} at most"))
    rows.append(
        (
            "a step",
            f"{loader.examples_per_step} texts, {tokens_of_a_step(setup):,.0f} tokens on average, in"
            f" micro-batches of at most {loader.micro_batch_size}, {setup.config.batching}",
        )
    )
    rows.append(("an epoch", f"{per_epoch:,} tokens, {loader.steps_per_epoch:,} steps"))
    epochs = setup.steps_left / loader.steps_per_epoch
    rows.append(("the run", f"{setup.steps_left:,} steps, {epochs:.4g} epochs, {round(per_epoch * epochs):,} tokens"))
    return rows


def _example(setup: Setup) -> Rows:
    """Show a text as the model is given it; in brackets what it reads and never has to predict."""
    first = next(iter(setup.loader.after(0)))
    batch, tokenizer = first.micro_batches[0], setup.text_model.tokenizer
    own = batch.owners() == 0
    ids, labels = batch.inputs["input_ids"][own].tolist(), batch.labels[own].tolist()
    pieces = [
        f"[{piece}]" if label == IGNORED else piece for piece, label in zip(spell(tokenizer, ids), labels, strict=True)
    ]
    row = setup.splits["train"][first.examples[0]]
    filled = setup.text_model.text_format.fill(row["text"], row.get("label", ""))
    return [("text", filled), ("tokens", " ".join(pieces)), ("ids", " ".join(map(str, ids)))]


def _memory(setup: Setup, measured: Measured) -> Rows:
    model = setup.text_model.model
    parameters = sum(p.numel() for p in model.parameters())
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) // setup.shards
    rows = [
        ("parameters", f"{parameters:,}, {_size(weights)}; the same again for their gradients"),
        ("AdamW's moments", _size(2 * weights)),
    ]
    if measured.largest is None:
        return rows
    found, how = measured.activations, "" if measured.fits else ", estimated from a single text"
    if found.half_weights:
        rows.append((f"weights in {setup.runtime.precision.name}", _size(found.half_weights)))
    tokens, targets = measured.largest.inputs["input_ids"].numel(), len(measured.largest.predicting)
    rows.append(("activations", f"{_size(found.of_texts)} of the largest micro-batch, {tokens:,} tokens{how}"))
    rows.append(("logits", f"{_size(found.logits)} of its {targets:,} targets{how}"))
    free = devices.free_memory(setup.runtime.device)
    left = "" if free is None else f"; {_size(free)} more can be had"
    peak = devices.peak_memory(setup.runtime.device) if measured.fits else None
    if peak is not None:
        rows.append(("all, at most", f"{_size(peak)} with the libraries, measured{left}"))
    elif free is not None:
        rows.append(("free", _size(free)))
    return rows


def _disk(disk: Disk) -> Rows:
    written = f"at most {disk.checkpoints:,} are written and {disk.kept:,} kept"
    return [
        ("a checkpoint", f"{_size(disk.of_checkpoint)}; {written}"),
        ("all, at most", f"{_size(disk.most)}; {_size(disk.free)} are free"),
    ]


def _verdict(setup: Setup, measured: Measured, disk: Disk) -> str:
    if not disk.has_room:
        return "The disk has too little room: free some, lower --save_total_limit, or name another --output_dir"
    if not setup.steps_left:
        return "No step is left"
    if measured.fits:
        return "This fits"
    changes, _ = less_memory(setup.config, setup.loader.micro_batch_size)
    return f"This does not fit in memory: {' '.join(changes)} needs less and computes the same"


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _about(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
