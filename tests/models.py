"""Tiny models with tokenizers, built in a moment: real ones, only small."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import torch

from llm.presets import PRESETS, Preset, build_model, llama_config
from llm.vocabulary import train_tokenizer

SENTENCES = [
    "The cat sat on the mat, and the dog ate the cat's dinner.",
    "Nobody knew where the naïve traveller had left his café crème: 3 €!",
    "def add(a, b):\n    return a + b\n",
]


@lru_cache
def tiny_tokenizer():
    return train_tokenizer(SENTENCES, vocab_size=320)


def tiny_model(seed: int = 0, preset: Preset = PRESETS["micro"]):
    """An untrained model in evaluation mode, whose every prediction depends on the whole context.

    With the usual small weights and tied embeddings the likeliest token would always be the last one again.
    """
    model = build_model(llama_config(preset, tiny_tokenizer()), seed).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(4 if "embed" in name else 10 if "proj" in name else 1)
    return model


def grouped_query_model():
    """Four query heads on two key-value heads."""
    return tiny_model(preset=replace(PRESETS["micro"], heads=4, kv_heads=2))


def save_tiny_model(folder: Path) -> Path:
    """The Hugging Face folder of `tiny_model`."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder
