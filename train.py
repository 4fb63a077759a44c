"""Fine-tune GPT-2 on short emotional texts: `python train.py --help` lists the flags, the README explains them.

Read from top to bottom: `train` sets up, loops over optimizer steps, and finishes; each helper it calls is one module
of emoft/. The loop itself is all here.
"""

import dataclasses
import logging
import math
import shlex
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft import errors
from emoft.attention import use_packed_attention
from emoft.batching import Batch, build_loader, epoch_batches, length_sorted_batches
from emoft.checkpoint import (
    capture_state,
    find_checkpoint,
    load_state,
    prepare_output_dir,
    remove_old_checkpoints,
    restore_state,
    save_checkpoint,
)
from emoft.config import TrainConfig, parse_config, save_config
from emoft.data import read_splits, tokenize
from emoft.evaluate import evaluate
from emoft.kernels import keep_freed_memory, use_fast_kernels
from emoft.loss import summed_cross_entropy
from emoft.machine import measure_flops
from emoft.model import load_model, load_model_and_tokenizer, save_model
from emoft.optim import build_optimizer, build_schedule, clip_gradients, skip_if_not_finite
from emoft.precision import Precision, choose_device
from emoft.sampling import sample_texts
from emoft.signals import StopSignals
from emoft.template import TextFormat
from emoft.tracking import RESULTS_FILE, RunState, Tracker, write_json

Loaded = tuple[GPT2LMHeadModel, GPT2Tokenizer, TextFormat, dict[str, Dataset]]


def load_model_and_data(config: TrainConfig, checkpoint: Path | None) -> Loaded:
    """Return the model, its tokenizer, the format of its texts, and the tokenized splits."""
    splits, text_format = read_splits(config)
    texts = (text_format.fill(**row) for row in splits["train"])
    if checkpoint:
        config = dataclasses.replace(config, model_name_or_path=str(checkpoint), config_overrides="", tokenizer_name="")
    model, tokenizer = load_model_and_tokenizer(config, texts)
    return (
        model,
        tokenizer,
        text_format,
        {name: tokenize(s, tokenizer, text_format, name) for name, s in splits.items()},
    )


