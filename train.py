"""Fine-tune GPT-2 on short emotional texts: `python train.py --help` lists the flags, the README explains them.

Read from top to bottom: `train` sets up, loops over optimizer steps, and finishes; each helper it calls is one module
of emoft/. The loop itself is all here.
"""

import dataclasses
import functools
import logging
import math
import shlex
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain, islice
from pathlib import Path

import datasets
import torch
import transformers
from datasets import Dataset
from transformers import GPT2LMHeadModel, GPT2Tokenizer

from emoft import errors
from emoft.checkpoints.folder import Saver, find_checkpoint, locked, prepare_output_dir
from emoft.checkpoints.manifest import damage
from emoft.checkpoints.state import (
    capture_state,
    check_data,
    examples_per_step,
    load_state,
    restore_state,
    resume_command,
)
from emoft.config import TrainConfig, parse_config, save_config
from emoft.data.batching import build_loader, epoch_batches, target_tokens, token_lengths
from emoft.data.duplicates import mark_duplicates
from emoft.data.reading import read_splits
from emoft.data.template import TextFormat
from emoft.data.tokens import check_room, checksum, decode, tokenize, unigram_entropy
from emoft.distributed.parallel import check_parallel, exchange_gradients, load_weights, replicate, shard
from emoft.distributed.world import World
from emoft.evaluate.classification import Classification, classify
from emoft.evaluate.scoring import Evaluation, evaluate, format_figures
from emoft.files import CONFIG_FILE, fault_file
from emoft.gradients.monitor import GradientMonitor
from emoft.model.attention import use_packed_attention
from emoft.model.generation import sample_texts
from emoft.model.kernels import compiled, keep_freed_memory, use_fast_kernels
from emoft.model.loading import load_model, load_model_and_tokenizer
from emoft.tracking.run_state import RunState
from emoft.tracking.throughput import measure_flops
from emoft.tracking.tracker import Tracker
from emoft.training.contrast import WrongLabels, label_contrast
from emoft.training.loss import cross_entropy
from emoft.training.nonfinite import MOST_IN_A_ROW, Fault, NonFiniteGuard, Step, describe, refusal, trace
from emoft.training.optimizer import build_optimizer, build_schedule, clip_gradients
from emoft.training.precision import Precision, choose_device
from emoft.training.randomness import seed_rank, set_random_state
from emoft.training.signals import StopSignals

Loaded = tuple[GPT2LMHeadModel, GPT2Tokenizer, TextFormat, dict[str, Dataset]]


def load_model_and_data(config: TrainConfig, checkpoint: Path | None) -> Loaded:
    """Return the model, its tokenizer, the format of its texts, and the tokenized splits."""
    splits, text_format = read_splits(config)
    splits, found = mark_duplicates(splits, config.drop_duplicates, "; --drop_duplicates leaves them out of train")
    if found:
        print(found)
    texts = (text_format.fill(**row) for row in splits["train"])
    if checkpoint:
        config = dataclasses.replace(config, model_name_or_path=str(checkpoint), config_overrides="", tokenizer_name="")
    model, tokenizer = load_model_and_tokenizer(config, texts)
    check_room(tokenizer, text_format)
    tokenized = {
        name: tokenize(rows, tokenizer, text_format, name, keep_columns=name != "train")
        for name, rows in splits.items()
    }
    return model, tokenizer, text_format, tokenized


