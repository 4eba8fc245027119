"""A text as one vector: the mean of a model's last hidden states over its tokens.

A decoder's token sees what stands before it, an encoder's the whole text; so does that of a decoder which learnt
masked words alone (`llm.cloze`). Texts of one length share a pass and nothing is padded, so there is no mask to get
wrong: windows, ALiBi and learnt positions are the model's own.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llm.loading import load_any
from llm.presets import OBJECTIVE

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_TOKENS = 8192  # of one pass, or one text


def load_embedder(folder: str | Path) -> PreTrainedModel:
    """The model in `folder`, for `embed`: a causal decoder, or one that fills in words.

    ValueError if the folder holds no such model, or not all of its weights.
    """
    model = load_any(folder)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{folder} holds an encoder with a decoder, which have no hidden state in common")
    return model


@torch.inference_mode()
def embed(model: PreTrainedModel, prompts: Sequence[Sequence[int]]) -> Tensor:
    """The mean last hidden state of each of `prompts`, ids as the tokenizer gives them: (B, d), fp32.

    What a text gets doesn't depend on those beside it. ValueError, with the place and the numbers, if a prompt is
    empty, longer than the context or has an id outside the vocabulary.
    """
    if model.training:
        raise RuntimeError("the model is in training mode, where dropout changes what it says: call model.eval()")
    for place, prompt in enumerate(prompts):
        _check(model, place, prompt)
    means = torch.empty(len(prompts), model.config.hidden_size, device=model.device)
    for places in _passes(prompts):
        ids = torch.tensor([list(prompts[place]) for place in places], device=model.device)
        means[places] = _hidden(model, ids).float().mean(1)
    return means


def _check(model: PreTrainedModel, place: int, prompt: Sequence[int]) -> None:
    context = getattr(model.config, "max_position_embeddings", None) or len(prompt)
    if not 0 < len(prompt) <= context:
        raise ValueError(f"prompt {place} has {len(prompt)} tokens, it must have from 1 to the context of {context}")
    if outside := [token for token in prompt if not 0 <= token < model.config.vocab_size]:
        raise ValueError(f"prompt {place} has id {outside[0]}, outside the vocabulary of {model.config.vocab_size}")


def _passes(prompts: Sequence[Sequence[int]]) -> Iterator[list[int]]:
    """The places of prompts that share a pass: all of one length."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for place, prompt in enumerate(prompts):
        by_length[len(prompt)].append(place)
    for length, places in by_length.items():
        rows = max(1, MOST_TOKENS // length)
        yield from (places[start : start + rows] for start in range(0, len(places), rows))


def _hidden(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """The last hidden states (n, T, d) of ids (n, T)."""
    base = model.base_model
    settings: dict[str, Any] = {}
    if "use_cache" in inspect.signature(base.forward).parameters:
        settings["use_cache"] = False
    if getattr(model.config, OBJECTIVE, None) == "masked":
        rows, length = ids.shape
        # Added to the scores, so that every token sees every other. Eager attention would add a boolean mask too.
        settings["attention_mask"] = torch.zeros(rows, 1, length, length, dtype=model.dtype, device=ids.device)
    return base(input_ids=ids, **settings).last_hidden_state
