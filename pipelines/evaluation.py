"""What a pretrained model scores on held-out rows, by objective, and what it is to beat where it fills in words.

reads   the held-out shard set, as its stream gives it (`pipelines.stream.HeldOutRows`)
writes  nothing: the figures go into held_out.jsonl with the step, and into the stage's outcome
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from llm.baselines import Counts, unigram_nats
from llm.cloze import guesses
from llm.losses import next_token_nats_by_row, target_nats_by_row
from llm.masking import Kind
from llm.packing import IGNORED
from pipelines.stream import HeldOutRows

Batch = dict[str, torch.Tensor]
FIGURES = {
    "masked": ("masked_loss", "masked_accuracy", "pseudo_loss"),
    "mixed": ("causal_loss", "masked_loss", "masked_accuracy", "pseudo_loss"),
}


@torch.no_grad()
def held_out_by_source(
    model: torch.nn.Module, batches: Iterable[Batch], *, names: list[str], rows: list[int]
) -> dict[str, torch.Tensor]:
    """Nats a target of next-token prediction, of all held-out rows (`held_out_loss`) and by source (`sources/NAME`).

    names, rows: of the sources in the order of their rows, and how many each has. Each figure as (sum, count), fp64.
    """
    ends = torch.tensor(rows).cumsum(0)
    sums = torch.zeros(len(names), 2, dtype=torch.float64)
    device: Any = model.device
    for batch in batches:
        logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        nats, targets = _nats_by_row(logits, batch)
        real = batch["row"].cpu() >= 0
        source = torch.searchsorted(ends, batch["row"].cpu()[real], right=True)
        sums.index_add_(0, source, torch.stack([nats, targets.double()], dim=1).cpu()[real])
    by_source = {f"sources/{name}": pair.to(device) for name, pair in zip(names, sums, strict=True)}
    return {"held_out_loss": sums.sum(dim=0).to(device), **by_source}


@torch.no_grad()
def held_out_figures(model: torch.nn.Module, batches: Iterable[Batch], *, objective: str) -> dict[str, torch.Tensor]:
    """Each figure as (sum, count), shape (2,), fp64: what ranks add up before one is divided by the other.

    held_out_loss    what runs of one objective are compared by: causal_loss if it has one, else masked_loss
    causal_loss      nats a token of rows that are not masked; of a mixed objective alone
    masked_loss      nats a hidden token of masked rows
    masked_accuracy  share of those tokens that are the likeliest at their place
    pseudo_loss      nats a token that is hidden by itself, one in each of some rows: exp of its mean is the
                     pseudo-perplexity (Salazar et al. 2020, arXiv 1910.14659, equation 3), on that sample of tokens
    """
    sums: dict[str, torch.Tensor] = {}
    for batch in batches:
        for name, values in _figures(model, batch).items():
            here = torch.stack([values.sum(), torch.full_like(values.sum(), values.numel())])
            sums[name] = sums.get(name, 0) + here
    figures = {name: sums[name] for name in FIGURES[objective]}
    return {"held_out_loss": next(iter(figures.values())), **figures}


def _nats_by_row(logits: torch.Tensor, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Of whole rows, or of this rank's part of them."""
    if "targets" in batch:
        return target_nats_by_row(logits, batch["targets"])
    return next_token_nats_by_row(logits, batch["labels"])


def _figures(model: torch.nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
    """What each figure is the mean of, (N,) fp64."""
    scored = guesses(model, batch)
    kind = batch["kind"][scored.row]
    nats = F.cross_entropy(scored.logits, scored.targets, reduction="none").double()
    right = (scored.logits.argmax(dim=-1) == scored.targets).double()
    return {
        "causal_loss": nats[kind == Kind.CAUSAL],
        "masked_loss": nats[kind == Kind.MASKED],
        "masked_accuracy": right[kind == Kind.MASKED],
        "pseudo_loss": nats[kind == Kind.SINGLE],
    }


def masked_baselines(held_out: HeldOutRows, counts: Counts, end_of_text: int) -> dict[str, float]:
    """What the unigram table scores on the hidden tokens, and how many of them and of single ones there are.

    Its accuracy is that of always saying the commonest token; `end_of_text`, which is never hidden, doesn't count.
    """
    labels = held_out.rows_of(Kind.MASKED)["labels"]
    hidden = labels[labels != IGNORED]
    single = held_out.rows_of(Kind.SINGLE)["labels"]
    commonest = np.where(np.arange(counts.vocab_size) == end_of_text, -1, counts.unigrams).argmax()
    return {
        "masked_targets": int(hidden.size),
        "single_targets": int((single != IGNORED).sum()),
        "unigram_masked_loss": float(unigram_nats(counts, hidden).mean()),
        "unigram_masked_accuracy": float((hidden == commonest).mean()),
    }
