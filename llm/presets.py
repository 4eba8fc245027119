"""Typed shapes of Llama-style decoders, and the Hugging Face configuration and model that they stand for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import LlamaConfig, LlamaForCausalLM


@dataclass(frozen=True)
class Preset:
    """The shape of a Llama decoder (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, SwiGLU, rotary positions.

    Widths are in features, `context` in tokens.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    context: int
    tied: bool = True
    rope_theta: float = 10_000.0

    @property
    def intermediate(self) -> int:
        """Width of the SwiGLU block: 8/3 of `hidden`, so that its three matrices weigh as much as a 4x MLP's two."""
        return -(-self.hidden * 8 // 3 // 32) * 32

    def parameters(self, vocab_size: int) -> int:
        """Number of weights with `vocab_size` token ids."""
        head = self.hidden // self.heads
        attention = self.hidden * head * 2 * (self.heads + self.kv_heads)
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        embeddings = vocab_size * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * block + self.hidden


PRESETS = {
    "micro": Preset(layers=2, hidden=64, heads=2, kv_heads=2, context=256),
    "tiny": Preset(layers=6, hidden=256, heads=4, kv_heads=4, context=512),
    "1b": Preset(layers=16, hidden=2048, heads=32, kv_heads=8, context=4096, rope_theta=500_000.0),
    "7b": Preset(layers=32, hidden=4096, heads=32, kv_heads=8, context=8192, tied=False, rope_theta=500_000.0),
}


def llama_config(preset: Preset, tokenizer) -> LlamaConfig:
    """The configuration of `preset` for `tokenizer`'s ids (a Hugging Face tokenizer)."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=preset.hidden,
        intermediate_size=preset.intermediate,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        num_key_value_heads=preset.kv_heads,
        max_position_embeddings=preset.context,
        tie_word_embeddings=preset.tied,
        rope_parameters={"rope_type": "default", "rope_theta": preset.rope_theta},
        attention_dropout=0.0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation="sdpa",
    )


def build_model(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """A model with the weights that `seed` draws (fp32, Hugging Face's initialisation)."""
    import torch
    from transformers import LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)
