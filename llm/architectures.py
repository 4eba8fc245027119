"""Any decoder that transformers can build: from a mapping that a person wrote, or from a Hugging Face folder.

Reads a folder's `config.json` and, to go on training, its `model.safetensors`; writes nothing. Nothing of a folder is
ever run: no remote code, no pickles.
"""

from __future__ import annotations

import dataclasses
import difflib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel

# What follows from the run's tokenizer, and what transformers keeps for itself.
FROM_TOKENIZER = ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id")
PIECE = 8  # tokens of the pieces with which attention is tried
ROUNDING = 1e-4  # of the logits' standard deviation: less is no attention


@dataclass(frozen=True)
class Architecture:
    """A decoder by its transformers `model_type` and the `values` of its configuration that aren't the defaults."""

    model_type: str
    values: dict[str, Any] = field(default_factory=dict)

    @property
    def context(self) -> int:
        """Tokens that it can attend over."""
        return context_of(self.config(Ids(64)))

    def config(self, tokenizer) -> PreTrainedConfig:
        """The Hugging Face configuration for `tokenizer`'s ids; dropout is 0 unless the values say otherwise.

        ValueError if transformers refuses the values.
        """
        from transformers import AutoConfig

        fixed = {**_token_ids(tokenizer), "vocab_size": len(tokenizer)}
        try:
            return AutoConfig.for_model(self.model_type, **{**_no_dropout(self.model_type), **self.values, **fixed})
        except Exception as error:  # of many kinds: each configuration checks itself in its own way
            raise ValueError(f"{self.model_type} can't be configured so: {_first_line(error)}") from None

    def parameters(self, vocab_size: int) -> int:
        """Number of weights with `vocab_size` token ids, counted on a model without storage."""
        return count_parameters(self.config(Ids(vocab_size)))


@dataclass(frozen=True)
class Saved:
    """The model in a Hugging Face folder, which has a vocabulary of its own."""

    folder: Path

    @property
    def context(self) -> int:
        """Tokens that it can attend over."""
        return context_of(read_config(self.folder))

    def config(self, tokenizer) -> PreTrainedConfig:
        """The Hugging Face configuration, the same for any `tokenizer`. ValueError if there is none."""
        return read_config(self.folder)

    def parameters(self, vocab_size: int) -> int:
        """Number of weights, whatever `vocab_size` is."""
        return count_parameters(read_config(self.folder))


def saved_at(folder: Path) -> Saved:
    """The causal model in `folder`. ValueError unless it holds one, with its tokenizer, that transformers knows."""
    from llm.loading import check_model_folder

    check_model_folder(folder)
    read_config(folder)
    if not any(folder.glob("*.safetensors")):
        raise ValueError(f"no safetensors in {folder}: weights in other forms are not read")
    return Saved(folder)


def check_architecture(values: dict[str, Any]) -> Architecture:
    """The architecture that `values` (`model_type` and configuration keys) name.

    ValueError names an unknown type or key with the nearest known ones, or what transformers refuses.
    """
    model_type = values.get("model_type")
    if model_type not in (known := known_types()):
        near = difflib.get_close_matches(str(model_type), known, n=5, cutoff=0.4) or known[:20]
        raise ValueError(
            f"unknown model_type {model_type!r}, of {len(known)} known ones the nearest: {', '.join(near)}"
        )
    rest = {name: value for name, value in values.items() if name != "model_type"}
    names = _names(model_type)
    for name in rest:
        if name in FROM_TOKENIZER:
            raise ValueError(f"{name} is the tokenizer's, leave it out")
        if name not in names:
            raise ValueError(f"{model_type} has no '{name}', known are {', '.join(names)}")
    architecture = Architecture(model_type, rest)
    architecture.config(Ids(64))
    return architecture


def known_types() -> list[str]:
    """The `model_type`s of which transformers has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def read_config(folder: Path) -> PreTrainedConfig:
    """The configuration of the model in `folder`. ValueError if it isn't one that transformers itself knows."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"no usable config.json in {folder}: {_first_line(error)}") from None


def context_of(config: PreTrainedConfig) -> int:
    """Tokens that a model of `config` can attend over; `sys.maxsize` where its positions have no end."""
    return getattr(config, "max_position_embeddings", None) or sys.maxsize


