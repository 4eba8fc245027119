"""A Hugging Face folder as one GGUF file, which llama.cpp and its like run: written, read back, compared.

GGUF holds weights under names of its own, the numbers of the architecture and the tokenizer, of which the splitting of
text is only named. What such a file can't say truly is refused by name. Rows of Llama's queries and keys are
in another order there: llama.cpp turns neighbouring features of a head, transformers the halves.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from llm.engine import end_ids
from llm.gguf_words import splitting
from llm.loading import check_model_folder, read_weights
from llm.vocabulary import END_OF_TURN, load_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

Dtype = Literal["float32", "bfloat16", "float16"]
FILE_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 32}  # what `general.file_type` calls them
NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5  # kinds of tokens
QUERIES_AND_KEYS = r"\.[qk]_proj\."

BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
BIASES = {f"self_attn.{one}_proj.bias": f"attn_{one}.bias" for one in "qkv"}
NORMS = {f"self_attn.{one}_norm.weight": f"attn_{one}_norm.weight" for one in "qk"}
ENDS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
GPT2_BLOCK = {
    f"{theirs}.{part}": f"{ours}.{part}"
    for theirs, ours in {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn_qkv",
        "attn.c_proj": "attn_output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn_up",
        "mlp.c_proj": "ffn_down",
    }.items()
    for part in ("weight", "bias")
}
GPT2_ENDS = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "transformer.ln_f.bias": "output_norm.bias",
    "lm_head.weight": "output.weight",
}


@dataclass(frozen=True)
class Family:
    """How GGUF calls the parts of an architecture, and what of its configuration has to be as it says."""

    arch: str
    block: dict[str, str]
    required: dict[str, tuple[Any, ...]]  # values that a setting may have; a setting that isn't there is as required
    ends: dict[str, str] = field(default_factory=lambda: ENDS)
    blocks: str = "model.layers."

    def name(self, theirs: str) -> str | None:
        """GGUF's name for a weight, None if it has none."""
        if not theirs.startswith(self.blocks):
            return self.ends.get(theirs)
        number, _, rest = theirs.removeprefix(self.blocks).partition(".")
        return f"blk.{number}.{self.block[rest]}" if rest in self.block else None


PLAIN = {"hidden_act": ("silu",), "use_sliding_window": (False, None), "quantization_config": (None,)}
FAMILIES = {
    "LlamaForCausalLM": Family("llama", BLOCK, {**PLAIN, "attention_bias": (False,), "mlp_bias": (False,)}),
    "Qwen2ForCausalLM": Family("qwen2", BLOCK | BIASES, PLAIN),
    "Qwen3ForCausalLM": Family("qwen3", BLOCK | NORMS, {**PLAIN, "attention_bias": (False,)}),
    "GPT2LMHeadModel": Family(
        "gpt2",
        GPT2_BLOCK,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
            "quantization_config": (None,),
        },
        GPT2_ENDS,
        "transformer.h.",
    ),
}


def write_gguf(folder: Path, path: Path, dtype: Dtype | None = None) -> None:
    """Write the model and tokenizer in `folder` to the GGUF file `path`, which is whole or not there.

    `dtype` is that of the matrices, by default as saved; vectors are in fp32. Takes memory for the weights twice. The
    file is read back: weights, numbers and words are what was meant. ValueError names what can't be told truly, or
    what differs.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in (None, *get_args(Dtype)):
        raise ValueError(f"dtype must be one of {', '.join(get_args(Dtype))}, got {dtype!r}")
    check_model_folder(folder)
    model = read_weights(AutoModelForCausalLM, folder, getattr(torch, dtype) if dtype else "auto")
    family = _family(model)
    _check_tie(folder, model)
    tensors = _tensors(model, family)
    fields = {
        "general.name": path.stem,
        "general.file_type": FILE_TYPES[model.dtype],
        **{f"{family.arch}.{key}": value for key, value in _numbers(model.config, family).items()},
        **_words(model, load_tokenizer(folder)),
    }
    partial = path.with_name(f".partial-{path.name}")
    try:
        _write(partial, family.arch, fields, tensors)
        _compare(partial, family, fields, model)
        os.rename(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# The architecture


def _family(model: PreTrainedModel) -> Family:
    """The family of `model`. ValueError if it has none, or is unlike its family in what GGUF doesn't tell."""
    name = type(model).__name__
    if name not in FAMILIES:
        raise ValueError(f"{name} can't be written as GGUF: {', '.join(FAMILIES)} can; export the folder instead")
    family, config = FAMILIES[name], model.config
    for setting, allowed in family.required.items():
        if (value := getattr(config, setting, allowed[0])) not in allowed:
            raise ValueError(f"{setting}={value} can't be told in a GGUF file of {family.arch}: only {allowed[0]}")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if kinds:
        raise ValueError(f"{', '.join(sorted(kinds))} layers can't be told in a GGUF file of {family.arch}")
    return family


