"""The ways in which a step is computed, besides that of training: each is a context that ends as it began."""

import contextlib
from collections.abc import Iterator

import torch
from torch import nn
from transformers import GPT2LMHeadModel

from emoft.training.precision import Precision


@contextlib.contextmanager
def in_float32(precision: Precision) -> Iterator[None]:
    """Compute without autocast in this context."""
    name, precision.name = precision.name, "no"
    try:
        yield
    finally:
        precision.name = name


@contextlib.contextmanager
def in_float64(model: GPT2LMHeadModel) -> Iterator[None]:
    """Compute with weights in float64 in this context."""
    model.double()  # the weights come back as they were: each float32 is a float64
    try:
        yield
    finally:
        model.float()


@contextlib.contextmanager
def without_dropout(model: GPT2LMHeadModel) -> Iterator[None]:
    """Compute without dropout in this context."""
    model.eval()
    try:
        yield
    finally:
        model.train()


@contextlib.contextmanager
def nudged(parameter: nn.Parameter, index: tuple[int, ...], by: float) -> Iterator[None]:
    """Move a weight while this context is open."""
    with torch.no_grad():
        before = parameter[index].clone()
        parameter[index] += by
    try:
        yield
    finally:
        with torch.no_grad():
            parameter[index] = before
