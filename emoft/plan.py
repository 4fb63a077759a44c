"""`train.py --plan`: what a training will use and take, before it begins.

The loop of train.py computes a few steps, the largest among them, with weights that are thrown away afterwards. So what
is told of memory and time is measured on what will run; only what would take too long is computed from that.
"""

import contextlib
import itertools
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from transformers import GPT2LMHeadModel

from emoft import device as devices
from emoft.checkpoints.state import TrainingState
from emoft.config import TrainConfig
from emoft.data.batching import IGNORED
from emoft.data.duplicates import distinct_share, overlap
from emoft.data.spelling import spell
from emoft.data.steps import Step, StepLoader
from emoft.data.tokens import cut_share
from emoft.errors import UserError, is_out_of_memory
from emoft.evaluate.classification import classify
from emoft.evaluate.scoring import evaluate
from emoft.gradients.monitor import GradientMonitor
from emoft.hints import less_memory
from emoft.model.generation import sample_texts
from emoft.model.loading import TextModel
from emoft.start import STARTED
from emoft.terminal import Bar, clock
from emoft.tracking.run_state import RunState
from emoft.training.contrast import LabelContrast
from emoft.training.runtime import Runtime

WARMUP_STEPS = 2  # whose shapes are new
LEAST_STEPS, MOST_STEPS, ENOUGH_SECONDS = 3, 150, 5.0  # of measuring the time of a step
EVALUATED = 64  # texts, for the time of an evaluation
WRITTEN = 64 << 20  # bytes, for the rate of the disk


