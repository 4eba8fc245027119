"""Muon over pieces of matrices, as ZeRO leaves them to a rank, with AdamW for all other weights.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) orthogonalises the momentum of a hidden matrix.
Its update is scaled as by Liu et al. 2025 (arXiv 2502.16982, equation 4), so that AdamW's learning rate and weight
decay carry over. The momentum is kept per piece; only the update is put together, one matrix at a time. It starts
from gradients that were clipped before, as AdamW does: ZeRO clips them before it calls the optimizer.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from llm.parts import shape_of

MOMENTUM = 0.95
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic iteration, from Jordan et al.
ITERATIONS = 5
PRECISION = torch.bfloat16  # in which matrices are put together and orthogonalised


class Piece(NamedTuple):
    """Where a rank's piece of a matrix lies: `start` in the flattened matrix, `at` in the rank's flat share."""

    shape: torch.Size
    start: int
    at: int
    numel: int  # 0 where the rank has nothing of this matrix


def hidden_matrices(model: nn.Module) -> set[int]:
    """`id`s of the matrices that Muon is for: those of the model's stacked layers, embeddings among them left out."""
    layers = [module for stack in model.modules() if isinstance(stack, nn.ModuleList) for module in stack.modules()]
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    weights = [weight for layer in layers for weight in layer.parameters(recurse=False)]
    return {id(weight) for weight in weights if len(shape_of(weight)) == 2} - tables


def orthogonalise(update: torch.Tensor) -> torch.Tensor:
    """The matrix `update` (rows, columns) with singular values near 1, by Newton-Schulz iteration in its precision."""
    a, b, c = COEFFICIENTS
    tall = update.size(0) > update.size(1)
    x = update.T if tall else update
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


def scale(shape: torch.Size) -> float:
    """What gives an orthogonal update of `shape` the root mean square of AdamW's (arXiv 2502.16982, equation 4)."""
    return 0.2 * math.sqrt(max(shape))


class Muon(torch.optim.AdamW):
    """torch's AdamW, but Muon for the parameter groups that say `"muon": True`. A step is collective.

    Those groups' parameters are flat shares; `lay_out` says which pieces of which matrices each holds.
    """

    def __init__(self, groups: list[dict[str, Any]], device: torch.device, **adamw: Any):
        """device: where updates are put together and orthogonalised, whatever memory holds the state."""
        super().__init__(groups, **adamw)
        self._device = device
        self._pieces: dict[int, list[Piece]] = {}

    def lay_out(self, flat: torch.Tensor, pieces: list[Piece]) -> None:
        """`flat` holds `pieces`. Every rank must name the same matrices in the same order."""
        self._pieces[id(flat)] = pieces

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        groups = self.param_groups
        for group in groups:
            for flat in group["params"] if group["muon"] else ():
                if flat.grad is not None:
                    self._step_matrices(flat, flat.grad, group["lr"], group["weight_decay"])
        self.param_groups = [group for group in groups if not group["muon"]]
        super().step(closure)
        self.param_groups = groups

    def _step_matrices(self, flat: torch.Tensor, gradient: torch.Tensor, rate: float, decay: float) -> None:
        state = self.state[flat]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(flat.data)
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - MOMENTUM)
        nesterov = gradient.lerp(momentum, MOMENTUM)
        flat.mul_(1 - rate * decay)
        for piece in self._pieces.get(id(flat), ()):
            own = slice(piece.at, piece.at + piece.numel)
            matrix = _put_together(nesterov[own], piece, self._device)
            if piece.numel:
                update = orthogonalise(matrix).flatten()[piece.start : piece.start + piece.numel]
                flat[own].add_(update.to(flat), alpha=-rate * scale(piece.shape))


def _put_together(own: torch.Tensor, piece: Piece, device: torch.device) -> torch.Tensor:
    """The whole matrix. Collective: the others' pieces are added to zeros."""
    matrix = torch.zeros(math.prod(piece.shape), dtype=PRECISION, device=device)
    matrix[piece.start : piece.start + piece.numel] = own.to(device, PRECISION)
    dist.all_reduce(matrix)
    return matrix.view(piece.shape)
