"""DeepSpeed ZeRO: its settings, its engine, and the training state as fragments that any number of workers can read.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) leaves each rank a share of the fp32 weights and of AdamW's moments.
That share is saved here as what it is, pieces of named parameters, so a checkpoint depends neither on the number of
ranks nor on the stage that wrote it.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Fragment:
    """A rank's piece of one parameter: `start` in the flattened parameter, views of the fp32 state behind it.

    `tensors` maps "weight", "exp_avg" and "exp_avg_sq" to one-dimensional views; writing to them changes the state.
    """

    name: str
    start: int
    tensors: dict[str, torch.Tensor]

    @property
    def numel(self) -> int:
        return self.tensors["weight"].numel()


def deepspeed():
    """The package, set up so that nothing is compiled.

    On CPU DeepSpeed builds a shared-memory collective with g++ at first use, and a process killed meanwhile leaves a
    lock on which all later ones wait. gloo carries the same collectives.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    deepspeed.utils.logger.setLevel(logging.ERROR)
    if not torch.cuda.is_available():
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def zero_settings(
    *,
    stage: int,
    micro_batch: int,
    accumulation: int,
    dtype: str,
    clip_norm: float,
    offload: str = "none",
) -> dict[str, Any]:
    """DeepSpeed's configuration. `micro_batch` is rows a forward pass, `accumulation` forward passes a step.

    offload: "none", "optimizer" (its state) or "all" (ZeRO-3's weights too), to the machine's memory.
    """
    target = {"device": "cpu", "pin_memory": True}
    offloaded = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[offload]
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": {
            "stage": stage,
            "contiguous_gradients": True,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_gather_16bit_weights_on_model_save": True,
            **{f"offload_{what}": target for what in offloaded},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, which needs no compiler, on a CPU too
        "steps_per_print": 10**9,
    }


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without."""
    weights = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in weights if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in weights if p.dim() < 2], "weight_decay": 0.0},
    ]


def initialise(model: nn.Module, settings: dict[str, Any], *, betas: tuple[float, float], weight_decay: float):
    """A DeepSpeed engine around `model` with torch's fused AdamW: no compiler; the rate is set each step."""
    groups = [group for group in parameter_groups(model, weight_decay) if group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, betas=betas, fused=True)
    engine, *_ = deepspeed().initialize(model=model, optimizer=optimizer, config=settings)
    return engine


def set_learning_rate(engine, rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def fragments(engine, optimizer_steps: int) -> Iterator[Fragment]:
    """This rank's pieces of the fp32 state; moments are made (zero) where no step has been taken yet."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    walk = _stage3 if engine.zero_optimization_stage() == 3 else _stage12
    yield from walk(engine.optimizer, names, optimizer_steps)


def _stage12(optimizer, names: dict[int, str], steps: int) -> Iterator[Fragment]:
    for flat, parameters in zip(optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups, strict=True):
        moments = _moments(optimizer.optimizer, flat, steps)
        for parameter in parameters:
            piece = parameter._hp_mapping
            if piece is None:
                continue
            at = piece.get_hp_fragment_address()
            tensors = {"weight": flat.data, **moments}
            views = {kind: tensor.narrow(0, at.start, at.numel) for kind, tensor in tensors.items()}
            yield Fragment(names[id(parameter)], piece.lp_fragment_address.start, views)


def _stage3(optimizer, names: dict[int, str], steps: int) -> Iterator[Fragment]:
    rank = torch.distributed.get_rank()
    for flat, parameters in zip(optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups, strict=True):
        tensors = {"weight": flat.data, **_moments(optimizer.optimizer, flat, steps)}
        at = 0
        for parameter in parameters:
            share = parameter.partition_numel()
            start = rank * share
            real = max(0, min(share, parameter.ds_numel - start))  # the last ranks' shares are padded
            if real:
                views = {kind: tensor.narrow(0, at, real) for kind, tensor in tensors.items()}
                yield Fragment(names[id(parameter)], start, views)
            at += share


def _moments(optimizer: torch.optim.Optimizer, flat: torch.Tensor, steps: int) -> dict[str, torch.Tensor]:
    state = optimizer.state[flat]
    if "step" not in state:
        state["step"] = torch.tensor(0.0, device=flat.device)
        state.update({kind: torch.zeros_like(flat.data) for kind in MOMENTS})
    state["step"].fill_(float(steps))
    return {kind: state[kind] for kind in MOMENTS}


def is_sharded(engine) -> bool:
    """Whether a rank holds but a share of the weights, so that gathering them is collective."""
    return engine.zero_optimization_stage() == 3


def whole_weights(engine) -> dict[str, torch.Tensor]:
    """All weights in the compute precision, by name. Collective: every rank must call it (ZeRO-3 gathers)."""
    if is_sharded(engine):
        return engine._zero3_consolidated_16bit_state_dict()
    return engine.module.state_dict()