def train(config: TrainConfig, load: Callable[[TrainConfig, Path | None], Loaded] = load_model_and_data) -> int:
    """Run a training from its configuration to its saved model.

    Args:
        config: all flags.
        load: gives the model and the data; the benchmark draws both.

    Returns:
        The exit code: 0, or 130 or 143 if a signal stopped the run after saving.

    Raises:
        UserError: something the user can mend; before the first step wherever possible.
    """
    # ---- Set up: data, model, optimizer, schedule, precision -------------------------------------------------------
    device = choose_device(config.use_cpu)
    keep_freed_memory()
    checkpoint = find_checkpoint(config)
    saved = load_state(checkpoint, config) if checkpoint else None
    torch.manual_seed(config.seed)

    model, tokenizer, text_format, tokenized = load(config, checkpoint)
    train_data = tokenized["train"]
    can_evaluate = "validation" in tokenized
    if not can_evaluate and (config.eval_steps or config.early_stopping_patience):
        raise errors.UserError("--eval_steps and --early_stopping_patience need data to evaluate on: --validation_file")

    micro_batch_size, accumulation = config.per_device_train_batch_size, config.gradient_accumulation_steps
    steps_per_epoch = math.ceil(len(train_data) / (micro_batch_size * accumulation))
    total_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)

    model.to(device)  # type: ignore[arg-type]  # a fault of the library's types
    model.train()
    use_packed_attention(model)
    use_fast_kernels(model)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable()
    # Compiled, it is another object around the same weights: checkpoints, evaluation and samples use the plain model.
    transformer = torch.compile(model.transformer, dynamic=True) if config.torch_compile else model.transformer
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, total_steps)
    precision = Precision(config.mixed_precision, device)
    scaler = precision.scaler
    run = RunState()
    if saved:
        restore_state(saved, optimizer, schedule, precision)
        run = RunState(**saved["run"])

    def loader_of(split: str) -> DataLoader[Batch]:
        batches = length_sorted_batches(tokenized[split], config.per_device_eval_batch_size)
        return build_loader(tokenized[split], batches, tokenizer.eos_token_id, device, config.batching)

    def save() -> Path:
        state = capture_state(config, optimizer, schedule, precision, tracker.state_for_checkpoint())
        folder = save_checkpoint(output_dir, run.step, write_model, state)
        best_step = run.best_step if config.load_best_model_at_end else None
        remove_old_checkpoints(output_dir, config.save_total_limit, best_step)
        return folder

    def write_model(folder: Path) -> None:
        save_model(folder, model, tokenizer, text_format)
        tracker.write_state(folder)

    output_dir = prepare_output_dir(config)
    save_config(config, output_dir / "train_config.yaml")
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {device} ({precision.name}),"
        f" {len(train_data):,} examples, {total_steps:,} steps of"
        f" {micro_batch_size} x {accumulation} examples, into {output_dir}"
    )

    # ---- The loop ---------------------------------------------------------------------------------------------------
    done = run.step >= total_steps  # a resumed run may have only its end to write
    stopped_early = False
    faults = torch.zeros((), device=device)  # steps refused because their gradient was not finite
    tracker = Tracker(config, run, total_steps, steps_per_epoch, model.config, measure_flops(precision), device)
    with StopSignals() as signals, tracker:
        while not done:
            # An epoch, or the rest of one: its order is known from seed and epoch, so a resumed run starts right here.
            epoch, steps_done = divmod(run.step, steps_per_epoch)
            batches = epoch_batches(len(train_data), micro_batch_size, config.seed, epoch)[steps_done * accumulation :]
            loader = build_loader(train_data, batches, tokenizer.eos_token_id, device, config.batching)
            micro_batches = iter(loader)

            # Fetch the micro-batches of this step and count their labelled tokens, on the CPU, where they still are.
            while not done and (step_batches := list(islice(micro_batches, accumulation))):
                step_tokens = sum(batch.target_tokens for batch in step_batches)

                # Forward and backward. Each micro-batch adds its part to the mean over all tokens of the step, so
                # that 4 x 1, 2 x 2 and 1 x 4 examples give the same gradient, whatever their lengths. The head works
                # where there is a target only; the collation has shifted the labels by one.
                step_loss = torch.zeros((), device=device)
                for batch in step_batches:
                    batch = batch.to(device)
                    with precision.autocast():
                        hidden = transformer(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, C)
                        loss = summed_cross_entropy(hidden, model.lm_head.weight, batch.predicting, batch.targets)
                    loss = loss / max(1, step_tokens)
                    scaler.scale(loss).backward()
                    step_loss += loss.detach()

                # Take the loss scale out of the gradients once, now that they are complete; measure and clip them.
                scaler.unscale_(optimizer)
                grad_norm = clip_gradients(optimizer, config.max_grad_norm)

                # Refuse a gradient that is not finite: weights and optimizer must stay as they are. fp16's scaler does
                # so by itself and lowers its scale; otherwise the optimizer is told to skip, and the run ends below.
                if not scaler.is_enabled():
                    faults += skip_if_not_finite(optimizer, grad_norm)

                # Update the weights, the loss scale and the learning rate. Optimizers skip silently: only the fallen
                # scale tells, and a step that changed nothing must not use up the schedule.
                scale, learning_rate = scaler.get_scale(), float(schedule.get_last_lr()[0])  # in fp16 a sync point
                scaler.step(optimizer)
                scaler.update()
                skipped = scaler.get_scale() < scale
                if not skipped:
                    schedule.step()
                optimizer.zero_grad(set_to_none=True)
                tracker.count_step(step_loss, step_batches, skipped)

                # Log, evaluate, save, stop if asked to. Reading a number from a GPU waits until it is computed (a sync
                # point): a step that logs nothing reads none.
                is_last = run.step >= total_steps
                should_log = is_last or run.step % config.logging_steps == 0
                should_evaluate = can_evaluate and (is_last or run.step % (config.eval_steps or steps_per_epoch) == 0)
                should_save = config.save_steps > 0 and run.step % config.save_steps == 0
                if (device.type == "cpu" or should_log or should_evaluate or should_save) and faults:
                    raise not_finite_error(run.step, step_loss, output_dir)
                if should_log:
                    fp16 = {"loss_scale": scale, "skipped_steps": run.skipped_steps} if scaler.is_enabled() else {}
                    tracker.log_step(grad_norm, learning_rate=learning_rate, **fp16)
                if should_evaluate:
                    with tracker.clock_stopped():
                        is_best = tracker.log_evaluation(evaluate(model, loader_of("validation"), precision))
                    should_save |= is_best and config.load_best_model_at_end
                    stopped_early = 0 < config.early_stopping_patience <= run.evaluations_since_best
                stop_signal = signals.received  # asked once: the answer may change between two looks
                if should_save or stop_signal:
                    with tracker.clock_stopped():
                        folder = save()
                done = is_last or stopped_early or stop_signal is not None

    if run.step < total_steps and not stopped_early:
        print(f"stopped by {signals.name} after step {run.step} and saved {folder}; to go on, run:")
        print(f"  {resume_command(config)}")
        return signals.exit_code

    # ---- Finish: the best model, its figures, a few texts -----------------------------------------------------------
    if stopped_early:
        print(f"stopped early: {run.evaluations_since_best} evaluations without a better loss than at {run.best_step}")
    if config.load_best_model_at_end and 0 < run.best_step < run.step:
        model.load_state_dict(load_model(str(output_dir / f"checkpoint-{run.best_step}")).state_dict())
        print(f"took the model of step {run.best_step}, the best")
    results = tracker.results()
    if "test" in tokenized:
        test = evaluate(model, loader_of("test"), precision)
        results |= {"test_loss": test.loss, "test_perplexity": test.perplexity}
    write_model(output_dir)
    write_json(output_dir / RESULTS_FILE, results)
    print("\n".join(f"{name:26} {value:,.4f}" for name, value in results.items()))
    for text in sample_texts(model, tokenizer, text_format, config.seed):
        print(text)
    print(f"saved the model in {output_dir}; generate with: python generate.py --model_name_or_path {output_dir}")
    return 0


def resume_command(config: TrainConfig) -> str:
    """Return the command that continues a run that was stopped."""
    words = [word for word in sys.argv if word != "--overwrite_output_dir"]
    if config.resume_from_checkpoint != "latest":
        words += ["--resume_from_checkpoint", "latest"]  # of a flag given twice the last one counts
    return shlex.join(["python", *words])


def not_finite_error(step: int, loss: torch.Tensor, output_dir: Path) -> errors.UserError:
    """Return the error that ends a run whose loss or gradient became infinite or NaN."""
    return errors.UserError(
        f"step {step}: loss {loss.item():.4g}, and a gradient that is not finite since the last log entry; no such step"
        f" was applied, and the checkpoints in {output_dir} are sound: lower --learning_rate, or raise --warmup_steps"
    )


def main() -> int:
    """Read the flags and train."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and saving, which take a moment
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are told by our own
    return train(parse_config(TrainConfig))


if __name__ == "__main__":
    errors.run(main)