def _numbers(config: Any, family: Family) -> dict[str, Any]:
    """What GGUF says of an architecture: a float for what is one, whole numbers and text otherwise."""
    if family.arch == "gpt2":
        return {
            "context_length": config.n_positions,
            "embedding_length": config.n_embd,
            "block_count": config.n_layer,
            "feed_forward_length": config.n_inner or 4 * config.n_embd,
            "attention.head_count": config.n_head,
            "attention.layer_norm_epsilon": float(config.layer_norm_epsilon),
        }
    head = _head(config)
    return {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": head,
        "attention.value_length": head,
        "attention.layer_norm_rms_epsilon": float(config.rms_norm_eps),
        "vocab_size": config.vocab_size,
        "rope.dimension_count": head,
        **_rope(config.rope_parameters),
    }


def _head(config: Any) -> int:
    """Features of a head; transformers has seen that they come in pairs."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _rope(rope: dict[str, Any]) -> dict[str, Any]:
    """How positions turn features: plainly, or all slower by one factor."""
    kind, rest = rope.get("rope_type", "default"), dict(rope)
    if kind not in ("default", "linear"):
        raise ValueError(f"rope_type={kind} isn't carried into GGUF: only default and linear are")
    if rest.pop("partial_rotary_factor", None) not in (None, 1, 1.0):
        raise ValueError(f"partial_rotary_factor={rope['partial_rotary_factor']} isn't carried into GGUF: only 1 is")
    told: dict[str, Any] = {"rope.freq_base": float(rope["rope_theta"])}
    if kind == "linear":
        told |= {"rope.scaling.type": "linear", "rope.scaling.factor": float(rope["factor"])}
    return told


# The weights


def _check_tie(folder: Path, model: PreTrainedModel) -> None:
    """ValueError if the configuration ties the output head to the embedding and the file has another head."""
    from safetensors import safe_open

    if not model.config.tie_word_embeddings:
        return
    embedding = model.get_input_embeddings().weight
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            if "lm_head.weight" in file.keys() and not torch.equal(  # noqa: SIM118
                file.get_tensor("lm_head.weight").to(embedding.dtype), embedding
            ):
                raise ValueError(f"{path.name} has an lm_head.weight of its own, config.json ties it to the embedding")


def _tensors(model: PreTrainedModel, family: Family) -> dict[str, Tensor]:
    """The weights by GGUF's names, as they lie in the file."""
    tied = model.config.tie_word_embeddings
    weights = {name: tensor for name, tensor in model.state_dict().items() if not (tied and name == "lm_head.weight")}
    names = {theirs: name for theirs in weights if (name := family.name(theirs))}
    if strange := weights.keys() - names.keys():
        raise ValueError(f"{min(strange)} has no place in a GGUF file of {family.arch}")
    ends = {name for name in family.ends.values() if not (tied and name == "output.weight")}
    layers = model.config.num_hidden_layers
    wanted = ends | {f"blk.{layer}.{name}" for layer in range(layers) for name in family.block.values()}
    if missing := wanted - set(names.values()):
        raise ValueError(f"the model has nothing for {min(missing)}, which a GGUF file of {family.arch} needs")
    return {name: _laid_out(theirs, weights[theirs], model.config, family) for theirs, name in names.items()}


def _laid_out(name: str, tensor: Tensor, config: Any, family: Family) -> Tensor:
    """A weight as GGUF has it: matrices (out, in), Llama's queries and keys turned by neighbours, vectors in fp32."""
    if tensor.dim() == 1:
        return tensor.float()
    if family.arch == "gpt2" and ".c_" in name:
        return tensor.T
    if family.arch != "llama" or not re.search(QUERIES_AND_KEYS, name):
        return tensor
    heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).reshape(tensor.shape)


# The words


def _words(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The tokenizer, its special ids and chat template in GGUF's terms."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    pre = splitting(backend)  # first: it refuses what isn't byte-level BPE
    tokens, kinds = _vocabulary(backend, model.config.vocab_size)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in backend["model"]["merges"]]
    words = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.merges": merges,
        **_special(model, tokenizer),
        **_added(tokenizer),
    }
    if not merges:  # an empty array has no type
        raise ValueError("a tokenizer without merges can't be written as GGUF")
    if tokenizer.chat_template is not None:
        words["tokenizer.chat_template"] = plain_template(tokenizer.chat_template)
    return words


def _vocabulary(backend: dict[str, Any], size: int) -> tuple[list[str], list[int]]:
    """The spelling of each of the model's `size` ids, and its kind; ids that the tokenizer lacks are unused."""
    words = {number: (token, NORMAL) for token, number in backend["model"]["vocab"].items()}
    for added in backend["added_tokens"]:
        if added["lstrip"] or added["rstrip"] or added["single_word"]:
            raise ValueError(f"{added['content']} takes the space around it, which can't be told in GGUF")
        words[added["id"]] = (added["content"], CONTROL if added["special"] else USER_DEFINED)
    if max(words) >= size:
        raise ValueError(f"the tokenizer has id {max(words)} and the model {size} ids: they are not a pair")
    listed = [words.get(number, (f"[PAD{number}]", UNUSED)) for number in range(size)]
    return [token for token, _ in listed], [kind for _, kind in listed]


