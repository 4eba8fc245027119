"""Stage 3: documents to token shards, a manifest and the packing index.

Ray Data runs one task a documents file: it tokenizes, writes whole shard files and hands back their lines of the
manifest. No text and no ids pass through the driver.
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from cluster import mirror
from cluster.errors import Problem, StageFailed
from cluster.progress import progress
from llm.files import hash_file, write_json
from llm.packing import pack, write_index
from llm.shardfile import Shards, write_shard
from llm.vocabulary import fingerprint, load_tokenizer
from pipelines import documents
from pipelines.recipe import Recipe
from pipelines.stage import Demand, Outcome, Stage, StageRun

SCHEMA_VERSION = 1
SETS = ("train", "held_out")


def run(stage: StageRun) -> Outcome:
    """Tokenize every document, then decide once which pieces make each row."""
    recipe = stage.recipe
    tokenizer = stage.input("tokenizer") / "tokenizer"
    with stage.folder.artefact("tokens") as target:
        files = _tokenize_all(stage, target)
        mirror.gather(target)
        manifest = _manifest(recipe, mirror.here(tokenizer), files)
        for name in SETS:
            manifest[name]["rows"] = _index(target / name, recipe.shards.sequence_length)
        _refuse_too_little(manifest)
        write_json(target / "manifest.json", manifest)
    return _outcome(manifest)


def _tokenize_all(stage: StageRun, target: Path) -> list[dict[str, Any]]:
    import ray.data

    parts = documents.parts(stage.input("ingest") / "documents")
    for name in SETS:
        (target / name).mkdir()
    work = ray.data.from_items(
        [{"number": n, "part": str(part)} for n, part in enumerate(parts)], override_num_blocks=len(parts)
    )
    settings = stage.recipe.shards
    task = partial(
        _tokenize,
        target=target,
        tokenizer=stage.input("tokenizer") / "tokenizer",
        held_out=stage.recipe.held_out,
        tokens_per_shard=settings.tokens_per_shard,
    )
    tokenized = work.map(task, num_cpus=settings.cpus_per_task)
    files: list[dict[str, Any]] = []
    with progress("shards", len(parts), "files") as report:
        for done, row in enumerate(tokenized.iter_rows(), start=1):
            files += json.loads(row["files"])
            report(done)
    return sorted(files, key=lambda file: file["name"])


def _tokenize(
    row: dict[str, Any], target: Path, tokenizer: Path, held_out: float, tokens_per_shard: int
) -> dict[str, Any]:
    """A task's work on one documents file; the manifest's lines of the shards that it wrote."""
    loaded = load_tokenizer(mirror.here(tokenizer))
    writers = {name: _ShardWriter(target, name, row["number"], tokens_per_shard) for name in SETS}
    for batch in documents.read(Path(row["part"]), ["id", "text", "source"]):
        for document, ids in _encoded(loaded, batch.to_pylist()):
            kept_out = documents.is_held_out(document["id"], held_out)
            writers["held_out" if kept_out else "train"].add(document, ids, len(loaded))
    return {"files": json.dumps([file for writer in writers.values() for file in writer.close(len(loaded))])}


def _encoded(tokenizer, rows: list[dict[str, Any]]):
    """Each document with its ids, the end-of-text id last. Special tokens spelt out in text are text."""
    backend = tokenizer.backend_tokenizer
    backend.encode_special_tokens = True
    for row, encoding in zip(
        rows, backend.encode_batch_fast([row["text"] for row in rows], add_special_tokens=False), strict=True
    ):
        yield row, np.array([*encoding.ids, tokenizer.eos_token_id], dtype=np.uint32)


@dataclass
class _ShardWriter:
    """Gathers documents until a shard is full, then writes it under its final name in one step."""

    target: Path
    set_name: str
    part: int
    tokens_per_shard: int
    ids: list[str] = field(default_factory=list)
    documents: list[np.ndarray] = field(default_factory=list)
    tokens: Counter = field(default_factory=Counter)
    text_bytes: int = 0
    files: list[dict[str, Any]] = field(default_factory=list)

    def add(self, document: dict[str, Any], ids: np.ndarray, vocab_size: int) -> None:
        self.ids.append(document["id"])
        self.documents.append(ids)
        self.tokens[document["source"]] += len(ids)
        self.text_bytes += len(document["text"].encode())
        if self.tokens.total() >= self.tokens_per_shard:
            self._flush(vocab_size)

    def close(self, vocab_size: int) -> list[dict[str, Any]]:
        """Write what is left; the manifest's line of every file of this writer."""
        if self.ids:
            self._flush(vocab_size)
        return self.files

    def _flush(self, vocab_size: int) -> None:
        name = f"{self.set_name}/shard-{self.part:05d}-{len(self.files):03d}.arrow"
        partial = (self.target / name).with_suffix(".partial")
        mirror.make(partial.parent)
        write_shard(partial, self.ids, self.documents, vocab_size)
        self.files.append(
            {
                "name": name,
                "sha256": hash_file(partial),
                "documents": len(self.ids),
                "tokens": dict(self.tokens),
                "text_bytes": self.text_bytes,
            }
        )
        partial.rename(self.target / name)  # a task that is tried again replaces the file by its equal
        mirror.send(self.target / name)
        self.ids, self.documents, self.tokens, self.text_bytes = [], [], Counter(), 0


