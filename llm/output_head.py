"""The output head and the loss in one: a causal model's next-token loss without all its logits at a time.

The logits of a row are its largest tensor by far: 8,192 positions by 128,256 ids are 4 GB in fp32, and plain training
holds several of the kind. Where logits are what the head gives and nothing else, the head hands over the loss instead.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from llm.losses import linear_nats, target_nats

# Types of transformers whose logits are one matrix times the last hidden states; others scale or cap them after.
PLAIN_HEADS = (
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "mixtral",
    "olmo2",
    "olmo3",
    "phi3",
    "qwen2",
    "qwen3",
    "smollm3",
    "starcoder2",
)


def rows_nats(model: nn.Module, input_ids: torch.Tensor, targets: torch.Tensor, **inputs) -> torch.Tensor:
    """`llm.losses.target_nats` of what `model` says to rows. A scalar in fp32.

    model: a causal model of transformers, or a DeepSpeed engine around one. input_ids: (B, T). targets: (B, T), what
    each position is to predict. inputs: what else the forward pass takes.
    """
    head = _plain_head(model)
    if head is None:
        return target_nats(model(input_ids=input_ids, use_cache=False, **inputs).logits, targets)
    with _giving_nats(head, targets):
        return model(input_ids=input_ids, use_cache=False, **inputs).logits


def _plain_head(model: nn.Module) -> nn.Linear | None:
    """The output head, if its product is all that logits are and no compiled code has it built in."""
    inner: Any = getattr(model, "module", model)
    if inner.config.model_type not in PLAIN_HEADS or getattr(model, "is_compiled", False):
        return None
    head = inner.get_output_embeddings()
    return head if type(head) is nn.Linear and head.bias is None else None


@contextmanager
def _giving_nats(head: nn.Linear, targets: torch.Tensor) -> Iterator[None]:
    """Have `head` give the summed loss for logits. Its hooks run as ever, by which ZeRO-3 gathers the weight."""

    def nats(hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:-1] != targets.shape:
            raise ValueError(
                f"hidden states of {tuple(hidden.shape[:-1])} positions, labels of {tuple(targets.shape)}"
            )
        return linear_nats(hidden.flatten(0, 1), head.weight, targets.flatten())

    own = head.__dict__.get("forward")
    head.forward = nats  # type: ignore[assignment]
    try:
        yield
    finally:
        del head.forward
        if own is not None:
            head.forward = own  # type: ignore[method-assign]
