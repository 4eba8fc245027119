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
    predictions = logits[:, :-1].float().flatten(0, 1)  # (B * (T - 1), V)
    targets = labels[:, 1:].flatten().long()  # (B * (T - 1),)
    return F.cross_entropy(predictions, targets, ignore_index=IGNORED, reduction="sum")


def next_token_nats_by_row(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The same loss of each row, and its targets: shapes (B,) fp64 and (B,) int64."""
    targets = labels[:, 1:].long()
    nats = F.cross_entropy(logits[:, :-1].float().mT, targets, ignore_index=IGNORED, reduction="none")
    return nats.double().sum(dim=1), (targets != IGNORED).sum(dim=1)
