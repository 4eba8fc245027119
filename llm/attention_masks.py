"""What each query may attend to, for models whose layers look at everything and for those with a sliding window."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"


class AttentionMasks:
    """Builds the masks of one model's forward passes: a tensor, or one for each kind of layer where they differ."""

    def __init__(self, config: PreTrainedConfig):
        """ValueError if the model has layers that are not attention over a cache of keys and values."""
        self.window: int | None = getattr(config, "sliding_window", None)
        # Without a list of layers, a window holds in all of them (Mistral).
        uniform = SLIDING if self.window else FULL
        self.kinds = sorted(set(getattr(config, "layer_types", None) or (uniform,)))
        unusual = [kind for kind in self.kinds if kind not in (FULL, SLIDING)]
        if unusual:
            raise ValueError(f"the model has {', '.join(unusual)} layers: the engine runs attention only")
        if SLIDING in self.kinds and not self.window:
            raise ValueError("the model has sliding_attention layers, but its config names no sliding_window")

    def build(self, positions: Tensor, longest: int, dtype: torch.dtype) -> Tensor | dict[str, Tensor]:
        """Masks (n, 1, q, longest), added to the scores, of queries at `positions` (n, q) over positions 0 on."""
        # Added, as every attention implementation takes it; a boolean mask only some do.
        keys = torch.arange(longest, device=positions.device)
        queries = positions[:, None, :, None]
        masks = {kind: _additive(self._hidden(kind, keys, queries), dtype) for kind in self.kinds}
        return masks if len(masks) > 1 else masks[self.kinds[0]]

    def _hidden(self, kind: str, keys: Tensor, queries: Tensor) -> Tensor:
        future = keys > queries
        if kind == FULL or self.window is None:
            return future
        return future | (keys <= queries - self.window)


def _additive(hidden: Tensor, dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
    return mask.masked_fill_(hidden, torch.finfo(dtype).min)
