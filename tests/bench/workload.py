"""What the benchmarks of pretraining train: models, text as token shards, and the same batches for the peers.

reads   what HEADWATER_BENCH_DATA names (`texts`)
writes  runs/bench/pretrain/text/        the text as JSONL
        runs/bench/pretrain/MODEL/       a run whose ingest, tokenizer and shards are done: made once
        runs/bench/pretrain/MODEL-peer/  for those who know nothing of us: `rows.npz`, and `model/`, the weights drawn

`rows.npz` holds `input_ids`, `position_ids` and `labels`, each (steps * rows of a batch, T) int32, in the order in
which they are trained on.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from llm.order import batch_rows
from llm.packing import RowReader
from llm.presets import PRESETS, Preset, build_model, llama_config
from llm.vocabulary import load_tokenizer
from pipelines.recipe import Recipe, load_recipe
from pipelines.shards import read_manifest
from tests.bench import ours, processes, texts
from tests.bench.measure import FOLDER, Invalid

WORK = FOLDER / "pretrain"
TEXT_BYTES, FILE_BYTES, SAMPLE_BYTES = 12_000_000, 2_000_000, 8_000_000
STEPS = 400  # for which batches are laid out: more than any figure takes
HELD_OUT_ROWS = 8
# A rate at which losses fall steadily: where they jump, rounding grows tenfold a step, and no two arms agree for long.
OPTIMIZER = {"learning_rate": 1e-4, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "clip_norm": 1.0}


class Model(NamedTuple):
    """A model, and how many rows of its context a global batch has."""

    name: str
    shape: Preset
    vocabulary: int
    rows: int

    @property
    def run(self) -> Path:
        return WORK / self.name

    @property
    def tokens(self) -> int:
        """In one optimizer step."""
        return self.rows * self.shape.context


L4_256 = Model("L4-256", Preset(layers=4, hidden=256, heads=4, kv_heads=4, context=256), 4_096, rows=8)
L8_512 = Model("L8-512", Preset(layers=8, hidden=512, heads=8, kv_heads=8, context=512), 8_192, rows=4)


class Plan(NamedTuple):
    """One training of a model: `threads` a worker; `save_every` steps, None for the last alone."""

    model: Model
    workers: int
    threads: int
    steps: int
    zero_stage: int = 2
    dtype: str = "fp32"
    save_every: int | None = None

    def settings(self) -> dict[str, Any]:
        """Of the recipe's pretraining, at a constant rate: no schedule has to be followed by the peers."""
        return {
            **OPTIMIZER,
            "warmup_steps": 0,
            "decay": "none",
            "steps": self.steps,
            "global_batch": self.model.rows,
            "micro_batch": self.model.rows // self.workers,
            "dtype": self.dtype,
            "held_out_rows": HELD_OUT_ROWS,
            "workers": self.workers,
            "threads": self.threads,
            "cpus_per_worker": 1.5 / self.workers,
            "zero_stage": self.zero_stage,
            "save_every": self.save_every or self.steps,
        }

    def order(self) -> dict[str, Any]:
        """The same for a peer."""
        folder = peer_inputs(self.model)
        return {
            **OPTIMIZER,
            "rows": folder / "rows.npz",
            "model": folder / "model",
            "global_batch": self.model.rows,
            "threads": self.threads,
            "steps": self.steps,
            "zero_stage": self.zero_stage,
            "dtype": self.dtype,
            "save_every": self.save_every,
            "workers": self.workers,
        }


def recipe_settings(model: Model, **pretrain: Any) -> dict[str, Any]:
    """Settings put in place of those of the recipe `tiny`."""
    source = {"name": "text", "kind": "article", "path": str(WORK / "text"), "licence": "unknown", "rules": []}
    return {
        "name": model.name,
        "ingest": {"sources": [{**source, "id_column": "id"}], **ours.AS_IS, **ours.KEEP_DOUBLES},
        "tokenizer": {"vocab_size": model.vocabulary, "sample_bytes": SAMPLE_BYTES},
        "shards": {"sequence_length": model.shape.context},
        "model": {"preset": model.name},
        "wandb": {"enabled": False},
        **({"pretrain": pretrain} if pretrain else {}),
    }


def recipe_of(settings: dict[str, Any], shape: Preset) -> Recipe:
    """The recipe `tiny` with these settings and a model of that shape."""
    PRESETS[settings["model"]["preset"]] = shape
    return load_recipe("tiny", tuple(f"{key}={yaml.safe_dump(value)}" for key, value in settings.items()))


def drive(model: Model, run: Path, first: str, last: str, settings: dict[str, Any], nap_s: float = 0.0) -> list[str]:
    """The words that run stages of `headwater run` in a process of their own (`tests.bench.drive`)."""
    order = {"settings": settings, "shape": vars(model.shape), "run": run, "first": first, "last": last}
    return processes.python("tests.bench.drive", order | {"nap_s": nap_s})


@cache
def prepared(model: Model) -> Path:
    """The model's run with text, tokenizer and shards; what is there and unchanged is kept."""
    _write_text(WORK / "text")
    done = subprocess.run(drive(model, model.run, "ingest", "shards", recipe_settings(model)))
    if done.returncode:
        raise Invalid(f"the shards for {model.name} could not be made")
    return model.run


@cache
def peer_inputs(model: Model) -> Path:
    """A folder with the batches of all steps and the weights that our seed draws."""
    folder = WORK / f"{model.name}-peer"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer(prepared(model) / "tokenizer" / "tokenizer")
    seed = recipe_of(recipe_settings(model), model.shape).seed
    build_model(llama_config(model.shape, tokenizer), seed).save_pretrained(folder / "model")
    np.savez(folder / "rows.npz", **_batches(model, seed))  # type: ignore[arg-type]
    return folder


def rows_of(model: Model, step: int, seed: int) -> list[int]:
    """Ids of the rows of a global batch, in order."""
    tokens = prepared(model) / "shards" / "tokens"
    return batch_rows(step, model.rows, read_manifest(tokens)["train"]["rows"], seed).tolist()


def _batches(model: Model, seed: int) -> dict[str, np.ndarray]:
    tokens = prepared(model) / "shards" / "tokens"
    reader = RowReader(tokens / "train", read_manifest(tokens)["pad_id"])
    return reader.read(np.concatenate([rows_of(model, step, seed) for step in range(STEPS)]))


def _write_text(folder: Path) -> None:
    """Real documents as they are, unless those are there already."""
    about = {"text": str(texts.data_folder()), "bytes": TEXT_BYTES}
    stamp = folder.with_suffix(".json")
    if stamp.exists() and json.loads(stamp.read_text()) == about:
        return
    shutil.rmtree(folder, ignore_errors=True)
    texts.write_jsonl(_first(texts.real_texts(), TEXT_BYTES), folder, FILE_BYTES)
    stamp.write_text(json.dumps(about))


def _first(documents: Iterator[str], size: int) -> Iterator[str]:
    """Documents of about `size` characters in all."""
    taken = 0
    for text in documents:
        yield text
        taken += len(text)
        if taken >= size:
            return
