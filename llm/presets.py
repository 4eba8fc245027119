"""Typed shapes of Llama-style decoders, and the Hugging Face configuration and model that they stand for."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import LlamaConfig, PreTrainedModel

# In config.json: what a model learnt beside or instead of the next token, masked or mixed; not there otherwise.
OBJECTIVE = "pretraining_objective"


@dataclass(frozen=True)
class Preset:
    """The shape of a Llama decoder (Touvron et al. 2023, arXiv 2302.13971): RMSNorm, SwiGLU, rotary positions.

    Widths are in features, `context` in tokens. `swiglu` is the width of the SwiGLU block where it is not the rule's.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    context: int
    tied: bool = True
    rope_theta: float = 10_000.0
    swiglu: int | None = None

    @property
    def intermediate(self) -> int:
        """Width of the SwiGLU block: 8/3 of `hidden`, so that its three matrices weigh as much as a 4x MLP's two."""
        return self.swiglu or -(-self.hidden * 8 // 3 // 32) * 32

    def parameters(self, vocab_size: int) -> int:
        """Number of weights with `vocab_size` token ids."""
        head = self.hidden // self.heads
        attention = self.hidden * head * 2 * (self.heads + self.kv_heads)
        block = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        embeddings = vocab_size * self.hidden * (1 if self.tied else 2)
        return embeddings + self.layers * block + self.hidden

    def numbers(self) -> dict[str, Any]:
        """The numbers that name the shape; a width that follows from the rule is not among them."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def config(self, tokenizer) -> LlamaConfig:
        """The Hugging Face configuration for `tokenizer`'s ids."""
        return llama_config(self, tokenizer)


# Sizes in parameters with the vocabulary that the shape was published with. Of the published shapes the numbers are
# those of the papers and of the models' own config.json; contexts are those of pretraining, before any extension.
PRESETS = {
    "micro": Preset(layers=2, hidden=64, heads=2, kv_heads=2, context=256),
    "tiny": Preset(layers=6, hidden=256, heads=4, kv_heads=4, context=512),  # 5 M with 2,048 ids
    # The models that llama2.c trains on TinyStories (Karpathy 2023), 32,000 ids.
    "15m": Preset(layers=6, hidden=288, heads=6, kv_heads=6, context=256),
    "42m": Preset(layers=8, hidden=512, heads=8, kv_heads=8, context=1024),
    # SmolLM 135M and 360M (Allal et al. 2024), 49,152 ids.
    "135m": Preset(layers=30, hidden=576, heads=9, kv_heads=3, context=2048, swiglu=1536),
    "360m": Preset(layers=32, hidden=960, heads=15, kv_heads=5, context=2048, swiglu=2560),
    # Llama 3.2 1B and 3B (Meta 2024), 128,256 ids; with 32,768 they have 1.04 B and 2.92 B parameters.
    "1b": Preset(layers=16, hidden=2048, heads=32, kv_heads=8, context=8192, rope_theta=5e5, swiglu=8192),
    "3b": Preset(layers=28, hidden=3072, heads=24, kv_heads=8, context=8192, rope_theta=5e5, swiglu=8192),
    # Llama 2 (Touvron et al. 2023, arXiv 2307.09288, Table 1) and Code Llama 34B (arXiv 2308.12950), 32,000 ids.
    "7b": Preset(layers=32, hidden=4096, heads=32, kv_heads=32, context=4096, tied=False, swiglu=11008),
    "13b": Preset(layers=40, hidden=5120, heads=40, kv_heads=40, context=4096, tied=False, swiglu=13824),
    "34b": Preset(layers=48, hidden=8192, heads=64, kv_heads=8, context=4096, tied=False, swiglu=22016),
    # Llama 3 (Dubey et al. 2024, arXiv 2407.21783, Table 3), 128,256 ids. 70b is Llama 2's shape too.
    "8b": Preset(32, 4096, heads=32, kv_heads=8, context=8192, tied=False, rope_theta=5e5, swiglu=14336),
    "70b": Preset(80, 8192, heads=64, kv_heads=8, context=8192, tied=False, rope_theta=5e5, swiglu=28672),
    "405b": Preset(126, 16384, heads=128, kv_heads=8, context=8192, tied=False, rope_theta=5e5, swiglu=53248),
}

FEATURES_PER_LAYER = 64
SMALL = 16  # layers below which a head has 64 features
DEPTH_CONTEXT = 4096


def from_depth(depth: int) -> Preset:
    """The shape with `depth` layers: one dial that derives the rest.

    Width is 64 features a layer, rounded up to whole heads: the aspect ratio of nanochat (Karpathy 2025), within the
    range in which Kaplan et al. 2020 (arXiv 2001.08361, section 3.2) find that it makes next to no difference. A head
    has 128 features (Llama), 64 in models of fewer than 16 layers. Eight heads share the keys and values where that
    divides (Ainslie et al. 2023, arXiv 2305.13245, as in Llama 3), else each has its own. The SwiGLU block has Llama's
    8/3 of the width; embeddings are tied below 64 layers, as in Llama 3.2's small models.
    """
    head = 64 if depth < SMALL else 128
    heads = -(-depth * FEATURES_PER_LAYER // head)
    kv_heads = 8 if heads % 8 == 0 else heads
    return Preset(depth, heads * head, heads, kv_heads, DEPTH_CONTEXT, tied=depth < 64)


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


def build_model(config, seed: int) -> PreTrainedModel:
    """A causal model of `config`'s architecture with the weights that `seed` draws (fp32, its own initialisation)."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
