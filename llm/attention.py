"""Attention on a CPU over rows that hold several pieces, without the work of what no token sees.

transformers hands such rows to torch with a mask of T x T truth values, and torch's kernel for CPUs multiplies all of
them; in a causal row too, for its blocks of keys are as long as most rows. Here every piece is cut into blocks of
queries, and a block is multiplied with the keys from the piece's beginning to the block's end alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

ATTENTION = "headwater_pieces"
BLOCK = 128  # queries: shorter ones save less work than their calls cost
# Types of transformers whose every layer may be plain causal attention, and hands `position_ids` on to it.
PLAIN_ATTENTION = ("llama", "mistral", "olmo2", "phi3", "qwen2", "qwen3", "smollm3")


def attend_by_pieces(model: Any) -> None:
    """Have `model` (of transformers) attend so, if it is on a CPU and all its attention is causal and unlimited."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if config.model_type not in PLAIN_ATTENTION or kinds != {"full_attention"} or model.device.type != "cpu":
        return
    if getattr(config, "sliding_window", None) or config.attention_dropout:
        return
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(ATTENTION, pieces_attention)
    AttentionMaskInterface.register(ATTENTION, _mask_unless_pieces)
    model.set_attn_implementation(ATTENTION)


def _mask_unless_pieces(batch_size: int, q_length: int, kv_length: int, *rest, attention_mask=None, **more):
    """None for whole rows, whose pieces `position_ids` tell; else (padding, a cache) what torch's attention takes."""
    if attention_mask is None and q_length == kv_length:
        return None
    from transformers.masking_utils import sdpa_mask

    return sdpa_mask(batch_size, q_length, kv_length, *rest, attention_mask=attention_mask, **more)


def pieces_attention(module, query, key, value, attention_mask, scaling=None, position_ids=None, **kwargs):
    """As transformers calls attention: query (B, H, T, D), key and value (B, K, T, D) with H a multiple of K.

    position_ids: (B, T), which don't go up by one where a piece begins. Returns (B, T, H, D). With a mask, or where
    there are keys of earlier tokens, it is torch's attention.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2] or position_ids is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        more = {**kwargs, "scaling": scaling, "position_ids": position_ids}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **more)
    shared = query.shape[1] // key.shape[1]
    key, value = (one.repeat_interleave(shared, dim=1) if shared > 1 else one for one in (key, value))
    blocks = list(blocks_of(position_ids.expand(query.shape[0], -1)))
    return _Pieces.apply(query, key, value, blocks, scaling), None


class Block(NamedTuple):
    """Queries [begin, end) of a row, which see its keys [first, end) up to their own."""

    row: int
    first: int
    begin: int
    end: int


def blocks_of(position_ids: torch.Tensor) -> Iterator[Block]:
    """Position ids (B, T) cut where they don't go up by one, and every BLOCK tokens of a piece."""
    tokens = position_ids.shape[1]
    begins = (position_ids.diff(dim=1) != 1).nonzero().tolist()
    cuts: list[list[int]] = [[0] for _ in range(position_ids.shape[0])]
    for row, before in begins:
        cuts[row].append(before + 1)
    for row, firsts in enumerate(cuts):
        for first, end in zip(firsts, [*firsts[1:], tokens], strict=True):
            yield from (Block(row, first, begin, min(begin + BLOCK, end)) for begin in range(first, end, BLOCK))


class _Pieces(torch.autograd.Function):
    """torch's kernel for CPUs on one block after another. Tensors (B, H, T, D), the result (B, T, H, D)."""

    @staticmethod
    def forward(ctx, query, key, value, blocks, scaling):
        out = torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format)
        sums = []
        for block in blocks:
            part, log_sum = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                *_seen(block, query, key, value), **_how(block, query, scaling)
            )
            out[block.row, block.begin : block.end] = part[0].transpose(0, 1)
            sums.append(log_sum)
        ctx.save_for_backward(query, key, value, out, *sums)
        ctx.blocks, ctx.scaling = blocks, scaling
        return out

    @staticmethod
    def backward(ctx, gradient):
        query, key, value, out, *sums = ctx.saved_tensors
        for_query, for_key, for_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
        for block, log_sum in zip(ctx.blocks, sums, strict=True):
            seen, (result, gradients) = _seen(block, query, key, value), _answered(block, out, gradient)
            how = _how(block, query, ctx.scaling)
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradients, *seen, result, log_sum, 0.0, how.pop("is_causal"), **how
            )
            for_query[block.row, :, block.begin : block.end] = parts[0][0]
            for_key[block.row, :, block.first : block.end] += parts[1][0]
            for_value[block.row, :, block.first : block.end] += parts[2][0]
        return for_query, for_key, for_value, None, None


def _seen(block: Block, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The block's queries (1, H, N, D), and the keys and values that they see."""
    row = slice(block.row, block.row + 1)
    keys = slice(block.first, block.end)
    return query[row, :, block.begin : block.end], key[row, :, keys], value[row, :, keys]


def _answered(block: Block, *results: torch.Tensor) -> Iterator[torch.Tensor]:
    """The block's part of results (B, T, H, D), as (1, H, N, D)."""
    return (one[block.row : block.row + 1, block.begin : block.end].transpose(1, 2) for one in results)


def _how(block: Block, query: torch.Tensor, scaling: float | None) -> dict[str, Any]:
    """A mask where keys before the block are seen too: torch's causal one begins at the first key."""
    if block.begin == block.first:
        return {"is_causal": True, "scale": scaling}
    before, size = block.begin - block.first, block.end - block.begin
    hidden = torch.full((size, size), float("-inf"), dtype=query.dtype).triu(1)
    mask = torch.cat([torch.zeros(size, before, dtype=query.dtype), hidden], dim=1)[None, None]
    return {"is_causal": False, "attn_mask": mask, "scale": scaling}