def train(
    config: TrainConfig, world: World, load: Callable[[TrainConfig, Path | None], Loaded] = load_model_and_data
) -> int:
    """Run a training from its configuration to its saved model.

    Args:
        config: all flags.
        world: the processes that train together, each of which runs this function; without torchrun there is one.
        load: gives the model and the data; the benchmark draws both.

    Returns:
        The exit code: 0, or 130 or 143 if a signal stopped the run after saving.

    Raises:
        UserError: something the user can mend; before the first step wherever possible.
    """
    # ---- Set up: data, model, optimizer, schedule, precision -------------------------------------------------------
    device = choose_device(config.use_cpu, world.local_rank)
    keep_freed_memory()
    checkpoint = world.on_main(lambda: find_checkpoint(config, world))
    saved = load_state(checkpoint, config) if checkpoint else None
    step_size = examples_per_step(config, world, saved)
    torch.manual_seed(config.seed)

    with world.first_on_host():
        model, tokenizer, text_format, tokenized = load(config, checkpoint)
    check_parallel(config.parallel, world, model)
    if world.rank > 0:
        seed_rank(config.seed, world.rank, step=0)  # the same weights as rank 0, but dropout of its own
    train_data, lengths = tokenized["train"], token_lengths(tokenized["train"])
    can_evaluate = "validation" in tokenized
    if not can_evaluate and (config.eval_steps or config.early_stopping_patience):
        raise errors.UserError("--eval_steps and --early_stopping_patience need data to evaluate on: --validation_file")

    wrong_labels = None
    if config.label_contrast:
        wrong_labels = WrongLabels(tokenizer, text_format, config.contrast_labels, config.seed)
        wrong_labels.check(train_data)

    steps_per_epoch = math.ceil(len(train_data) / step_size)
    total_steps = config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * steps_per_epoch)

    if config.parallel == "fsdp":
        shard(model, world, device)
    model.to(device)  # type: ignore[arg-type]  # a fault of the library's types
    model.train()
    use_packed_attention(model)
    use_fast_kernels(model)
    if config.gradient_checkpointing:
        # transformers 5.17 knows the second name only, which later versions deprecate.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    # Compiled or replicated, it is another object around the same weights: checkpoints, evaluation and samples use the
    # plain model.
    transformer = compiled(model.transformer) if config.torch_compile else model.transformer
    if config.parallel == "ddp" and world.size > 1:
        transformer = replicate(transformer, device)
    optimizer = build_optimizer(model, config)
    schedule = build_schedule(optimizer, config, total_steps)
    precision = Precision(config.mixed_precision, device)
    scaler = precision.scaler
    run, data_checksum = RunState(), checksum(train_data)
    if checkpoint and saved:
        check_data(saved, data_checksum, checkpoint, config)
        run = restore_state(saved, config, world, optimizer, schedule, precision)
        saved = None  # AdamW's moments, of which the optimizer has its own copy

    def evaluation_of(split: str) -> Evaluation | None:
        rows, batch_size = tokenized[split], config.per_device_eval_batch_size
        return evaluate(model, tokenizer, rows, precision, world, batch_size, config.batching, signals)

    def classification_of(split: str) -> Classification | None:
        """Let the model tell the emotions of a split; None without one, or without a template that names them."""
        if split not in tokenized or not text_format.has_label:
            return None
        rows, batch_size = tokenized[split], config.per_device_eval_batch_size
        return classify(model, tokenizer, text_format, rows, precision, world, batch_size, signals=signals)

    def validate() -> bool:
        """Evaluate and return whether the model is the best so far; after a signal, leave it to the resumed run."""
        run.evaluation_due = True
        with tracker.clock_stopped():
            evaluation = evaluation_of("validation")
            if evaluation is None:
                return False
            run.evaluation_due = False
            return tracker.log_evaluation(evaluation)

    def report(bad_step: Step) -> Fault:
        """Find where a step stopped being finite, and tell of it."""
        with tracker.clock_stopped():
            fault = trace(bad_step, model, precision, world)
            epoch, place = divmod(bad_step.number - 1, steps_per_epoch)
            examples = epoch_batches(len(train_data), step_size, config.seed, epoch)[place]
            texts = [decode(tokenizer, ids) for ids in fault.token_ids]
            lines = describe(fault, examples, texts, str(output_dir / fault_file(fault.step)))
            replay = {"seed": config.seed, "learning_rate": schedule.get_last_lr()[0], "precision": precision.name}
            tracker.log_fault(fault, lines, {"examples": examples, "texts": texts, "epoch": epoch, **replay})
        return fault

    def save_before(bad_step: Step, fault: Fault) -> Path | None:
        """Save the state before a step, if the run still stands there and its weights are worth going on from."""
        if run.step == 0 or bad_step.number != run.step + 1 or fault.parameters_not_finite:
            return None
        set_random_state(bad_step.random_state, device)
        return saver.save()

    output_dir = world.on_main(lambda: prepare_output_dir(config, resumes=checkpoint is not None))
    world.on_main(world.begin_run)
    world.on_main(lambda: save_config(config, output_dir / CONFIG_FILE))
    ranks = f"{world.size} processes ({config.parallel}), each on " if world.launched else ""
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters on {ranks}{device} ({precision.name}),"
        f" {len(train_data):,} examples, {total_steps:,} steps of {step_size} examples, into {output_dir}"
    )

    # ---- The loop ---------------------------------------------------------------------------------------------------
    done = run.step >= total_steps  # a resumed run may have only its end to write
    stopped_early = save_failed = False
    monitor = GradientMonitor(model, optimizer, config.log_gradients_every, world)
    guard = NonFiniteGuard(optimizer, precision, config.on_nonfinite)
    entropy, peak_flops = unigram_entropy(train_data), measure_flops(precision)
    tracker = Tracker(config, run, total_steps, steps_per_epoch, model.config, entropy, peak_flops, device, world)
    state = functools.partial(capture_state, config, world, step_size, data_checksum, optimizer, schedule, precision)
    saver = Saver(config, world, output_dir, model, tokenizer, text_format, tracker, state)
    with StopSignals(world) as signals, tracker:
        if run.evaluation_due:
            # A signal came into the evaluation of the step that the run goes on from.
            folder = checkpoint
            if validate() and config.load_best_model_at_end:
                folder = saver.save()
            stopped_early = 0 < config.early_stopping_patience <= run.evaluations_since_best
            done = done or stopped_early or run.evaluation_due
        elif run.step == 0 and can_evaluate:
            # What fine-tuning brings is the difference to this.
            validate()
            with tracker.clock_stopped():
                if found := classification_of("validation"):
                    tracker.log_classification(found)
            done = run.evaluation_due
        while not done:
            # An epoch, or the rest of one: its order is known from seed and epoch, so a resumed run starts right here.
            # The ranks share the examples of each step, and cut their shares into micro-batches.
            epoch, steps_done = divmod(run.step, steps_per_epoch)
            steps = epoch_batches(len(train_data), step_size, config.seed, epoch)[steps_done:]
            shares = [world.share(examples, config.per_device_train_batch_size) for examples in steps]
            pad_id = tokenizer.eos_token_id
            rivals = functools.partial(wrong_labels.with_rivals, epoch=epoch) if wrong_labels else None
            parts = list(chain(*shares))
            micro_batches = iter(build_loader(train_data, parts, pad_id, device, config.batching, rivals))

            for examples, share in zip(steps, shares, strict=True):
                # Fetch the micro-batches of this step, and count the labelled tokens of all ranks; the lengths of the
                # examples tell them, so that nobody has to ask the others.
                step_batches = list(islice(micro_batches, len(share)))
                step_tokens = target_tokens(lengths[examples])
                step = run.step + 1
                is_last = step >= total_steps
                should_log = is_last or step % config.logging_steps == 0
                should_evaluate = can_evaluate and (is_last or step % (config.eval_steps or steps_per_epoch) == 0)
                should_save = config.save_steps > 0 and step % config.save_steps == 0 or (save_failed and should_log)
                should_sample = config.sample_every > 0 and step % config.sample_every == 0
                guard.begin_step(step, step_batches, step_tokens)
                monitor.begin_step(step, step_batches, scaler.get_scale() * world.size)

                # Forward and backward. Each micro-batch adds its part to the mean over all tokens of the step, so
                # that 4 x 1, 2 x 2 and 1 x 4 examples give the same gradient, whatever their lengths. The head works
                # where there is a target only; the collation has shifted the labels by one. In the last backward pass
                # the ranks average their gradients: the sum, which is wanted, is the mean times their number.
                step_loss, step_contrast = torch.zeros(2, device=device)
                for number, batch in enumerate(step_batches, start=1):
                    batch = batch.to(device)
                    with exchange_gradients(transformer, number == len(step_batches)), monitor.listening():
                        with precision.autocast():
                            hidden = transformer(**batch.inputs, use_cache=False).last_hidden_state  # (B, T, C)
                            losses = cross_entropy(hidden, model.lm_head.weight, batch.predicting, batch.targets)
                        text_loss, contrast = label_contrast(losses, batch)
                        text_loss, contrast = text_loss / max(1, step_tokens), contrast / len(examples)
                        loss = text_loss + config.label_contrast * contrast
                        scaler.scale(loss * world.size).backward()
                    step_loss += text_loss.detach()
                    step_contrast += contrast.detach()
                step_loss, step_contrast = world.sum(torch.stack([step_loss, step_contrast]))

                # Take the loss scale out of the gradients once, now that they are complete; measure and clip them.
                scaler.unscale_(optimizer)
                grad_norm = clip_gradients(optimizer, config.max_grad_norm)
                monitor.before_update()

                # Refuse a loss or gradient that is not finite: AdamW's running means would never lose it again. The
                # step is repeated to find where it began, and then, by --on_nonfinite, the run ends or goes on without.
                guard.refuse(step_loss, grad_norm)
                stop_signal = signals.poll()
                looks = guard.looks_always or should_log or should_evaluate or should_save or stop_signal
                bad_step = guard.look() if looks else None
                if bad_step:
                    fault = report(bad_step)
                    if config.on_nonfinite == "stop" or run.nonfinite_in_row == MOST_IN_A_ROW:
                        raise refusal(fault, run.nonfinite_in_row, save_before(bad_step, fault), output_dir)

                # Update the weights, the loss scale and the learning rate. Optimizers skip silently: only the fallen
                # scale tells, and a step that changed nothing must not use up the schedule.
                scale, learning_rate = scaler.get_scale(), float(schedule.get_last_lr()[0])  # in fp16 a sync point
                scaler.step(optimizer)
                scaler.update()
                skipped = scaler.get_scale() < scale
                if not skipped and not bad_step:
                    schedule.step()
                figures = monitor.after_update()
                optimizer.zero_grad(set_to_none=True)
                tracker.count_step(step_loss, grad_norm, lengths[examples], step_batches, skipped)

                # Log, evaluate, save, stop if asked to. Reading a number from a GPU waits until it is computed (a sync
                # point): a step that logs nothing reads none.
                if should_log:
                    fp16 = {"loss_scale": scale, "skipped_steps": run.skipped_steps} if scaler.is_enabled() else {}
                    contrasts = {"label_contrast": step_contrast.item()} if wrong_labels else {}
                    tracker.log_step(grad_norm, learning_rate=learning_rate, **contrasts, **fp16)
                if figures:
                    tracker.log_gradients(figures)
                if should_sample:
                    with tracker.clock_stopped():
                        tracker.log_samples(sample_texts(model, tokenizer, text_format, config.seed))
                if should_evaluate:
                    should_save |= validate() and config.load_best_model_at_end
                    stopped_early = 0 < config.early_stopping_patience <= run.evaluations_since_best
                if should_save or signals.received:
                    folder = saver.save()
                    save_failed = folder is None
                done = is_last or stopped_early or signals.received is not None
                if done:
                    break

        tracker.close_bar()
        if run.evaluation_due or (run.step < total_steps and not stopped_early):
            if run.step == 0:
                print(f"stopped by {signals.name} before the first step, with nothing to save yet; to start, run:")
                print(f"  {resume_command(config, world)}")
                return signals.exit_code
            if save_failed:
                raise errors.UserError(f"stopped by {signals.name} after step {run.step}, which could not be saved")
            print(f"stopped by {signals.name} after step {run.step} and saved {folder}; to go on, run:")
            print(f"  {resume_command(config, world)}")
            return signals.exit_code

        # ---- Finish: the best model, its figures, a few texts -------------------------------------------------------
        if stopped_early:
            print(
                f"stopped early: {run.evaluations_since_best} evaluations without a loss below step {run.best_step}'s"
            )
        if config.load_best_model_at_end and 0 < run.best_step < run.step:
            best = output_dir / f"checkpoint-{run.best_step}"
            if reason := world.on_main(lambda: damage(best)):
                tracker.warn(f"{best}, the best, is damaged ({reason}): the model of the last step is kept")
            else:
                load_weights(model, load_model(str(best)).state_dict())
                print(f"took the model of step {run.best_step}, the best")
        saver.export()
        if found := classification_of("validation"):
            tracker.log_classification(found)
        results = tracker.results()
        if "test" in tokenized:
            for test in (evaluation_of("test"), classification_of("test")):
                results |= {f"test_{name}": value for name, value in (test.figures() if test else {}).items()}
        if signals.received:
            tracker.warn(f"{signals.name} came at the end: figures may be missing, python -m emoft.evaluate tells them")
        samples = sample_texts(model, tokenizer, text_format, config.seed)
        tracker.log_samples(samples)
        tracker.log_results(results)
        saver.write_results(results)
    print(format_figures(results))
    print("\n".join(samples.values()))
    steer = ["--emotion", text_format.labels[0], "--do_sample"] if text_format.label_first else []
    command = shlex.join(["python", "generate.py", "--model_name_or_path", str(output_dir), *steer])
    print(f"saved the model in {output_dir}; generate with: {command}")
    return 0


def main() -> int:
    """Read the flags and train."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()  # of loading and saving, which take a moment
    datasets.logging.set_verbosity(logging.CRITICAL)  # its errors are told by our own
    world = World.of_environment()
    with world.only_main_speaks():
        config = world.read_alike(lambda: parse_config(TrainConfig))
        with world.connected() as world, locked(Path(config.output_dir)) if world.is_main else nullcontext():
            return train(config, world)


if __name__ == "__main__":
    errors.run(main)