def window_of(config: PreTrainedConfig) -> int | None:
    """Tokens that the layers of the shortest sliding window or chunk of a model of `config` see; None without any."""
    if getattr(config, "use_sliding_window", True) is False:
        return None
    kinds = getattr(config, "layer_types", None)
    if kinds is not None and not {"sliding_attention", "chunked_attention"} & set(kinds):
        return None
    found = (getattr(config, name, None) for name in ("sliding_window", "local_attention", "attention_chunk_size"))
    return min((size for size in found if isinstance(size, int)), default=None)


def count_parameters(config: PreTrainedConfig) -> int:
    """Number of weights of a model of `config`; no storage is taken."""
    return sum(weight.numel() for weight in on_meta(config).parameters())


def on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config` without storage for its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def load_weights(folder: Path) -> PreTrainedModel:
    """The causal model in `folder` in fp32, to go on training. ValueError if weights are missing or no safetensors."""
    import torch
    from transformers import AutoModelForCausalLM

    from llm.loading import read_weights

    return read_weights(AutoModelForCausalLM, folder, torch.float32)


def unfit(config: PreTrainedConfig, *, isolated: bool = True) -> str | None:
    """Why models of this architecture can't be trained on packed rows to tell the next token; None if they can.

    A token may not see what comes after it, as an encoder's tokens do. isolated: none may see the piece before its own
    in the row; positions that begin again are all that tells transformers where a piece ends, and
    architectures without them (ALiBi, recurrent ones) mix what is packed. Tried on two layers with two pieces.
    """
    import torch

    model = two_layers(config).eval()
    first, second = torch.arange(PIECE), torch.arange(PIECE, 2 * PIECE)
    rows = torch.stack(
        [torch.cat(pair) for pair in ((first, second), (first, second.flip(0)), (first.flip(0), second))]
    )
    positions = torch.arange(PIECE).repeat(2).expand_as(rows)
    try:
        with torch.no_grad():
            logits = model(input_ids=rows, position_ids=positions, use_cache=False).logits
    except TypeError:
        return "it takes no positions, by which packed documents are told apart"
    if _differ(logits[0, :PIECE], logits[1, :PIECE]):
        return "it sees the tokens that it is to tell (an encoder needs is_decoder: true)"
    if isolated and _differ(logits[0, PIECE:], logits[2, PIECE:]):
        return "its attention goes from one document to the next where several share a row"
    return None


def _differ(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).abs().max() > ROUNDING * one.std())


def two_layers(config: PreTrainedConfig) -> PreTrainedModel:
    """A model of `config`'s architecture with two layers and 64 ids, its weights drawn."""
    import torch

    from llm.presets import build_model

    values = config.to_dict()
    changes = {config.attribute_map.get("num_hidden_layers", "num_hidden_layers"): 2, "vocab_size": 64}
    if values.get("layer_types"):
        changes["layer_types"] = values["layer_types"][:2]
    small = type(config).from_dict({**values, **changes, **_token_ids(Ids(64))})
    model = build_model(small, seed=0)
    with torch.no_grad():  # the usual small weights would hide what little is seen
        for weight in model.parameters():
            weight.mul_(4 if weight.dim() >= 2 else 1)
    return model


def _names(model_type: str) -> list[str]:
    """The keys of a type's configuration, the standard names among them; not what every configuration has."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    schema = CONFIG_MAPPING[model_type]
    common = {one.name for one in dataclasses.fields(PreTrainedConfig)}
    own = [one.name for one in _fields(model_type) if one.name not in common]
    return [*own, *(name for name in schema.attribute_map if name not in own)]


def _no_dropout(model_type: str) -> dict[str, float]:
    """Text is read about once, so nothing is to be kept from being learnt by heart; and a run that is resumed could
    not draw the same again."""
    return {one.name: 0.0 for one in _fields(model_type) if "drop" in one.name and type(one.default) in (int, float)}


def _fields(model_type: str) -> tuple[dataclasses.Field, ...]:
    from transformers import CONFIG_MAPPING

    return dataclasses.fields(CONFIG_MAPPING[model_type])


def _token_ids(tokenizer) -> dict[str, int | None]:
    """The run's special tokens; whatever else a configuration may name is none of the run's."""
    ids: dict[str, int | None] = dict.fromkeys(name for name in FROM_TOKENIZER if name != "vocab_size")
    return {**ids, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}


def _first_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]


@dataclass(frozen=True)
class Ids:
    """A tokenizer of so many ids, as far as a configuration asks."""

    size: int
    eos_token_id: int = 0
    pad_token_id: int = 1

    def __len__(self) -> int:
        return self.size