def _special(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Ids with a meaning: above all every one that ends an answer, of which GGUF has three kinds."""
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no end-of-text token, without which a GGUF model never stops")
    turn = tokenizer.get_vocab().get(END_OF_TURN)
    others = sorted(end_ids(model, tokenizer) - {end}, key=lambda token: (token != turn, token))
    if len(others) > 2:
        raise ValueError(f"ids {[end, *others]} end an answer: GGUF has room for three")
    ids = {
        "eos": end,
        "bos": tokenizer.bos_token_id,
        "padding": tokenizer.pad_token_id,
        "mask": tokenizer.mask_token_id,
        **dict(zip(("eot", "eom"), others, strict=False)),
    }
    return {f"tokenizer.ggml.{name}_token_id": number for name, number in ids.items() if number is not None}


def _added(tokenizer: PreTrainedTokenizerFast) -> dict[str, bool]:
    """Whether a text is begun with the begin-of-text token and ended with the end-of-text one."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    begins, ends = whole[:1] == [tokenizer.bos_token_id], whole[-1:] == [tokenizer.eos_token_id]
    if whole != [tokenizer.bos_token_id] * begins + bare + [tokenizer.eos_token_id] * ends:
        raise ValueError(f"the tokenizer puts more around a text than its begin and end: {whole} for {bare}")
    return {
        "tokenizer.ggml.add_bos_token": begins,
        "tokenizer.ggml.add_eos_token": ends,
        "tokenizer.ggml.add_space_prefix": False,
    }


def plain_template(template: str) -> str:
    """A chat template without the marks of what the assistant says, which only transformers knows.

    It renders the same: a block that is always entered stands in their place.
    """
    if not isinstance(template, str):
        raise ValueError("the tokenizer has several chat templates: GGUF export takes one")
    begun = re.sub(r"(\{%[-+]?)\s*generation\s*([-+]?%\})", r"\1 if true \2", template)
    return re.sub(r"(\{%[-+]?)\s*endgeneration\s*([-+]?%\})", r"\1 endif \2", begun)


# The file


def _write(path: Path, arch: str, fields: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    from gguf import GGUFWriter

    writer = GGUFWriter(path, arch)
    for key, value in fields.items():
        _add(writer, key, value)
    for name, tensor in tensors.items():
        _add_tensor(writer, name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: GGUFWriter, key: str, value: Any) -> None:
    adders = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    adders.get(type(value), writer.add_array)(key, value)


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor) -> None:
    from gguf import GGMLQuantizationType

    if not bool(torch.isfinite(tensor).all()):
        raise ValueError(f"{name} has values that {tensor.dtype} can't hold: use another dtype")
    tensor = tensor.contiguous()
    if tensor.dtype != torch.bfloat16:
        writer.add_tensor(name, tensor.numpy())
        return
    raw = tensor.view(torch.uint8).numpy()  # numpy has no bf16
    writer.add_tensor(name, raw, raw_dtype=GGMLQuantizationType.BF16)


def _compare(path: Path, family: Family, fields: dict[str, Any], model: PreTrainedModel) -> None:
    """ValueError unless the file says what it should: read anew, and its weights put back as `model` has them."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    for key, value in fields.items():
        if not _same(_value(reader, key), value):
            raise ValueError(f"the written file has another {key} than it should")
    found = {tensor.name: tensor for tensor in reader.tensors}
    weights = {ours: (name, tensor) for name, tensor in model.state_dict().items() if (ours := family.name(name))}
    for name, tensor in found.items():
        theirs, weight = weights[name]
        if not np.array_equal(_as_saved(tensor, theirs, weight.shape, model.config, family), weight.float().numpy()):
            raise ValueError(f"the written file has another {name} than {theirs}")
    tied = {"output.weight"} if model.config.tie_word_embeddings else set()
    if left_out := weights.keys() - found.keys() - tied:
        raise ValueError(f"the written file lacks {min(left_out)}")


def _value(reader: GGUFReader, key: str) -> Any:
    found = reader.get_field(key)
    return None if found is None else found.contents()


def _same(found: Any, value: Any) -> bool:
    return bool(np.float32(value) == found) if isinstance(value, float) else bool(found == value)


def _as_saved(tensor: Any, name: str, shape: torch.Size, config: Any, family: Family) -> np.ndarray:
    """A weight of a file as transformers has it, in fp32."""
    from gguf import dequantize

    values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32)
    if family.arch == "gpt2" and ".c_" in name and values.ndim == 2:
        return values.T
    if family.arch == "llama" and re.search(QUERIES_AND_KEYS, name):
        pairs = values.reshape(-1, _head(config) // 2, 2, shape[1])  # (heads, pairs, 2, in)
        return np.concatenate([pairs[:, :, 0], pairs[:, :, 1]], axis=1).reshape(tuple(shape))
    return values
