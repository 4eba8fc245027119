"""Ulysses sequence parallelism: several ranks share the tokens of a row, and each other's heads in attention.

Jacobs et al. 2023 (arXiv 2309.14509, section 3.1): each of N ranks has T/N of a row's tokens everywhere but in
attention; there an all-to-all gives it the whole row for 1/N of the heads, and another gives its tokens back. The
exchange is DeepSpeed's. Ranks i*N to (i+1)*N - 1 make a group, which has the same rows.
"""

from __future__ import annotations

from typing import Any

import torch

ATTENTION = "packed_sdpa"


def why_not(config: Any, parts: int, row_tokens: int) -> str | None:
    """Why rows of `row_tokens` can't be shared by so many ranks in a model of `config`; None if they can."""
    text = config.get_text_config()
    if not getattr(text, "num_key_value_heads", None):
        return f"a model of type {text.model_type} doesn't say its heads of keys and values"
    counts = {
        "heads": text.num_attention_heads,
        "heads of keys and values": text.num_key_value_heads,
        "tokens of a row": row_tokens,
    }
    return next((f"{count} {what} are no multiple of it" for what, count in counts.items() if count % parts), None)


def share_rows(model: Any, parts: int, micro_batch: int) -> Any:
    """Have `model`'s attention span the rows of `parts` ranks; the groups, for DeepSpeed's engine. Collective.

    The model must be given `position_ids`. Attention is by FlashAttention where it is installed, else by torch's with
    a mask of (B, 1, T, T) truth values; either keeps the pieces of a row apart.
    """
    from deepspeed.runtime.sequence_parallel.ulysses_sp import UlyssesSPAttentionHF
    from transformers import AttentionInterface
    from transformers.utils import is_flash_attn_2_available

    AttentionInterface.register(ATTENTION, packed_attention)
    attention = "flash_attention_2" if is_flash_attn_2_available() else ATTENTION
    model.set_attn_implementation(attention)
    return UlyssesSPAttentionHF.register_with_transformers(
        model,
        core_attn_implementation=attention,
        sequence_parallel_size=parts,
        micro_batch_size=micro_batch,
    )


def packed_attention(module, query, key, value, attention_mask, position_ids=None, **kwargs):
    """torch's attention in which a token sees itself and what is before it in its own piece of the row.

    query, key, value: (B, H, T, D); position_ids: (B, T), which don't go up by one where a piece begins. As
    transformers calls attention; the mask that it hands over is not used.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    mask = piece_mask(position_ids)
    return sdpa_attention_forward(module, query, key, value, mask, **kwargs)


def piece_mask(position_ids: torch.Tensor) -> torch.Tensor:
    """Which tokens see which: (B, T) to (B, 1, T, T), true where the second is before the first in the same piece."""
    first = position_ids[:, :1] - 1
    piece = (position_ids.diff(dim=1, prepend=first) != 1).cumsum(dim=1)
    same = piece[:, None, :, None] == piece[:, None, None, :]
    return same.tril()
