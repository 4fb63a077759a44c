"""Fine-tune GPT-2 on short emotional texts: `python train.py --help` lists the flags, the README explains them.

Read from top to bottom: `train` sets up, loops over optimization steps, and finishes. The whole of a step stands in the
loop; what happens between two steps (log, evaluate, sample, save, stop) is decided in emoft/run/run.py.
"""

import sys

from emoft import start, streams
from emoft.config import TrainConfig

if __name__ == "__main__":
    streams.prepare(output_is_optional=True)  # a full disk of the log, or a closed terminal, is no reason to end a run
    # Here, before the imports below, which take seconds: a mistake in the flags is told at once.
    config = start.read_flags(TrainConfig, start.check_training)
    start.loading(sys.stdout)

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from emoft import errors
from emoft.checkpoints.folder import begin_output_dir, locked
from emoft.checkpoints.search import find_checkpoint
from emoft.checkpoints.state import TrainingState, examples_per_step, load_state
from emoft.data.duplicates import mark_duplicates
from emoft.data.reading import read_splits
from emoft.data.steps import StepLoader
from emoft.data.tokenized import describe_cut, tokenize
from emoft.data.tokens import check_room
from emoft.device import choose_device
from emoft.distributed.parallel import exchange_gradients
from emoft.distributed.world import World
from emoft.gradients.monitor import GradientMonitor
from emoft.model.loading import TextModel, load_model_and_tokenizer
from emoft.model.preparation import prepare
from emoft.plan.plan import Plan
from emoft.run.run import Run
from emoft.run.setup import Setup
from emoft.tracking.run_state import RunState
from emoft.training.contrast import LabelContrast
from emoft.training.loss import cross_entropy, shift_labels
from emoft.training.optimizer import build_optimizer, build_schedule, clip_in_next_step
from emoft.training.precision import Precision
from emoft.training.randomness import seed_rank
from emoft.training.runtime import Runtime
from emoft.training.signals import StopSignals
from emoft.training.threads import Threads

Loaded = tuple[TextModel, dict[str, Dataset]]


def load_model_and_data(config: TrainConfig, checkpoint: Path | None) -> Loaded:
    """Return the model with its tokenizer and the format of its texts, and the tokenized splits."""
    splits, text_format = read_splits(config)
    splits, found = mark_duplicates(splits, config.drop_duplicates, "; --drop_duplicates leaves them out of train")
    if found:
        print(found)
    texts = (text_format.fill(**row) for row in splits["train"])
    if checkpoint:
        config = dataclasses.replace(
            config, model_name_or_path=str(checkpoint), model_revision="main", config_overrides="", tokenizer_name=""
        )
    model, tokenizer = load_model_and_tokenizer(config, texts)
    check_room(tokenizer, text_format)
    tokenized = {name: tokenize(rows, tokenizer, text_format, name) for name, rows in splits.items()}
    for name, rows in tokenized.items():
        if cut := describe_cut(rows, text_format, name):
            print(cut)
    return TextModel(model, tokenizer, text_format), tokenized