def _manifest(recipe: Recipe, tokenizer: Path, files: list[dict[str, Any]]) -> dict[str, Any]:
    loaded = load_tokenizer(tokenizer)
    return {
        "schema_version": SCHEMA_VERSION,
        "tokenizer_fingerprint": fingerprint(loaded),
        "vocab_size": len(loaded),
        "pad_id": loaded.pad_token_id,
        "sequence_length": recipe.shards.sequence_length,
        **{name: _totals([file for file in files if file["name"].startswith(f"{name}/")]) for name in SETS},
    }


def _totals(files: list[dict[str, Any]]) -> dict[str, Any]:
    per_source: Counter = Counter()
    for file in files:
        per_source.update(file["tokens"])
    return {
        "documents": sum(file["documents"] for file in files),
        "tokens": per_source.total(),
        "tokens_per_source": dict(sorted(per_source.items())),
        "text_bytes": sum(file["text_bytes"] for file in files),
        "files": files,
    }


def _index(folder: Path, sequence_length: int) -> int:
    """Write the packing index beside the shards; how many rows it has."""
    index = pack(Shards(folder).lengths(), sequence_length)
    write_index(index, folder / "packing.arrow")
    return index.num_rows


def _refuse_too_little(manifest: dict[str, Any]) -> None:
    for name in SETS:
        if not manifest[name]["rows"]:
            found = {part: manifest[part]["documents"] for part in SETS}
            raise StageFailed(
                Problem(
                    f"no document fell into the {name} set (documents: {found})",
                    "add text, cut it finer with ingest.max_characters, or raise held_out",
                )
            )


def _outcome(manifest: dict[str, Any]) -> Outcome:
    train, held_out = manifest["train"], manifest["held_out"]
    return Outcome(
        read=f"{train['documents'] + held_out['documents']:,} documents",
        wrote=f"{train['rows']:,} rows of {manifest['sequence_length']} tokens, {held_out['rows']:,} held out",
        figure=f"{(train['tokens'] + held_out['tokens']) / 1e6:.2f} M tokens",
        metrics={key: value for key, value in manifest.items() if key not in SETS}
        | {name: {key: value for key, value in manifest[name].items() if key != "files"} for name in SETS},
    )


STAGE = Stage(
    name="shards",
    version=1,
    needs=("ingest", "tokenizer"),
    artefacts=("tokens",),
    identity=lambda recipe: {**recipe.shards.identity(), "held_out": recipe.held_out},
    demand=lambda recipe: Demand(cpus=recipe.shards.cpus_per_task),
    run=run,
)
