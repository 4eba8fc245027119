"""What training a model costs in arithmetic, and how much of a device's best that is. Pure functions.

A FLOP is one multiplication or one addition. Counted is what the model needs, not what is run: no recomputation for
activation checkpointing, no padding (PaLM, arXiv 2204.02311, appendix B).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

Precision = Literal["bf16", "fp16", "tf32", "fp32"]


def model_flops_per_token(config: PreTrainedConfig, sequence_length: int) -> float:
    """FLOPs of training the language model of `config` on one token of rows of `sequence_length` tokens.

    6N for the weights, 2N forward and 4N backward, and 12LHQT for attention (PaLM, appendix B, where the throughput
    of a device of peak P is at most P / (6N + 12LHQT)). N is `multiplied_weights`. The model is built without memory
    for its weights. ValueError for an encoder with a decoder, whose two sequences the formula doesn't know.
    """
    return 6.0 * multiplied_weights(_without_memory(config)) + attention_flops_per_token(config, sequence_length)


def multiplied_weights(model: torch.nn.Module) -> int:
    """How many weights a token is multiplied with, N.

    All of the model's but tables that are only looked up: learned positions, and the token embedding unless the
    output projection is the same table. Of routed experts those that a token is sent to.
    """
    from torch import nn

    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    matrices = {id(module.weight) for module in model.modules() if isinstance(module, nn.Linear)}
    routed = _routed_share(getattr(model, "config", None))
    weights = [(name, weight) for name, weight in model.named_parameters() if id(weight) not in tables - matrices]
    return round(sum(weight.numel() * (routed if ".experts." in name else 1.0) for name, weight in weights))


def attention_flops_per_token(config: PreTrainedConfig, sequence_length: int) -> float:
    """FLOPs of a token's queries with keys, and weights with values, forward and backward: 12LHQT.

    L layers, H heads, Q features of a head, T tokens attended to: the whole row, without the causal half that is
    masked, as PaLM counts it, or a layer's window. Layers without softmax attention add nothing here.
    """
    text = config.get_text_config()
    heads = getattr(text, "num_attention_heads", None) or 0
    head = getattr(text, "head_dim", None) or (text.hidden_size // heads if heads else 0)
    keys, values = (getattr(text, name, None) or head for name in ("qk_head_dim", "v_head_dim"))  # they may differ
    return 6.0 * heads * (keys + values) * sum(_attended(text, sequence_length))


def mfu(tokens_per_s: float, flops_per_token: float, peak: float) -> float:
    """Model FLOPs utilisation, a share of 1 (PaLM, appendix B). `peak`: FLOPs a second of all devices together."""
    return tokens_per_s * flops_per_token / peak


def peak_flops(device_name: str, precision: Precision) -> float | None:
    """Dense FLOPs a second of the device that torch calls `device_name`; None for one that isn't known.

    Of a CPU, of a part of a GPU (MIG) and of an unknown GPU nothing is guessed: whoever knows it has to say it.
    """
    words = set(re.split(r"[\s-]+", device_name.casefold()))
    if "mig" in words:
        return None
    found = [device for device in DEVICES if set(device.name.casefold().split()) <= words]
    teraflops = getattr(found[0], precision) if found else None
    return teraflops * 1e12 if teraflops else None


# Devices


class Device(NamedTuple):
    """Dense TFLOP/s by the maker's data sheet, None for what it hasn't. `name`: words in torch's name of it."""

    name: str
    bf16: float | None
    fp16: float
    tf32: float | None
    fp32: float  # without TF32


# The first whose words are all in the name counts. Newer sheets give tensor rates with 2:4 sparsity: half is dense.
DEVICES = (
    Device("GB200", 2500.0, 2500.0, 1250.0, 80.0),  # NVIDIA GB200 NVL72 data sheet, half of a superchip
    Device("B200", 2250.0, 2250.0, 1125.0, 75.0),  # NVIDIA HGX B200 data sheet, an eighth
    Device("GH200", 989.5, 989.5, 494.5, 67.0),  # NVIDIA GH200 Grace Hopper superchip data sheet
    Device("H200 NVL", 835.5, 835.5, 417.5, 60.0),  # NVIDIA H200 data sheet
    Device("H200", 989.5, 989.5, 494.5, 67.0),  # the same, SXM
    Device("H100 NVL", 835.5, 835.5, 417.5, 60.0),  # NVIDIA H100 data sheet
    Device("H100 PCIe", 756.5, 756.5, 378.0, 51.0),  # NVIDIA H100 data sheet of 2022
    Device("H100 HBM3", 989.5, 989.5, 494.5, 67.0),  # NVIDIA H100 data sheet, SXM
    Device("A100", 312.0, 312.0, 156.0, 19.5),  # NVIDIA A100 data sheet, SXM and PCIe
    Device("A10", 125.0, 125.0, 62.5, 31.2),  # NVIDIA A10 data sheet
    Device("L40S", 362.05, 362.05, 183.0, 91.6),  # NVIDIA L40S data sheet
    Device("L40", 181.05, 181.05, 90.5, 90.5),  # NVIDIA L40 data sheet
    Device("L4", 121.0, 121.0, 60.0, 30.3),  # NVIDIA L4 data sheet
    Device("V100S", None, 130.0, None, 16.4),  # NVIDIA V100 data sheet
    Device("V100 SXM2", None, 125.0, None, 15.7),
    Device("V100 PCIe", None, 112.0, None, 14.0),
    Device("T4", None, 65.0, None, 8.1),  # NVIDIA T4 data sheet
)


# The model of a configuration


def _without_memory(config: PreTrainedConfig) -> torch.nn.Module:
    import torch
    from transformers import MODEL_FOR_MASKED_LM_MAPPING, AutoModelForCausalLM, AutoModelForMaskedLM

    if config.is_encoder_decoder:
        raise ValueError(f"{type(config).__name__} is of an encoder with a decoder: its FLOPs are not 6N + 12LHQT")
    kind = AutoModelForMaskedLM if type(config) in MODEL_FOR_MASKED_LM_MAPPING else AutoModelForCausalLM
    with torch.device("meta"):
        return kind.from_config(config)


def _routed_share(config: PreTrainedConfig | None) -> float:
    """Share of the routed experts that a token is sent to; 1 where there are none."""
    if config is None:
        return 1.0
    text = config.get_text_config()
    counts = (getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next((count for count in counts if count), None)
    return text.num_experts_per_tok / experts if experts else 1.0


def _attended(text: PreTrainedConfig, sequence_length: int) -> list[int]:
    """Tokens attended to from each layer."""
    window = getattr(text, "sliding_window", None) or sequence_length
    chunk = getattr(text, "attention_chunk_size", None) or sequence_length
    spans = {"full_attention": sequence_length, "sliding_attention": window, "chunked_attention": chunk}
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [min(sequence_length, spans.get(kind, 0)) for kind in kinds]
