"""Models larger than a machine's memory: weights drawn, read and written a module or a file at a time.

Each module has its weights in memory for as long as `share` takes to leave this rank its part (ZeRO-3's,
`llm.zero.sharer`), so the most a rank holds is its share of the model and the largest module. The weights are those of
the whole build (`llm.presets.build_model`) bit for bit. Reads safetensors; writes Hugging Face's sharded safetensors.
"""

from __future__ import annotations

import ctypes
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FILE_BYTES = 5 * 10**9
INDEX = "model.safetensors.index.json"

log = logging.getLogger("headwater")

# Leaves this rank its share of a module's own parameters; rank 0's values count. Collective.
Share = Callable[[nn.Module], None]
# Gives a module its weights, given what transformers would do to initialise it.
Fill = Callable[[Callable[[], None], nn.Module], None]


class NotInParts(Exception):
    """Why a model can't be built or read a module at a time."""


def draw_model(config, seed: int, share: Share) -> PreTrainedModel:
    """The model that `build_model(config, seed)` draws, of which this rank keeps its share. Collective.

    Built whole where the architecture's initialisation of a module reaches into others.
    """
    from llm.presets import build_model

    try:
        return _draw(config, seed, share)
    except NotInParts as why:
        log.warning("every rank builds the whole model before it keeps its share: %s", why)
        return build_model(config, seed)


def read_model(folder: Path, share: Share | None) -> PreTrainedModel:
    """The causal model in `folder` in the precision in which it was saved, of which this rank keeps its share.

    Rank 0 alone reads. Collective. Read whole, by each rank, where there is no `share`, or where the files' tensors
    don't have the names or shapes of the model's weights. ValueError if weights are missing or no safetensors.
    """
    from transformers import AutoModelForCausalLM

    from llm.loading import read_weights

    try:
        if share is not None:
            return _read(folder, share)
    except NotInParts as why:
        log.warning("every rank reads the whole model in %s before it keeps its share: %s", folder, why)
    return read_weights(AutoModelForCausalLM, folder, "auto")


def files_of(sizes: dict[str, int], most: int) -> list[list[str]]:
    """Names in order, cut into files of at most `most` bytes, or of one tensor where that is larger."""
    files: list[list[str]] = []
    room = 0
    for name, size in sizes.items():
        if not files or size > room:
            files.append([])
            room = most
        files[-1].append(name)
        room -= size
    return files


def write_weights(
    folder: Path,
    sizes: dict[str, int],
    gather: Callable[[list[str]], dict[str, torch.Tensor]],
    most: int,
) -> None:
    """Write tensors to several safetensors files with Hugging Face's index, one file's tensors in memory at a time.

    most: bytes of a file, unless a single tensor is larger. sizes: bytes by name. gather: the tensors of
    these names, on rank 0 alone; collective, and so is this.
    """
    files, of_file = files_of(sizes, most), {}
    for number, names in enumerate(files, 1):
        file = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        of_file.update(dict.fromkeys(names, file))
        if weights := gather(names):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(weights, folder / file, metadata={"format": "pt"})
    if dist.get_rank() == 0:
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": of_file}
        (folder / INDEX).write_text(json.dumps(index, indent=1))


def shape_of(parameter: nn.Parameter) -> torch.Size:
    """The whole parameter's; one that ZeRO-3 has shared out says of itself that it is empty."""
    return getattr(parameter, "ds_shape", parameter.shape)


def _hand_back_memory() -> None:
    """Give freed memory back to the system: glibc keeps the gaps that modules leave between the shares of them."""
    with suppress(AttributeError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


# Drawing


def _draw(config, seed: int, share: Share) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM
    from transformers.initialization import no_tie_weights

    fill = partial(_drawn, share=share)
    with torch.random.fork_rng(devices=[]), no_tie_weights(), _initialised_by(fill), torch.device("meta"), _Drawing():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, trust_remote_code=False)
    model.tie_weights()  # not before: a tied weight is drawn like any other
    return model


@contextmanager
def _initialised_by(fill: Fill) -> Iterator[None]:
    """Have `fill(initialise, module)` give each module its weights when transformers would initialise it.

    transformers does so at the end of each (sub-)model's constructor, but not for weights without storage.
    """
    from transformers import PreTrainedModel

    inits, initialise = PreTrainedModel.init_weights, PreTrainedModel._initialize_weights

    def module_of(model: PreTrainedModel, module: nn.Module, is_custom_code: bool = False) -> None:
        if not getattr(module, "_is_hf_initialized", False):
            fill(partial(initialise, model, module, is_custom_code), module)

    PreTrainedModel.init_weights = PreTrainedModel.initialize_weights
    PreTrainedModel._initialize_weights = module_of
    try:
        yield
    finally:
        PreTrainedModel.init_weights, PreTrainedModel._initialize_weights = inits, initialise


