"""DeepSpeed ZeRO: its settings, its engine, and the training state as fragments that any number of workers can read.

ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054) leaves each rank a share of the fp32 weights and of AdamW's moments.
That share is saved here as what it is, pieces of named parameters, so a checkpoint depends neither on the number of
ranks nor on the stage that wrote it. With Muon (`llm/muon.py`) a hidden matrix has one momentum in place of moments.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm import slices
from llm.muon import Muon, Piece, hidden_matrices
from llm.parts import Share, shape_of
from llm.slices import Columns

MOMENTS = {"adamw": ("exp_avg", "exp_avg_sq"), "muon": ("momentum_buffer",)}
SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")  # what changes of fp16's loss scale
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Fragment:
    """A rank's piece of one parameter: `start` in the flattened parameter, views of the fp32 state behind it.

    `tensors` maps "weight" and the optimizer's state ("exp_avg" and "exp_avg_sq" of AdamW, "momentum_buffer" of Muon)
    to one-dimensional views; writing to them changes the state. Where the rank has some columns of a matrix alone,
    `start` and the values are counted in those. spare: whether another rank saves the same.
    """

    name: str
    start: int
    tensors: dict[str, torch.Tensor]
    columns: Columns | None = None
    spare: bool = False

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
    offload_to: str = "cpu",
) -> dict[str, Any]:
    """DeepSpeed's configuration. `micro_batch` is rows a forward pass, `accumulation` forward passes a step.

    offload: "none", "optimizer" (its state) or "all" (ZeRO-3's weights too), to the machine's memory.
    offload_to: "cpu", or a folder of this rank's own on an NVMe disk, to which ZeRO-3's optimizer state goes instead.
    """
    memory = {"device": "cpu", "pin_memory": True}
    disk = {"device": "nvme", "pin_memory": True, "nvme_path": offload_to}
    places = {"optimizer": memory if offload_to == "cpu" else disk, "param": memory}
    offloaded = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}[offload]
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip_norm,
        "bf16": {"enabled": dtype == "bf16"},
        "fp16": {"enabled": dtype == "fp16"},
        "zero_optimization": {
            "stage": stage,
            # Copied into a buffer, they don't scatter a GPU's memory; on a CPU it is a copy more.
            "contiguous_gradients": torch.cuda.is_available() or stage == 3,
            "overlap_comm": torch.cuda.is_available(),
            "stage3_gather_16bit_weights_on_model_save": True,
            **{f"offload_{what}": places[what] for what in offloaded},
        },
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's AdamW, which needs no compiler, on a CPU too
        "steps_per_print": 10**9,
    }


def sharer(settings: dict[str, Any], dtype: str) -> Share:
    """What leaves each rank its ZeRO-3 share of a module's own parameters, rank 0's values in `dtype`. Collective.

    settings: those that the engine will be given. Not around a constructor (`zero.Init` as a context): transformers
    draws a model's weights at the constructor's end, and would find them shared out already.
    """
    init = deepspeed().zero.Init

    def share(module: nn.Module) -> None:
        own = list(module.parameters(recurse=False))
        for parameter in own:
            parameter.data = parameter.data.to(DTYPES[dtype])
        if own:
            init(module=module, config_dict_or_path=settings)

    return share


def parameter_groups(model: nn.Module, weight_decay: float, optimizer: str = "adamw") -> list[dict[str, Any]]:
    """Matrices with weight decay, vectors (norms, biases) without; hidden matrices apart where Muon moves them."""
    weights = [p for p in model.parameters() if p.requires_grad]
    hidden = hidden_matrices(model) if optimizer == "muon" else set()
    matrices = [p for p in weights if len(shape_of(p)) >= 2]
    groups = [
        {"params": [p for p in matrices if id(p) in hidden], "weight_decay": weight_decay, "muon": True},
        {"params": [p for p in matrices if id(p) not in hidden], "weight_decay": weight_decay, "muon": False},
        {"params": [p for p in weights if len(shape_of(p)) < 2], "weight_decay": 0.0, "muon": False},
    ]
    return [group for group in groups if group["params"]]


def initialise(
    model: nn.Module,
    settings: dict[str, Any],
    *,
    betas: tuple[float, float],
    weight_decay: float,
    optimizer: str = "adamw",
    mpu: Any = None,
):
    """A DeepSpeed engine around `model` with torch's fused AdamW, which needs no compiler, or with Muon beside it.

    The rate is set each step (`set_learning_rate`). mpu: the groups of ranks that share rows
    (`llm.sequence.share_rows`), if some do.
    """
    groups = parameter_groups(model, weight_decay, optimizer)
    device = next(model.parameters()).device
    adamw: dict[str, Any] = {"lr": 0.0, "betas": betas, "fused": True}
    own = Muon(groups, device, **adamw) if optimizer == "muon" else torch.optim.AdamW(groups, **adamw)
    engine, *_ = deepspeed().initialize(model=model, optimizer=own, config=settings, mpu=mpu)
    if slices.parts_of(engine) > 1:
        # It sends a group's first batch to all of its ranks to compare, in memory of the first one's GPU.
        engine.first_dataloader_check.remove()
    if isinstance(own, Muon):
        for flat, pieces in _matrices(engine):
            own.lay_out(flat, pieces)
    return engine


def set_learning_rate(engine, rate: float) -> None:
    """Set the rate of every parameter group for the next step."""
    for group in engine.optimizer.param_groups:
        group["lr"] = rate


def averaged_over(engine) -> int:
    """What DeepSpeed divides the sum of the ranks' gradients by: groups of ranks that have the same rows, or ranks.

    Under ZeRO-3 it is the ranks in any case (`reduce_scatter_coalesced` of DeepSpeed 0.19).
    """
    ranks = torch.distributed.get_world_size()
    return ranks if is_sharded(engine) else ranks // (engine.sequence_parallel_size * slices.parts_of(engine))


def fragments(engine) -> Iterator[Fragment]:
    """This rank's pieces of the fp32 state; moments are made (zero) where no step has been taken yet.

    Each is to be read or filled before the next is asked for: what is offloaded to a disk is in memory no longer.
    """
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    first = torch.distributed.get_rank() % slices.parts_of(engine) == 0  # of its group
    for flat, muon, places in _shares(engine):
        tensors = {"weight": flat.data, **_moments(engine.optimizer.optimizer, flat, muon)}
        for parameter, start, at, numel in places:
            if numel:
                views = {kind: tensor.narrow(0, at, numel) for kind, tensor in tensors.items()}
                begin, columns = slices.place_of(parameter, start)
                spare = not first and slices.slice_of(parameter) is None
                yield Fragment(names[id(parameter)], begin, views, columns, spare)


def counters(engine) -> dict[str, float]:
    """What the optimizer counts: the steps it took (fp16's overflows left out), and the state of fp16's loss scale."""
    states = engine.optimizer.optimizer.state.values()
    steps = next((float(state["step"]) for state in states if "step" in state), 0.0)
    scaler = engine.optimizer.loss_scaler
    return {"steps": steps, **{name: getattr(scaler, name) for name in SCALER if scaler.dynamic}}


def set_counters(engine, counted: dict[str, float]) -> None:
    """Bring back what `counters` told, once all `fragments` are there; a scale that is fixed now stays so."""
    for state in engine.optimizer.optimizer.state.values():
        if "step" in state:
            state["step"].fill_(counted["steps"])
    scaler = engine.optimizer.loss_scaler
    for name in SCALER if scaler.dynamic else ():
        if name in counted:
            setattr(scaler, name, counted[name])


# A piece of a parameter in a flat share: (parameter, start in the parameter, start in the share, numel).
Place = tuple[nn.Parameter, int, int, int]


def _shares(engine) -> Iterator[tuple[torch.Tensor, bool, list[Place]]]:
    """Each flat share of this rank, whether Muon moves it, and the pieces in it (numel 0 where there is none)."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        flats, groups = optimizer.fp32_partitioned_groups_flat, optimizer.fp16_groups
        of_group, places = optimizer.sub_group_to_group_id, _places_stage3
    else:
        flats, groups = optimizer.single_partition_of_fp32_groups, optimizer.bit16_groups
        of_group, places = range(len(groups)), _places_stage12
    for number, (flat, parameters) in enumerate(zip(flats, groups, strict=True)):
        muon = optimizer.optimizer.param_groups[of_group[number]]["muon"]
        with _in_memory(engine, number):
            yield flat, muon, list(places(parameters))


@contextmanager
def _in_memory(engine, number: int) -> Iterator[None]:
    """A share whose state lies on a disk is read for as long as the block lasts, and then written back."""
    optimizer = engine.optimizer
    if not (is_on_disk(engine) and optimizer._swappable_optimizer_subgroup(number)):  # small ones stay in memory
        yield
        return
    optimizer._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        optimizer._optimizer_states_and_gradient_swap_out(number)


def _places_stage12(parameters: list[nn.Parameter]) -> Iterator[Place]:
    for parameter in parameters:
        piece: Any = parameter._hp_mapping  # type: ignore[attr-defined]
        if piece is None:
            yield parameter, 0, 0, 0
        else:
            at = piece.get_hp_fragment_address()
            yield parameter, piece.lp_fragment_address.start, at.start, at.numel


def _places_stage3(parameters: list[Any]) -> Iterator[Place]:
    rank, at = torch.distributed.get_rank(), 0
    for parameter in parameters:
        share = parameter.partition_numel()
        start = rank * share
        real = max(0, min(share, parameter.ds_numel - start))  # the last ranks' shares are padded
        yield parameter, start if real else 0, at, real
        at += share


def _matrices(engine) -> Iterator[tuple[torch.Tensor, list[Piece]]]:
    for flat, muon, places in _shares(engine):
        if muon:
            shapes = [shape_of(parameter) for parameter, *_ in places]
            yield flat, [Piece(shape, *place[1:]) for shape, place in zip(shapes, places, strict=True)]


def _moments(optimizer: torch.optim.Optimizer, flat: torch.Tensor, muon: bool) -> dict[str, torch.Tensor]:
    state, kinds = optimizer.state[flat], MOMENTS["muon" if muon else "adamw"]
    if kinds[0] not in state:
        state.update({kind: torch.zeros_like(flat.data) for kind in kinds})
    if not muon:
        state.setdefault("step", torch.tensor(0.0, device=flat.device))
    return {kind: state[kind] for kind in kinds}


def is_on_disk(engine) -> bool:
    """Whether the optimizer's state is offloaded to a disk."""
    return is_sharded(engine) and engine.optimizer.swap_optimizer


def is_sharded(engine) -> bool:
    """Whether ZeRO-3 leaves a rank but a share of the weights."""
    return engine.zero_optimization_stage() == 3


def is_parted(engine) -> bool:
    """Whether no rank holds all weights, so that gathering them is collective."""
    return is_sharded(engine) or slices.parts_of(engine) > 1


def weight_bytes(engine) -> dict[str, int]:
    """Bytes of each weight that a saved model holds, by name; one of several names (tied ones) once."""
    weights = {name: _numel(weight) * weight.element_size() for name, weight in engine.module.named_parameters()}
    return weights | {name: buffer.nbytes for name, buffer in _kept_buffers(engine.module)}


def _numel(weight: nn.Parameter) -> int:
    """Of the whole, of which ZeRO-3 leaves an empty tensor and a group of ranks a slice each."""
    return weight.ds_numel if hasattr(weight, "ds_numel") else slices.numel_of(weight)


def gathered(engine, names: list[str]) -> dict[str, torch.Tensor]:
    """These weights of an engine whose ranks hold parts, on the CPU of rank 0; nothing on the others. Collective."""
    everything = dict(engine.module.named_parameters()) | dict(_kept_buffers(engine.module))
    found = {}
    for name in names:
        tensor = everything[name]
        shared_out = is_sharded(engine) and isinstance(tensor, nn.Parameter)
        with deepspeed().zero.GatheredParameters([tensor], enabled=shared_out):
            whole = slices.whole(tensor)
            if torch.distributed.get_rank() == 0:
                found[name] = whole.to("cpu", copy=True).contiguous()
    return found


@contextmanager
def all_shared(engine) -> Iterator[None]:
    """Where weights can be `gathered`: between steps ZeRO-3 keeps small ones whole. Collective."""
    if not is_sharded(engine):
        yield
        return
    engine.optimizer.checkpoint_event_prologue()
    yield
    engine.optimizer.checkpoint_event_epilogue()


def _kept_buffers(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    kept = model.state_dict(keep_vars=True)
    return ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def whole_weights(engine) -> dict[str, torch.Tensor]:
    """All weights in the compute precision, by name. Collective where ranks hold parts of them (`is_parted`)."""
    if is_sharded(engine):
        return engine._zero3_consolidated_16bit_state_dict()
    return slices.whole_weights(engine.module) if is_parted(engine) else engine.module.state_dict()
