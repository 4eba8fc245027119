"""Weights in eight bits, for CPUs: each output of a linear layer has a scale, activations stay in bf16.

    weight[o, i] = scale[o] * q[o, i], q whole from -127 to 127

Decoding reads every weight for each token, so half the bytes of bf16 are worth more than exact products. Embeddings
and norms stay as they are, and so does the output head where it is the embedding.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

LARGEST = 127  # -128 is left out, so that the range is symmetric
FEW_ROWS = 16  # beyond, the weights are widened once and the matrix units of bf16 do the product


class Int8Linear(nn.Module):
    """A linear layer (..., in) -> (..., out) of bf16 activations with weights in int8."""

    q: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, weight: Tensor, bias: Tensor | None):
        """weight: (out, in), any float; bias: (out,)."""
        super().__init__()
        q, scale = quantized(weight)
        self.register_buffer("q", q)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if bias is None else bias.detach().to(torch.bfloat16))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        if len(rows) <= FEW_ROWS:
            out = torch.ops.aten._weight_int8pack_mm(rows.contiguous(), self.q, self.scale)
        else:
            out = F.linear(rows, self.q.to(rows.dtype)) * self.scale  # bf16 holds whole numbers up to 256
        out = out.unflatten(0, x.shape[:-1])
        return out if self.bias is None else out + self.bias


def quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Weights (out, in) as whole numbers (out, in), int8, and the scale of each output (out,), bf16."""
    weight = weight.detach().float()
    # The scale is rounded first, and the weights by what it then is: its own rounding costs nothing.
    scale = (weight.abs().amax(1) / LARGEST).clamp(min=torch.finfo(torch.bfloat16).tiny).to(torch.bfloat16)
    q = (weight / scale.float()[:, None]).round().clamp(-LARGEST, LARGEST)
    return q.to(torch.int8), scale


def quantize(model: PreTrainedModel) -> PreTrainedModel:
    """Put `Int8Linear` in place of every linear layer of `model`, which is in bf16 on a CPU; returns it.

    ValueError if it has none. The model can then only be run: not trained, saved, or given other weights.
    """
    found = [(name, *parts) for name, module in model.named_modules() if (parts := _linear(module))]
    tied = _tied_head(model)
    layers = [(name, weight, bias) for name, weight, bias in found if name != tied]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no linear layers to have in int8: use bfloat16")
    for name, weight, bias in layers:
        model.set_submodule(name, Int8Linear(weight, bias))
    return model


def _linear(module: nn.Module) -> tuple[Tensor, Tensor | None] | None:
    """The weight (out, in) and bias of a linear layer; None for any other module."""
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, Conv1D):  # GPT-2's name for a linear layer whose weight is (in, out)
        return module.weight.T, module.bias
    return (module.weight, module.bias) if isinstance(module, nn.Linear) else None


def _tied_head(model: PreTrainedModel) -> str | None:
    """The name of the output head if its weight is the embedding's."""
    head = cast(nn.Module | None, model.get_output_embeddings())
    if head is None or head.weight is not model.get_input_embeddings().weight:
        return None
    return next(name for name, module in model.named_modules() if module is head)
