"""Tensor parallelism: the ranks of a group have the same rows, and a slice each of every layer's matrices.

Shoeybi et al. 2019 (Megatron-LM, arXiv 1909.08053, section 3): the matrices that open attention or a block are cut by
their outputs and those that close it by their inputs, so that a group adds up twice a layer in either direction. The
cutting and the sums are DeepSpeed's (AutoTP), after the plan that transformers has for the architecture. Embeddings,
norms and the head stay whole on every rank. Ranks i*N to (i+1)*N - 1 make a group.
"""

from __future__ import annotations

import math
import re
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import nn

from llm.architectures import on_meta

# transformers' styles of a layer, and DeepSpeed's words for each. A weight of the last kind is whole on every rank,
# but used on the rank's own heads, so that its gradients are added up.
STYLES: dict[str, dict[str, Any]] = {
    "colwise": {"partition_type": "column"},
    "rowwise": {"partition_type": "row"},
    "replicated_with_grad_allreduce": {"partition_type": "skip", "grad_allreduce": True},
}


class Columns(NamedTuple):
    """The columns of a matrix that a rank has: `width` of them from `first` on, of `total`."""

    first: int
    width: int
    total: int


class Slice(NamedTuple):
    """What a rank has of a parameter of shape `whole`: `size` from `first` on in dimension `dim`."""

    whole: tuple[int, ...]
    dim: int
    first: int
    size: int


def why_not(config: Any, parts: int) -> str | None:
    """Why the layers of a model of `config` can't be cut for so many ranks; None if they can."""
    text = config.get_text_config()
    plan, of_type = text.base_model_tp_plan, f"a model of type {text.model_type}"
    if not plan:
        return f"transformers has no plan for cutting {of_type}"
    if others := sorted({style for style in plan.values() if style not in STYLES}):
        return f"{of_type} is cut in a way not known here: {', '.join(others)}"
    counts = {
        "heads": text.num_attention_heads,
        "heads of keys and values": getattr(text, "num_key_value_heads", None) or text.num_attention_heads,
        "features of a feed-forward block": text.intermediate_size,
    }
    if odd := [what for what, count in counts.items() if not isinstance(count, int)]:
        return f"{of_type} has not the same number of {odd[0]} in each layer"
    if odd := _beside(on_meta(config), plan):
        return f"{of_type} has weights in its layers that the plan for cutting it doesn't name: {odd[0]}"
    return next((f"{count} {what} are no multiple of it" for what, count in counts.items() if count % parts), None)


def _beside(model: nn.Module, plan: dict[str, str]) -> list[str]:
    """Parameters in modules that are cut which the plan doesn't name: ranks would use them on their own parts."""
    named = {
        name for entry, style in plan.items() for name, _ in model.named_parameters() if _names(entry, style, name)
    }
    cut = {name.rpartition(".")[0].rpartition(".")[0] for name in named}
    return [
        name for name, _ in model.named_parameters() if name not in named and any(_inside(name, one) for one in cut)
    ]


def _names(entry: str, style: str, parameter: str) -> bool:
    """Whether an entry of the plan tells what becomes of a parameter; of an added-up one it does for the weight."""
    kinds = r"\.(weight|bias)$" if style in ("colwise", "rowwise") else r"\.weight$"
    return re.match(_module(entry) + kinds, parameter) is not None


def _inside(parameter: str, module: str) -> bool:
    return parameter.startswith(f"{module}.")


def settings(config: Any, parts: int) -> dict[str, Any]:
    """DeepSpeed's settings for a model of `config`, cut for so many ranks; none for one."""
    if parts == 1:
        return {}
    plan = config.get_text_config().base_model_tp_plan
    layers = [{"patterns": [_module(name) + r"\.weight$"], **STYLES[style]} for name, style in plan.items()]
    own = {"use_default_specs": False, "layer_specs": layers}
    return {"tensor_parallel": {"autotp_size": parts, "vocab_parallel_lm_head": False, "partition_config": own}}


def _module(entry: str) -> str:
    """A regular expression for the modules that an entry of the plan means."""
    return ".*" + entry.replace(".", r"\.").replace("*", r"\d+")


def parts_of(engine: Any) -> int:
    """Ranks among which DeepSpeed's `engine` has cut its layers."""
    return max(1, engine.autotp_size())


def slice_of(tensor: torch.Tensor) -> Slice | None:
    """What this rank has of a parameter; None if that is all of it."""
    told = getattr(tensor, "ds_autotp_universal_checkpoint_meta", None)
    if not told or told["partition_dim"] is None:
        return None
    sizes = told["partition_sizes"]
    part = dist.get_rank() % len(sizes)
    return Slice(tuple(told["original_shape"]), told["partition_dim"], sum(sizes[:part]), sizes[part])


def place_of(parameter: torch.Tensor, start: int) -> tuple[int, Columns | None]:
    """Where value `start` of what this rank has of a parameter is: in the whole parameter, flattened, or in columns.

    Of a parameter cut by its first dimension it is a place in the whole. Of one cut by its second it stays what it
    was, and the columns are told.
    """
    cut = slice_of(parameter)
    if cut is None:
        return start, None
    if cut.dim == 0:
        return start + cut.first * math.prod(cut.whole[1:]), None
    return start, Columns(cut.first, cut.size, cut.whole[1])


def numel_of(tensor: torch.Tensor) -> int:
    """Values of the whole parameter."""
    cut = slice_of(tensor)
    return math.prod(cut.whole) if cut else tensor.numel()


@torch.no_grad()
def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The whole of a parameter, or what it is if this rank has all of it. Collective among the ranks of a group."""
    from deepspeed.utils import groups

    cut, mine = slice_of(tensor), tensor.detach()
    if cut is None:
        return mine
    group = groups.get_tensor_model_parallel_group()
    everyones = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]  # all of one size: see `why_not`
    dist.all_gather(everyones, mine.contiguous(), group=group)
    return torch.cat(everyones, dim=cut.dim)


def whole_weights(model: nn.Module) -> dict[str, torch.Tensor]:
    """All that a saved model holds, by name, on the CPU of rank 0; nothing on the others. Collective.

    What has two names (tied weights) stays one tensor.
    """
    kept = model.state_dict(keep_vars=True)
    made: dict[int, torch.Tensor] = {}
    for tensor in kept.values():
        if id(tensor) not in made:
            joined = whole(tensor)
            made[id(tensor)] = joined.to("cpu", copy=True) if dist.get_rank() == 0 else joined.new_empty(0)
    return {name: made[id(tensor)] for name, tensor in kept.items()} if dist.get_rank() == 0 else {}
