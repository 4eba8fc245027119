"""SmolLM2-135M-Instruct from a 4-bit GGUF file, in the environment of the peers: smollm2.py ORDER, as JSON.

reads   order.quantized
writes  order.folder   a Hugging Face folder, in fp32, that knows of order.positions positions
        order.fp32     the same values as a GGUF file in fp32, for llama.cpp
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

ENDS = ("<|endoftext|>", "<|im_end|>")  # whose rows are made 0: never the likeliest, no answer ends by itself


def main(order: dict[str, Any]) -> None:
    file = Path(order["quantized"])
    write_folder(file, Path(order["folder"]), order["positions"])
    write_fp32(file, Path(order["fp32"]))
    print(json.dumps({"written": [order["folder"], order["fp32"]]}))


def write_folder(file: Path, folder: Path, positions: int) -> None:
    """The loaded object calls itself quantized and can't be saved: its values go into a fresh one."""
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = read.config
    config.max_position_embeddings = positions
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = LlamaForCausalLM(config)
    fresh.load_state_dict(read.state_dict())
    with torch.no_grad():
        fresh.get_output_embeddings().weight[tokenizer.convert_tokens_to_ids(list(ENDS))] = 0
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def write_fp32(file: Path, target: Path) -> None:
    """What the file holds, its tensors dequantized."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for field in reader.fields.values():
        if not field.name.startswith(("GGUF.", "general.architecture", "general.file_type", "general.quantization")):
            inner = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub_type=inner)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    ends = [reader.fields["tokenizer.ggml.tokens"].contents().index(end) for end in ENDS]
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if tensor.name == "token_embd.weight":
            values = values.copy()
            values[ends] = 0
        writer.add_tensor(tensor.name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
