"""The cloze task (Taylor 1953; Devlin et al. 2018): what a model may see of rows with hidden words, and its guesses.

Rows of `llm.masking` and causal ones go through the model in one pass. Each token looks at its own piece of the row
alone; in masked rows at all of it, in causal ones at what stands before. A decoder with that mask is the model; so is
an encoder that takes a mask of its own for every row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from llm.masking import Kind
from llm.packing import IGNORED
from llm.presets import OBJECTIVE

PIECE = 8  # tokens of the pieces with which attention is tried
ROUNDING = 1e-4  # of the logits' standard deviation: less is no attention


def guess_nats(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Sum over all targets of -log p(target | what its row may see), in nats. A scalar in fp32."""
    scored = guesses(model, batch)
    return F.cross_entropy(scored.logits, scored.targets, reduction="sum")


class Scored(NamedTuple):
    """The guesses that count. logits: (N, V) fp32; targets: (N,); row: (N,), the row of the batch that each is of."""

    logits: torch.Tensor
    targets: torch.Tensor
    row: torch.Tensor


def guesses(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> Scored:
    """What `model` says at every target of a batch of causal and masked rows.

    batch: `input_ids`, `position_ids`, `labels` (B, T) and `kind` (B,), as `llm.masking.mask_rows` makes them.
    """
    both_ways = batch["kind"] != Kind.CAUSAL
    logits = logits_of(model, batch["input_ids"], batch["position_ids"], both_ways)
    targets = aligned(batch["labels"], both_ways).long()
    row, place = torch.nonzero(targets != IGNORED, as_tuple=True)
    return Scored(logits[row, place].float(), targets[row, place], row)


def logits_of(
    model: torch.nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor, both_ways: torch.Tensor
) -> torch.Tensor:
    """Logits (B, T, V) of rows (B, T) of which those that are true in `both_ways` (B,) are looked at in both."""
    seen = attention_mask(position_ids, both_ways)
    return model(input_ids=input_ids, attention_mask=seen, position_ids=position_ids, use_cache=False).logits


def attention_mask(position_ids: torch.Tensor, both_ways: torch.Tensor) -> torch.Tensor:
    """Which token looks at which: at all of its own piece in rows that look `both_ways`, else at it and those before.

    position_ids: (B, T), 0 where a piece begins. both_ways: (B,) bool. The result: (B, 1, T, T) bool, a byte each.
    """
    piece = (position_ids == 0).cumsum(dim=1)
    same = piece[:, :, None] == piece[:, None, :]
    before = torch.ones_like(same[0]).tril()
    return (same & (before | both_ways[:, None, None]))[:, None]


def aligned(labels: torch.Tensor, both_ways: torch.Tensor) -> torch.Tensor:
    """The labels where the logits that are to predict them stand: in causal rows one place to the left. (B, T)."""
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    return torch.where(both_ways[:, None], labels, following)


def tell_objective(model, objective: str) -> None:
    """Write into the configuration of a Hugging Face `model`, which is saved with it, what it is trained for."""
    if objective != "causal":
        setattr(model.config, OBJECTIVE, objective)
    elif hasattr(model.config, OBJECTIVE):
        delattr(model.config, OBJECTIVE)


def unfit(model: torch.nn.Module) -> str | None:
    """Why `model`, small and with large weights, can't fill in words of packed rows; None if it can.

    Tried with two pieces in a row: the first token of the second must be told by what follows it, and not at all by
    the first piece. Recurrent models and ALiBi fail, which take no such mask.
    """
    rows = torch.arange(2 * PIECE).repeat(3, 1)
    rows[1, :PIECE], rows[2, -1] = rows[1, :PIECE].flip(0), 0
    positions = torch.arange(PIECE).repeat(2).expand_as(rows)
    try:
        with torch.no_grad():
            same, other_first, other_end = logits_of(model, rows, positions, torch.ones(3, dtype=torch.bool))
    except (TypeError, ValueError, RuntimeError) as error:
        return f"it takes no mask of which token looks at which ({error})"
    if _differ(same[PIECE:], other_first[PIECE:]):
        return "its attention goes from one document to the next where several share a row"
    if not _differ(same[PIECE], other_end[PIECE]):
        return "a token of it can't look at those that follow"
    return None


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > ROUNDING * one.std())