def train(
    config: TrainConfig,
    world: World,
    load: Callable[[TrainConfig, Path | None], Loaded] = load_model_and_data,
    run_class: Callable[[Setup], Any] = Run,
) -> int:
    """Run a training from its configuration to its saved model.

    Args:
        config: all flags.
        world: the processes that train together, each of which runs this function; without torchrun there is one.
        load: gives the model and the data; the benchmark draws both.
        run_class: what stands around the loop: a run, a plan of one (--plan), or a step that is watched (emoft.step).

    Returns:
        The exit code: 0, or 129, 130 or 143 if a signal stopped the run after saving.

    Raises:
        UserError: something the user can mend; before the first step wherever possible.
    """
    # ---- Set up: model and data, the steps of the run, optimizer and schedule ----------------------------------------
    device = choose_device(config.use_cpu, world.local_rank)
    precision = Precision(config.mixed_precision, device)
    scaler = precision.scaler  # of the loss, in fp16; otherwise it passes everything through
    runtime = Runtime(world, precision, StopSignals(world), Threads(config.num_threads, device))
    checkpoint = world.on_main(lambda: find_checkpoint(config, world))
    saved = load_state(checkpoint, config) if checkpoint else None
    step_size = examples_per_step(config, world, saved)

    torch.manual_seed(config.seed)
    with world.first_on_host():
        text_model, splits = load(config, checkpoint)
    model, tokenizer, train_data = text_model.model, text_model.tokenizer, splits["train"]
    if world.rank > 0:
        seed_rank(config.seed, world.rank, step=0)  # the same weights as rank 0, but dropout of its own
    label_contrast = LabelContrast(config, tokenizer, text_model.text_format, train_data)
    with_rivals = label_contrast.with_rivals
    loader = StepLoader(train_data, step_size, config, world, tokenizer.eos_token_id, device, with_rivals)

    transformer = prepare(model, config, world, precision)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, loader.total_steps)
    training_state = TrainingState(config, runtime, optimizer, schedule, step_size, splits)
    run_state = training_state.restore(saved, checkpoint) if saved and checkpoint else RunState()
    saved = None  # AdamW's moments, of which the optimizer has its own copy
    monitor = GradientMonitor(model, optimizer, config, world)
    output_dir = begin_output_dir(config, world, resumes=checkpoint is not None)
    ranks = f"{world.size} processes ({config.parallel}), each on " if world.launched else ""
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks}{device} ({precision.name}),"
        f" {len(train_data):,} examples, {loader.total_steps:,} steps of {step_size} examples, into {output_dir}"
    )
    setup = Setup(config, runtime, text_model, splits, loader, training_state, run_state, monitor, label_contrast)
    run = run_class(setup)

    # ---- The loop: one optimization step after another ---------------------------------------------------------------
    for step in run.steps():  # from where a resumed run left off
        with run.attempt(step):  # one that does not fit in memory comes again, in smaller micro-batches
            hidden = losses = contrast = loss = None  # one that did not fit would keep its memory by these
            # Each micro-batch adds its part to the gradient of the mean over all tokens of the step, so that 4 x 1,
            # 2 x 2 and 1 x 4 examples give the same gradient, whatever their lengths.
            step_loss = torch.zeros((), device=device)
            for number, batch in enumerate(step.micro_batches, start=1):
                batch = batch.to(device)
                # Several ranks average their gradients in or behind the last backward pass; hence `* world.size`.
                with exchange_gradients(transformer, number == len(step.micro_batches), step.agreement):
                    with precision.autocast():
                        hidden = transformer(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, C)
                        targets = shift_labels(batch.labels)  # (B, T): place t has to predict token t + 1
                        losses = cross_entropy(hidden, model.lm_head.weight, targets, batch.predicting)  # (K,) nats
                    losses, contrast = label_contrast(losses, batch, step)  # contrast: 0 without --label_contrast
                    loss = losses.sum() / step.tokens  # of all micro-batches and ranks
                    scaler.scale((loss + contrast) * world.size).backward()
                step_loss += loss.detach()
            step_loss = world.sum(step_loss)

            scaler.unscale_(optimizer)  # once, now that the gradients are complete, and before they are measured
            grad_norm = clip_in_next_step(optimizer, config.max_grad_norm)  # AdamW clips as it reads the gradients
            monitor.measure_gradients()  # at the steps that --log_gradients_every names
            if run.refuse_step(step, step_loss, grad_norm):
                continue  # nothing is updated; one that was not finite comes again, to find where it stopped being so
            scaler.step(optimizer)
            scaler.update()
            if scaler.get_scale() >= step.loss_scale:  # it falls if fp16 overflowed, and then no weight has changed
                schedule.step()
            optimizer.zero_grad(set_to_none=True)
            if run.finish_step(step, step_loss, grad_norm):  # log, sample, evaluate, save
                break
    return run.finish()  # the best model, its figures, a few texts


def main(config: TrainConfig) -> int:
    """Connect the processes that train together, if there are several, and train."""
    start.libraries_are_loaded()
    world = World.of_environment()
    with (
        world.only_main_speaks(),
        world.connected() as world,
        locked(Path(config.output_dir)) if world.is_main and not config.plan else nullcontext(),
    ):
        return train(config, world, run_class=Plan if config.plan else Run)


if __name__ == "__main__":
    errors.run(lambda: main(config))
