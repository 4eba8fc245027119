"""Losses as pure functions over tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from llm.packing import IGNORED


def next_token_nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over all targets of -log p(target | what is before it), in nats. A scalar in fp32.

    logits: (B, T, V). labels: (B, T), where labels[:, t] is predicted by logits[:, t - 1] and IGNORED carries no loss.
    The sum, not the mean: dividing by the targets of the whole global batch keeps the gradient independent of how
    rows fall on workers and micro-batches.
    """
    return target_nats(logits, following(labels))


def following(labels: torch.Tensor) -> torch.Tensor:
    """The label that each position is to predict: that of the next one, IGNORED at the end. Both (B, T), int64."""
    # The labels are moved, not the logits: that would copy the largest tensor of all, and again in the backward pass.
    return F.pad(labels[:, 1:].long(), (0, 1), value=IGNORED)


def target_nats(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The same where targets[:, t] is what logits[:, t] predict: logits (B, T, V), targets (B, T)."""
    predictions = logits.flatten(0, 1).float()  # (B * T, V)
    return F.cross_entropy(predictions, targets.flatten().long(), ignore_index=IGNORED, reduction="sum")


def next_token_nats_by_row(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same loss of each row, and its targets: shapes (B,) fp64 and (B,) int64."""
    return target_nats_by_row(logits[:, :-1], labels[:, 1:])


def target_nats_by_row(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same where targets[:, t] is what logits[:, t] predict."""
    nats = F.cross_entropy(logits.float().mT, targets.long(), ignore_index=IGNORED, reduction="none")
    return nats.double().sum(dim=1), (targets != IGNORED).sum(dim=1)


def linear_nats(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """The loss of `next_token_nats` from what the output head reads; all logits are never held. A scalar in fp32.

    hidden: (N, H). weight: (V, H), the head's. targets: (N,) int64, IGNORED carries no loss. Logits are made, turned
    into gradients and forgotten for PIECE positions at a time, as in the Liger kernel (Hsu et al. 2024, arXiv
    2410.10989). Gradients are exact; that of the weight is summed in fp32. It can't be differentiated twice.
    """
    return _LinearNats.apply(hidden, weight, targets)


PIECE = 256  # positions: their logits for 8,192 ids take 8 MB, which caches hold


class _LinearNats(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, targets):
        counted = (targets != IGNORED).nonzero()[:, 0]
        to_hidden, to_weight = torch.zeros_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
        total = torch.zeros((), device=hidden.device)
        for places in counted.split(PIECE):
            nats, to_logits = _nats_and_gradient(hidden[places] @ weight.T, targets[places])
            total += nats
            to_hidden[places] = to_logits @ weight
            _add_product(to_weight, to_logits, hidden[places])
        ctx.save_for_backward(to_hidden, to_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, grad):
        to_hidden, to_weight = ctx.saved_tensors
        # In place, since they are large; a second backward pass is refused by autograd for that.
        return to_hidden.mul_(grad), to_weight.mul_(grad).to(ctx.dtype), None


def _nats_and_gradient(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed loss, fp32, and its gradient, softmax less one-hot, (N, V) in the logits' dtype."""
    exact = logits.float()
    total = exact.logsumexp(dim=1, keepdim=True)
    nats = (total - exact.gather(1, targets[:, None])).sum()
    gradient = exact.sub_(total).exp_()
    gradient.scatter_add_(1, targets[:, None], -torch.ones_like(total))
    return nats, gradient.to(logits.dtype)


def _add_product(into: torch.Tensor, to_logits: torch.Tensor, hidden: torch.Tensor) -> None:
    """Add to_logits^T hidden, which is the weight's gradient."""
    if hidden.dtype == into.dtype:
        into.addmm_(to_logits.T, hidden)
    else:
        into += to_logits.T @ hidden
