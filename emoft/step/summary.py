"""From what was seen of a step to its numbers."""

import math
from dataclasses import dataclass

import torch
from torch import nn

from emoft.data.steps import Step
from emoft.run.setup import Setup
from emoft.step.agreements import compare
from emoft.step.look import Look
from emoft.step.numbers import Cut, Numbers, Weight
from emoft.step.texts import Shown
from emoft.step.update import Update


@dataclass(frozen=True)
class Seen:
    """What the loop made of a step in each of the ways."""

    trained: Look  # as it is trained
    exact: Look  # in float32, with the same dropout
    after: Look  # likewise, after the update
    cuts: list[Cut]  # into other micro-batches
    weight: Weight
    update: Update
    shown: Shown  # some of its texts


def clip_factor(max_grad_norm: float, grad_norm: float) -> float:
    """Return by what a gradient is multiplied to be no longer than a limit; no limit if that is 0."""
    return min(1.0, (max_grad_norm or math.inf) / grad_norm) if grad_norm else 1.0


@torch.no_grad()
def sum_up(setup: Setup, step: Step, seen: Seen) -> Numbers:
    """Return the numbers of a step, with what must agree in them compared."""
    config, loader, model = setup.config, setup.loader, setup.text_model.model
    trained, exact, shown = seen.trained, seen.exact, seen.shown
    losses = trained.losses_of_texts()
    embedding = model.transformer.wte.weight
    largest_hidden = max(float(each.abs().max()) for each in exact.hidden)
    moved = max(float((a.double() - b.double()).abs().max()) for a, b in zip(trained.hidden, exact.hidden, strict=True))
    numbers = Numbers(
        step=step.number,
        total_steps=loader.total_steps,
        epoch=(step.number - 1) / loader.steps_per_epoch,
        learning_rate=step.learning_rate,
        precision=setup.runtime.precision.name,
        batching=config.batching,
        dropout=any(module.p for module in model.modules() if isinstance(module, nn.Dropout)),
        parameters=sum(p.numel() for p in model.parameters()),
        texts=shown.texts,
        examples=len(step.examples),
        tokens=step.tokens,
        predictions=shown.predictions,
        loss_sum=sum(float(each.double().sum()) for each in losses),
        loss=trained.loss,
        mean_of_means=shown.mean_of_means,
        label_contrast=config.label_contrast * trained.contrast,
        uniform_loss=math.log(embedding.shape[0]),
        attention=shown.attention,
        gradient_norms=trained.gradient_norms,
        grad_norm=trained.grad_norm,
        embedding_from_input=trained.from_input,
        embedding_from_head=trained.from_head,
        head_is_tied=model.lm_head.weight is embedding,
        loss_float32=exact.loss,
        grad_norm_float32=exact.grad_norm,
        largest_loss_difference=max(
            float((a[2].float() - b[2].float()).abs().max()) for a, b in zip(trained.given, exact.given, strict=True)
        ),
        largest_hidden_difference=moved / largest_hidden,
        loss_scale=trained.loss_scale,
        max_grad_norm=config.max_grad_norm,
        clip_factor=clip_factor(config.max_grad_norm, trained.grad_norm),
        cuts=seen.cuts,
        weight=seen.weight,
        adam=seen.update.settings(),
        update_ratios=seen.update.ratios,
        predicted_change=seen.update.predicted,
        loss_after=seen.after.loss,
        agreements=[],
    )
    numbers.agreements = compare(numbers, shown)
    return numbers
