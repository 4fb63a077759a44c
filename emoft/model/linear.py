"""Products by a weight matrix that no longer changes, y = x W + b, as generation computes them.

A matrix that is multiplied thousands of times may first be brought into the order in which the processor reads it, or
into eight bits. Both make a copy of it; the model itself stays as it is.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from emoft.private import int8_product, packed_product, packs

Product = Callable[[Tensor], Tensor]  # (N, in) -> (N, out)


def fixed_product(
    weight: Tensor, bias: Tensor | None, dtype: torch.dtype, int8: bool = False, gelu: bool = False
) -> Product:
    """Return the product by a matrix, in the fastest form that there is for its device.

    Args:
        weight: (in, out), as in transformers' Conv1D.
        bias: (out,), if there is one.
        dtype: in which products are computed and come back.
        int8: compute in eight bits, on a CPU: each output's weights and the whole input are rounded to 255 steps
            between their extremes (Jacob et al., 2018). Results come back in float32.
        gelu: apply GPT-2's activation to the result.
    """
    weight = weight.detach()
    bias = bias if bias is None else bias.detach()
    if not int8 and packs(weight.device, dtype):
        return packed_product(weight.to(dtype), bias if bias is None else bias.to(dtype), gelu)
    product = int8_product(weight.float(), bias) if int8 else plain_product(weight.to(dtype), bias)
    return (lambda values: F.gelu(product(values), approximate="tanh")) if gelu else product


def plain_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Return the product as torch computes it for any matrix."""
    dtype = weight.dtype
    if bias is None:
        return lambda values: values.to(dtype) @ weight
    addend = bias.to(dtype)
    return lambda values: torch.addmm(addend, values.to(dtype), weight)