def _drawn(initialise: Callable[[], None], module: nn.Module, share: Share) -> None:
    module.to_empty(device="cpu", recurse=False)
    for tensor in _own(module):
        tensor.detach().fill_(_nothing(tensor))
    with torch.device("cpu"), _OwnAlone():
        initialise()
    for tensor in _own(module):
        if _is_nothing(tensor.detach()):
            raise NotInParts(f"{type(module).__name__} has weights that its initialisation leaves as they are")
    share(module)
    _hand_back_memory()


def _own(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(recurse=False), *module.buffers(recurse=False)]


def _nothing(tensor: torch.Tensor) -> float | int:
    """A value that no initialisation gives."""
    if tensor.is_floating_point():
        return float("nan")
    if tensor.dtype == torch.bool:
        raise NotInParts("it has a buffer of truth values, which can't be told from one that was never set")
    return torch.iinfo(tensor.dtype).min


def _is_nothing(tensor: torch.Tensor) -> bool:
    return bool((tensor.isnan() if tensor.is_floating_point() else tensor == _nothing(tensor)).any())


class _Drawing(TorchDispatchMode):
    """Weights without storage draw their numbers all the same: what is drawn after them stays what it was."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags and any(map(_without_storage, tree_leaves((args, kwargs)))):
            func(*tree_map(_on_cpu, args), **tree_map(_on_cpu, kwargs))
        return func(*args, **kwargs)


class _OwnAlone(TorchDispatchMode):
    """Refuses what changes a weight that has been shared out already."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func._schema.is_mutable and isinstance(args[0], torch.Tensor) and not args[0].numel():
            raise NotInParts("the initialisation of a module reaches into others")
        return func(*args, **(kwargs or {}))


def _without_storage(value: Any) -> bool:
    return (isinstance(value, torch.Tensor) and value.is_meta) or value == torch.device("meta")


def _on_cpu(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return torch.empty_like(value, device="cpu") if value.is_meta else value
    return torch.device("cpu") if value == torch.device("meta") else value


# Reading


def _read(folder: Path, share: Share) -> PreTrainedModel:
    from transformers.initialization import no_tie_weights

    from llm.architectures import on_meta, read_config

    with no_tie_weights():
        model = on_meta(read_config(folder))
    files = _Files(folder)
    tied = _tied(model, files)
    names = {id(module): name for name, module in model.named_modules()}

    def fill(initialise: Callable[[], None], module: nn.Module) -> None:
        with _set_aside(module, names[id(module)], tied):
            _filled(module, names[id(module)], files)
            with torch.device("cpu"):
                initialise()  # what is in no file: buffers that follow from the configuration
            share(module)
            _hand_back_memory()

    with _initialised_by(fill):
        model.initialize_weights()
    model.tie_weights()
    return model


def _tied(model: PreTrainedModel, files: _Files) -> set[str]:
    """Names of the weights that are another's and so in no file. NotInParts if the others' aren't all there."""
    tied = {name for name in model.all_tied_weights_keys if name not in files.shapes}
    for name, weight in model.state_dict().items():
        if name not in tied and files.shapes.get(name) != tuple(weight.shape):
            raise NotInParts(f"{name} is in no file, or in another shape")
    if set(model.all_tied_weights_keys) - tied:
        raise NotInParts("weights that are to be one are in the files as two")
    return tied


def _filled(module: nn.Module, prefix: str, files: _Files) -> None:
    """Give a module what the files have of its own; a parameter's values on rank 0 alone."""
    kept = module.state_dict(keep_vars=True).keys()
    module.to_empty(device="cpu", recurse=False)
    for name, tensor in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)):
        tensor._is_hf_initialized = name in kept  # type: ignore[attr-defined]
        if name in kept and (dist.get_rank() == 0 or not isinstance(tensor, nn.Parameter)):
            tensor.detach().copy_(files.read(_full(prefix, name)))


@contextmanager
def _set_aside(module: nn.Module, prefix: str, tied: set[str]) -> Iterator[None]:
    """A module without those of its weights that will be another's."""
    aside = {name: weight for name, weight in module._parameters.items() if _full(prefix, name) in tied}
    module._parameters.update(dict.fromkeys(aside))
    yield
    module._parameters.update(aside)


def _full(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


class _Files:
    """The safetensors of a Hugging Face folder, read a tensor at a time."""

    def __init__(self, folder: Path):
        self._of = {name: file for path in sorted(folder.glob("*.safetensors")) for file, name in _names(path)}
        self.shapes = {name: tuple(file.get_slice(name).get_shape()) for name, file in self._of.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._of[name].get_tensor(name)


def _names(path: Path) -> Iterator[tuple[Any, str]]:
    file = safe_open(path, framework="pt")
    return ((file, name) for name in file.keys())  # noqa: SIM118