class Activations:
    """Counts, while its context is open, what forward passes keep for their backward passes, in bytes."""

    def __init__(self, model: GPT2LMHeadModel) -> None:
        parameters = list(model.parameters())
        self._weights = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self._shapes = {shape for p in parameters for shape in (p.shape, torch.Size(reversed(p.shape)))}
        self._vocabulary = model.config.vocab_size
        self._seen: set[int] = set()
        self.of_texts = self.logits = self.half_weights = 0

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count anew what is kept in this context."""
        self.of_texts = self.logits = self.half_weights = 0
        self._seen = set(self._weights)
        with torch.autograd.graph.saved_tensors_hooks(self._count, lambda kept: kept):
            yield

    def _count(self, kept: Tensor) -> Tensor:
        storage = kept.untyped_storage()
        if storage.data_ptr() in self._seen:
            return kept
        self._seen.add(storage.data_ptr())
        if kept.dtype in (torch.bfloat16, torch.float16) and kept.shape in self._shapes:
            self.half_weights += storage.nbytes()  # autocast's copies
        elif kept.dim() == 2 and kept.shape[1] == self._vocabulary:
            self.logits += storage.nbytes()
        else:
            self.of_texts += storage.nbytes()
        return kept


class Plan:
    """Stands around the loop of train.py instead of `emoft.run.Run`, for a few steps, and tells what it found."""

    def __init__(
        self,
        config: TrainConfig,
        runtime: Runtime,
        text_model: TextModel,
        splits: dict[str, Dataset],
        loader: StepLoader,
        training_state: TrainingState,
        run_state: RunState,
        monitor: GradientMonitor,
        label_contrast: LabelContrast,
    ) -> None:
        """Take what `emoft.run.Run` takes; see there."""
        self.config, self.runtime, self.text_model, self.splits = config, runtime, text_model, splits
        self.loader, self.monitor, self.done = loader, monitor, run_state.step
        self.model, self.device = text_model.model, runtime.device
        self.activations = Activations(self.model)
        self.left = max(0, loader.total_steps - self.done)
        self.shards = runtime.world.size if config.parallel == "fsdp" else 1
        self.fits = True
        self.seconds: list[float] = []  # of the steps that were timed
        self.tokens: list[int] = []  # of each of them
        self.seconds_of_first = 0.0  # steps, whose shapes are new
        self.seconds_measuring = 0.0  # that a step takes longer whose gradients are measured
        self.seconds_of_start = time.perf_counter() - STARTED

    # ---- What the loop is given -------------------------------------------------------------------------------------

    def steps(self) -> Iterator[Step]:
        """Yield one micro-batch of a single text, the largest step, if it seems to fit, and then some as they come."""
        if not self.left:
            return
        with Bar("Computing a few steps"):
            devices.reset_peak_memory(self.device)
            self._begun = time.perf_counter()
            one = self._of_one_text()
            with self.activations.counted():
                yield one
            largest = next(iter(self.loader.after(self.loader.largest_step(self.done) - 1)))
            self.largest = max(largest.micro_batches, key=lambda batch: batch.inputs["input_ids"].numel())
            self.fits = self._seems_to_fit(one)
            if self.fits:
                with self.activations.counted():
                    yield largest
            if self.fits:
                yield from self._timed()

    def _of_one_text(self) -> Step:
        size, self.loader.micro_batch_size = self.loader.micro_batch_size, 1
        step = next(iter(self.loader.after(self.done)))
        self.loader.micro_batch_size = size
        step.micro_batches = step.micro_batches[:1]
        return step

    def _seems_to_fit(self, one: Step) -> bool:
        """Judge by what a single text keeps, so that memory need not run out to know that it would."""
        found, small, large = self.activations, one.micro_batches[0], self.largest
        found.of_texts = round(found.of_texts * large.inputs["input_ids"].numel() / small.inputs["input_ids"].numel())
        found.logits = round(found.logits * len(large.predicting) / max(1, len(small.predicting)))
        gradients = sum(p.numel() * p.element_size() for p in self.model.parameters()) // self.shards
        free = devices.free_memory(self.device)
        return free is None or found.of_texts + found.logits + gradients < free

    def _timed(self) -> Iterator[Step]:
        again_and_again = (self.loader.after(self.done) for _ in itertools.count())  # a small split has few steps
        before = begun = time.perf_counter()
        for number, step in enumerate(itertools.chain.from_iterable(again_and_again), start=-WARMUP_STEPS):
            yield step
            devices.synchronize(self.device)
            now = time.perf_counter()
            if number == -1:
                begun, self.seconds_of_first = now, now - self._begun
            elif number >= 0:
                self.seconds.append(now - before)  # with the making of its batch
                self.tokens.append(int(step.lengths.sum()))
                if number >= MOST_STEPS or (number >= LEAST_STEPS and now - begun > ENOUGH_SECONDS):
                    break
            if not self.fits:
                return
            before = now
        if self.config.log_gradients_every:
            step.number = self.config.log_gradients_every  # one of those that are measured
            before = time.perf_counter()
            with self.monitor.watching(step):
                yield step
                self.monitor.take_figures()
            self.seconds_measuring = max(0.0, time.perf_counter() - before - self.seconds_of_a_step())

    @contextlib.contextmanager
    def attempt(self, step: Step) -> Iterator[None]:
        """Let the loop compute a step in this context; see that it may not fit in memory."""
        step.loss_scale = self.runtime.precision.scaler.get_scale()
        try:
            yield
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.fits = False

    def refuse_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Let each step be applied: nobody keeps these weights."""
        return False

    def finish_step(self, step: Step, loss: Tensor, grad_norm: Tensor) -> bool:
        """Go on as long as there are steps."""
        return False

    # ---- What it tells ----------------------------------------------------------------------------------------------

    def finish(self) -> int:
        """Print the plan; the exit code of a training."""
        with Bar("Evaluating some texts"):
            times = self._times() if self.fits and self.left else {}
        parts = {"Data": self._data(), "Example": self._example(), "Memory": self._memory(), "Disk": self._disk()}
        if times:
            parts["Time"] = [("all", _about(sum(times.values())))] + [(name, _about(s)) for name, s in times.items()]
        lines = []
        for title, rows in parts.items():
            width = max((len(name) for name, _ in rows), default=0)
            lines += ["", title, *(f"  {name:{width}}  {text}" for name, text in rows)]
        print("\n".join([*lines, "", f"{self._verdict()}; this was a plan: nothing was trained or written"]))
        return 0

    def _data(self) -> list[tuple[str, str]]:
        rows, loader = [], self.loader
        for name, split in self.splits.items():
            found = [f"{len(split):,} texts", f"{cut_share(split, self.config.max_length):.1%} of them cut"]
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
                f"{loader.examples_per_step} texts, {per_epoch / loader.steps_per_epoch:,.0f} tokens on average, in"
                f" micro-batches of at most {loader.micro_batch_size}, {self.config.batching}",
            )
        )
        rows.append(("an epoch", f"{per_epoch:,} tokens, {loader.steps_per_epoch:,} steps"))
        epochs = self.left / loader.steps_per_epoch
        rows.append(("the run", f"{self.left:,} steps, {epochs:.4g} epochs, {round(per_epoch * epochs):,} tokens"))
        return rows

    def _example(self) -> list[tuple[str, str]]:
        """Show a text as the model is given it; in brackets what it reads and never has to predict."""
        first = next(iter(self.loader.after(0)))
        batch, tokenizer = first.micro_batches[0], self.text_model.tokenizer
        own = batch.owners() == 0
        ids, labels = batch.inputs["input_ids"][own].tolist(), batch.labels[own].tolist()
        pieces = [
            f"[{piece}]" if label == IGNORED else piece
            for piece, label in zip(spell(tokenizer, ids), labels, strict=True)
        ]
        row = self.splits["train"][first.examples[0]]
        filled = self.text_model.text_format.fill(row["text"], row.get("label", ""))
        return [("text", filled), ("tokens", " ".join(pieces)), ("ids", " ".join(map(str, ids)))]

    def _memory(self) -> list[tuple[str, str]]:
        parameters = sum(p.numel() for p in self.model.parameters())
        weights = sum(p.numel() * p.element_size() for p in self.model.parameters()) // self.shards
        rows = [
            ("parameters", f"{parameters:,}, {_size(weights)}; the same again for their gradients"),
            ("AdamW's moments", _size(2 * weights)),
        ]
        if not self.left:
            return rows
        found, how = self.activations, "" if self.fits else ", estimated from a single text"
        if found.half_weights:
            rows.append((f"weights in {self.runtime.precision.name}", _size(found.half_weights)))
        tokens, targets = self.largest.inputs["input_ids"].numel(), len(self.largest.predicting)
        rows.append(("activations", f"{_size(found.of_texts)} of the largest micro-batch, {tokens:,} tokens{how}"))
        rows.append(("logits", f"{_size(found.logits)} of its {targets:,} targets{how}"))
        free = devices.free_memory(self.device)
        left = "" if free is None else f"; {_size(free)} more can be had"
        peak = devices.peak_memory(self.device) if self.fits else None
        if peak is not None:
            rows.append(("all, at most", f"{_size(peak)} with the libraries, measured{left}"))
        elif free is not None:
            rows.append(("free", _size(free)))
        return rows

    def seconds_of_a_step(self) -> float:
        """Return the seconds of a step of average length, of those that were timed: a constant and a time a token."""
        tokens, seconds = np.array(self.tokens, float), np.array(self.seconds)
        average = float(self.loader.lengths.sum()) / self.loader.steps_per_epoch
        if len(tokens) > 2 and np.ptp(tokens) > 0:
            slope, constant = np.polyfit(tokens, seconds, 1)
            if slope > 0 and constant > 0:
                return float(slope * average + constant)
        return float(seconds.mean())

    def _times(self) -> dict[str, float]:
        config, loader = self.config, self.loader
        times = {"start": self.seconds_of_start + self.seconds_of_first}
        times[f"{self.left:,} steps"] = self.left * self.seconds_of_a_step()
        if every := config.log_gradients_every:
            looks = loader.total_steps // every - self.done // every
            times[f"{looks:,} looks at the gradients"] = looks * self.seconds_measuring
        labels = self.text_model.text_format.labels if self.text_model.text_format.has_label else []
        for name, count, classified in (("validation", self._evaluations(), 1 + (self.done == 0)), ("test", 1, 1)):
            if name in self.splits:
                seconds = self._seconds_of(name, self._evaluate)
                times[f"{count} evaluations of {name}"] = count * seconds
                if len(labels) > 1:
                    times[f"emotions told of {name}"] = classified * self._seconds_of(name, self._classify, len(labels))
        samples = 1 + (loader.total_steps // config.sample_every if config.sample_every else 0)
        times[f"{samples:,} rounds of samples"] = samples * devices.seconds_of(
            lambda: sample_texts(self.text_model, config.seed), self.device
        )
        of_checkpoint, of_model = self._sizes()
        written = self._checkpoints() * of_checkpoint + of_model
        times["saving"] = written / _disk_rate(Path(config.output_dir))
        return times

    def _evaluations(self) -> int:
        if "validation" not in self.splits:
            return 0
        total, every = self.loader.total_steps, self.config.eval_steps or self.loader.steps_per_epoch
        return total // every - self.done // every + (total % every > 0) + (self.done == 0)

    def _evaluate(self, rows: Dataset) -> object:
        batch_size = self.config.per_device_eval_batch_size
        return evaluate(self.text_model, rows, self.runtime, batch_size, self.config.batching)

    def _classify(self, rows: Dataset) -> object:
        return classify(self.text_model, rows, self.runtime, self.config.per_device_eval_batch_size)

    def _seconds_of(self, name: str, function: Callable[[Dataset], object], share: int = 1) -> float:
        """Return the seconds of a function of a split, from some of its texts: as many as take a second or two."""
        rows = self.splits[name]
        count = max(1, EVALUATED // share)
        while True:
            some = rows.select(range(min(count, len(rows))))
            seconds = devices.seconds_of(lambda: function(some), self.device)  # noqa: B023
            if seconds > 0.5 or len(some) == len(rows):
                return seconds * len(rows) / len(some)
            count *= 4

    def _checkpoints(self) -> int:
        """Return how many are written at most: each evaluation may find the best model so far."""
        config = self.config
        count = (
            self.loader.total_steps // config.save_steps - self.done // config.save_steps if config.save_steps else 0
        )
        return count + (self._evaluations() - (self.done == 0) if config.load_best_model_at_end else 0)

    def _sizes(self) -> tuple[int, int]:
        """Return the bytes of a checkpoint, with AdamW's two moments, and of a model."""
        of_model = sum(p.numel() * 4 for p in self.model.parameters())
        return 3 * of_model, of_model

    def _disk(self) -> list[tuple[str, str]]:
        of_checkpoint, of_model = self._sizes()
        count, limit = self._checkpoints(), self.config.save_total_limit
        kept = min(count, limit or count)
        # A new one is written before an old one is deleted.
        most, free = of_checkpoint * (kept + (count > kept)) + of_model, _free_disk(Path(self.config.output_dir))
        self.has_room = most < free
        return [
            ("a checkpoint", f"{_size(of_checkpoint)}; at most {count:,} are written and {kept:,} kept"),
            ("all, at most", f"{_size(most)}; {_size(free)} are free"),
        ]

    def _verdict(self) -> str:
        if not self.has_room:
            return "The disk has too little room: free some, lower --save_total_limit, or name another --output_dir"
        if not self.left:
            return "No step is left"
        if self.fits:
            return "This fits"
        changes, _ = less_memory(self.config, self.loader.micro_batch_size)
        return f"This does not fit in memory: {' '.join(changes)} needs less and computes the same"


def _disk_rate(output_dir: Path) -> float:
    """Return the bytes a second that can be written where the run will be.

    Raises:
        UserError: nothing can.
    """
    zeros = bytes(WRITTEN)
    try:
        with tempfile.TemporaryFile(dir=_existing(output_dir)) as file:
            started = time.perf_counter()
            file.write(zeros)
            file.flush()
            os.fsync(file.fileno())
            return WRITTEN / (time.perf_counter() - started)
    except OSError as error:
        raise UserError(f"--output_dir {output_dir} cannot be written ({error.strerror}): name another") from None


def _free_disk(output_dir: Path) -> int:
    return shutil.disk_usage(_existing(output_dir)).free


def _existing(folder: Path) -> Path:
    return next(each for each in (folder, *folder.absolute().parents) if each.is_dir())


def _size(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**29 else f"{count / 2**20:.1f} MiB"


def _about(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 60 else clock(seconds)
