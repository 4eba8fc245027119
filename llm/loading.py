"""From a Hugging Face folder to a model or an engine: local files, safetensors, no remote code."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from llm.engine import Engine
from llm.int8 import quantize
from llm.presets import OBJECTIVE
from llm.vocabulary import load_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Dtype = Literal["float32", "bfloat16", "int8"]


# transformers replaces functions of its own while it reads a model, such as the one that ties weights. Two threads
# that read at once leave the replacements behind, and from then on no model of the process is whole.
_READING = threading.Lock()


def load_model(folder: str | Path, dtype: Dtype | None = None) -> PreTrainedModel:
    """The causal language model saved in `folder`, ready to generate: in fp32 on a CPU, as saved on a GPU.

    `dtype` has its weights in another one; "int8" (`llm.int8`) is for CPUs. ValueError if the folder holds no such
    model, or not all of its weights, or one that only fills in words, or if the dtype can't be had.
    """
    from transformers import AutoModelForCausalLM

    check_model_folder(Path(folder))
    return _load(AutoModelForCausalLM, folder, dtype)


def load_any(folder: str | Path) -> PreTrainedModel:
    """The model of text saved in `folder`, whether it continues text or fills in words, or both.

    ValueError if the folder holds no such model, or not all of its weights.
    """
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    if _is_encoder(Path(folder)):
        return _load(AutoModelForMaskedLM, folder)
    _check_causal(Path(folder))
    return _load(AutoModelForCausalLM, folder)


def load_filler(folder: str | Path) -> PreTrainedModel:
    """The model saved in `folder` that fills in masked words: an encoder, or a decoder that was trained to.

    ValueError if the folder holds no such model, or not all of its weights.
    """
    if not _is_encoder(Path(folder)):
        _check_causal(Path(folder))
        if _objective(Path(folder)) is None:
            raise ValueError(
                f"{folder} was trained to predict the next token (`headwater complete`), not to fill in words"
            )
    return load_any(folder)


def _load(auto, folder: str | Path, dtype: Dtype | None = None) -> PreTrainedModel:
    """The model in `folder` by one of transformers' `AutoModelFor...`, ready to generate."""
    gpu = torch.cuda.is_available()
    if dtype not in (None, *get_args(Dtype)):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    if dtype == "int8":
        if gpu:
            raise ValueError("dtype=int8 is for CPUs and this machine has a GPU: use bfloat16")
        return quantize(read_weights(auto, folder, torch.bfloat16).eval())
    usual: str | torch.dtype = "auto" if gpu else torch.float32
    wanted = getattr(torch, dtype) if dtype else usual
    return read_weights(auto, folder, wanted).to("cuda" if gpu else "cpu").eval()


def read_weights(auto, folder: str | Path, dtype: str | torch.dtype) -> PreTrainedModel:
    """The model in `folder` by one of transformers' `AutoModelFor...`, on the CPU.

    ValueError if there are no safetensors, or not all of the model's weights in them.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()  # it would be drawn into the text that a command prints
    try:
        with _READING:
            model, report = auto.from_pretrained(
                folder,
                dtype=dtype,
                local_files_only=True,
                trust_remote_code=False,
                use_safetensors=True,
                output_loading_info=True,
            )
    except OSError as error:
        raise ValueError(f"no usable weights (model.safetensors) in {folder}: {error}") from error
    finally:
        logging.enable_progress_bar()
    if report["missing_keys"]:
        names = sorted(report["missing_keys"])
        raise ValueError(f"{folder} lacks {len(names)} of its model's weights, {names[0]} among them")
    return model


def load(
    folder: str | Path, *, slots: int = 32, context: int | None = None, dtype: Dtype | None = None, **options: Any
) -> Engine:
    """An engine over the model and tokenizer in `folder`; ValueError if either is missing or they don't fit.

    `dtype` is that of the weights (`load_model`), `options` are the engine's own.
    """
    folder = Path(folder)
    model = load_model(folder, dtype)
    tokenizer = load_tokenizer(folder)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer in {folder} has {len(tokenizer)} ids and the model {model.config.vocab_size}: "
            "they are not a pair"
        )
    return Engine(model, tokenizer, slots=slots, context=context, **options)


def check_model_folder(folder: Path) -> None:
    """ValueError unless `folder` says that it holds a model that continues text, and a tokenizer; reads no weights."""
    _check_causal(folder)
    if _objective(folder) == "masked":
        raise ValueError(
            f"{folder} was trained on masked words alone, it can't continue a text: use `headwater fill`, or pretrain "
            "with pretrain.objective=mixed"
        )


def continues_text(folder: Path) -> bool:
    """Whether the model in `folder` continues text, or else fills in words; ValueError if it says neither."""
    if _is_encoder(folder):
        return False
    _check_causal(folder)
    return _objective(folder) != "masked"


def check_readable(folder: Path) -> None:
    """ValueError unless `folder` has the configuration of a model and a tokenizer; reads no weights."""
    _read_config(folder)


def _is_encoder(folder: Path) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

    return bool(set(_read_config(folder).get("architectures") or []) & {*MODEL_FOR_MASKED_LM_MAPPING_NAMES.values()})


def _check_causal(folder: Path) -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    architectures = _read_config(folder).get("architectures") or []
    if not set(architectures) & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()):
        raise ValueError(f"{folder} holds {architectures or 'no named architecture'}, not a causal language model")


def _read_config(folder: Path) -> dict[str, Any]:
    """What `config.json` says. ValueError if `folder` isn't a model's with its tokenizer."""
    if not folder.is_dir():
        raise ValueError(f"no model folder at {folder}")
    for name in ("config.json", "tokenizer.json"):
        if not (folder / name).is_file():
            raise ValueError(f"no {name} in {folder}: it isn't a model folder with its tokenizer")
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'} isn't a JSON object: {error}") from error


def _objective(folder: Path) -> str | None:
    """What a model was pretrained for beside or instead of predicting the next token: masked, mixed or nothing."""
    return _read_config(folder).get(OBJECTIVE)
