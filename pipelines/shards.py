"""Stage 3: documents to token shards, a manifest and the packing index.

reads   documents, tokenizer
writes  tokens/SET/shard-SSS-NNNNN.arrow   ids of documents of source SSS, in an order drawn by their names
        tokens/SET/packing.arrow           which pieces of which documents make each row, source after source
        tokens/manifest.json               what is in them, where documents begin and end, the SHA-256 of each file

SET is train or held_out. No text and no ids pass through the driver or the object store. The steps:

    tokens    a task a documents file: its ids, sorted by a key drawn from each document's name
    shuffle   a task a shard: a range of keys from all files of a source, so shards have one size but for chance. The
              files of a repository share a key: they stay together, in their order
    pack      a task a set: the packing index
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from cluster import mirror
from cluster.errors import BadInput, Problem, StageFailed
from cluster.preflight import Piece
from llm.encoding import load_encoder
from llm.files import write_json
from llm.packing import PACKINGS, joined, write_index
from llm.shardfile import check_boundaries, id_type, read_arrow, token_lists, write_arrow
from llm.vocabulary import END_OF_TEXT, fingerprint, load_tokenizer, special_ids
from pipelines import documents
from pipelines.partitions import Step, Summary, Work, facts, ranges, read_columns, write_table, writing
from pipelines.recipe import Recipe
from pipelines.stage import Demand, Outcome, Stage, StageRun

SCHEMA_VERSION = 2
SETS = ("train", "held_out")
SET_KEYS = ("documents", "tokens", "text_bytes")


def run(stage: StageRun) -> Outcome:
    """Tokenize every document, shuffle, and decide once which pieces make each row."""
    work = Work(stage.folder, stage.recipe.shards.cpus_per_task)
    target = stage.folder.kept_folder("tokens")
    tokenized = _tokenize_all(work, stage)
    shards = _shuffle_all(work, stage, tokenized, target)
    packed = _pack_all(work, stage.recipe, tokenized, shards, target)
    manifest = _manifest(stage, shards, packed)
    _refuse_too_little(manifest)
    write_json(target / "manifest.json", manifest)
    stage.folder.publish("tokens", {part["name"]: part["facts"] for part in [*shards, *packed]})
    return _outcome(manifest)


# Tokenizing


def _tokenize_all(work: Work, stage: StageRun) -> list[Summary]:
    parts = documents.parts(stage.input("ingest") / "documents")
    task = partial(_tokenize, tokenizer=stage.input("tokenizer") / "tokenizer", held_out=stage.recipe.held_out)
    return work.each("tokens", [{"part": str(part)} for part in parts], task, "files")


def _tokenize(number: int, item: dict[str, Any], step: Step, tokenizer: Path, held_out: float) -> Summary:
    """Leave a documents file's ids, a file for each set and source, sorted by key."""
    encoder = load_encoder(mirror.here(tokenizer) / "tokenizer.json")
    end, size = encoder.tokenizer.token_to_id(END_OF_TEXT), encoder.tokenizer.get_vocab_size()
    narrow = id_type(size).to_pandas_dtype()
    heaps: dict[tuple[str, str], _Heap] = {}
    for batch in documents.read(Path(item["part"]), ["id", "text", "source", "kind", "meta"]):
        for row in batch.to_pylist():
            ids = encoder.encode(row["text"])
            ids.append(end)
            name = "held_out" if documents.is_held_out(row["id"], held_out) else "train"
            # Of the size that is written, and a copy: an array grows by more than it needs.
            heaps.setdefault((name, row["source"]), _Heap()).add(row, np.frombuffer(ids, np.uint32).astype(narrow))
    return {"files": [heap.write(step, number, *which, size) for which, heap in heaps.items()]}


@dataclass
class _Heap:
    """Documents of one set and source, as they come."""

    ids: list[str] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)
    text_bytes: list[int] = field(default_factory=list)
    tokens: list[np.ndarray] = field(default_factory=list)
    code_tokens: int = 0

    def add(self, row: dict[str, Any], tokens: np.ndarray) -> None:
        self.code_tokens += len(tokens) if row["kind"] == "code" else 0
        self.ids.append(row["id"])
        self.keys.append(shuffle_key(row))
        self.text_bytes.append(len(row["text"].encode()))
        self.tokens.append(tokens)

    def write(self, step: Step, number: int, set_name: str, source: str, vocab_size: int) -> dict[str, Any]:
        """Leave the documents, sorted by key."""
        keys = np.array(self.keys, dtype=np.uint64)
        order = np.argsort(keys, kind="stable")
        columns = {
            "key": keys[order],
            "id": [self.ids[place] for place in order],
            "text_bytes": np.array(self.text_bytes, dtype=np.int64)[order],
            "tokens": token_lists([self.tokens[place] for place in order], vocab_size),
        }
        with writing(step.file(number, _heap_name(set_name, source))) as path:
            write_arrow(path, pa.table(columns))
        sizes = {"tokens": sum(map(len, self.tokens)), "code_tokens": self.code_tokens}
        return {"set": set_name, "source": source, **sizes}


def _heap_name(set_name: str, source: str) -> str:
    return f"{set_name}.{source}.arrow"


def shuffle_key(row: dict[str, Any]) -> int:
    """Where a document comes in the order of its source: drawn from its id, or from what it stays together with."""
    together = _repository(json.loads(row["meta"])) if row["kind"] == "code" else None
    return int.from_bytes(hashlib.sha256(f"shuffle/{together or row['id']}".encode()).digest()[:8], "big")


def _repository(meta: dict[str, Any]) -> str | None:
    """The repository of a file of code; of one that lies in none (its root is the source's), the folder."""
    name = meta.get("repository")
    return name + os.path.dirname(meta["path"]) if name and name.endswith(":") else name


# Shuffling


def _shuffle_all(work: Work, stage: StageRun, tokenized: list[Summary], target: Path) -> list[Summary]:
    """A shard for each range of keys of each source and set; those in which nothing fell are left out."""
    for name in SETS:
        (target / name).mkdir(exist_ok=True)
    items = [
        {"set": name, "source": source, "place": place, "number": number, "files": files, **bounds}
        for name in SETS
        for place, source in enumerate(_sources(stage.recipe))
        for files, tokens in [_files_of(tokenized, name, source)]
        for number, bounds in enumerate(_ranges(tokens, stage.recipe.shards.tokens_per_shard))
    ]
    tokenizer = stage.input("tokenizer") / "tokenizer"
    task = partial(_shuffle, tokens=work.step("tokens"), target=target, tokenizer=tokenizer)
    return [shard for shard in work.each("shuffle", items, task, "shards") if shard["documents"]]


def _sources(recipe: Recipe) -> list[str]:
    return [source.name for source in recipe.ingest.chosen()]


def _files_of(tokenized: list[Summary], set_name: str, source: str) -> tuple[list[int], int]:
    """Numbers of the documents files that have text of that source in that set, and its tokens in all."""
    found = [
        (number, file["tokens"])
        for number, part in enumerate(tokenized)
        for file in part["files"]
        if (file["set"], file["source"]) == (set_name, source)
    ]
    return [number for number, _ in found], sum(tokens for _, tokens in found)


def _ranges(tokens: int, tokens_per_shard: int) -> list[dict[str, Any]]:
    return ranges(max(1, round(tokens / tokens_per_shard))) if tokens else []


def _shuffle(number: int, item: dict[str, Any], step: Step, tokens: Step, target: Path, tokenizer: Path) -> Summary:
    """Write the shard of a range of keys, and leave the lengths of its documents."""
    heaps = [tokens.file(part, _heap_name(item["set"], item["source"])) for part in item["files"]]
    parts = [_in_range(path, int(item["low"]), int(item["high"])) for path in heaps]
    table = _in_order([part for part in parts if part.num_rows] or parts[:1])
    name = f"{item['set']}/shard-{item['place']:03d}-{item['number']:05d}.arrow"
    told = {"number": number, "set": item["set"], "source": item["source"], "name": name, "documents": table.num_rows}
    if not table.num_rows:
        return told
    loaded = load_encoder(mirror.here(tokenizer) / "tokenizer.json").tokenizer
    end = loaded.token_to_id(END_OF_TEXT)
    lengths = check_boundaries(table.column("tokens").chunk(0), special_ids(loaded), end)
    with writing(target / name) as path:
        write_arrow(path, table.select(["id", "tokens"]))
    write_table(step.file(number, "arrow"), length=lengths)
    text_bytes = pc.sum(table.column("text_bytes")).as_py()
    return {**told, "facts": facts(target / name), "tokens": int(lengths.sum()), "text_bytes": text_bytes}


def _in_order(parts: list[pa.Table]) -> pa.Table:
    """All documents by their keys, in one piece; files of a repository, which have one key, as they were read."""
    table = pa.concat_tables(parts)
    order = np.argsort(table.column("key").to_numpy(), kind="stable")
    rest = table.drop_columns("tokens").take(pa.array(order)).combine_chunks()
    return rest.append_column("tokens", _tokens_in(order, [part.column("tokens").combine_chunks() for part in parts]))


def _tokens_in(order: np.ndarray, lists: list[pa.LargeListArray]) -> pa.LargeListArray:
    """The documents of `lists` in that order, copied one by one: Arrow's `take` makes 8 bytes of index a token."""
    values = [one.values.to_numpy() for one in lists]
    of = np.repeat(np.arange(len(lists)), [len(one) for one in lists])[order].tolist()
    begin = np.concatenate([one.offsets.to_numpy()[:-1] for one in lists])[order]
    end = np.concatenate([one.offsets.to_numpy()[1:] for one in lists])[order]
    offsets = np.concatenate([[0], (end - begin).cumsum()])
    copy = np.empty(offsets[-1], values[0].dtype)
    for at, number, first, last in zip(offsets.tolist(), of, begin.tolist(), end.tolist(), strict=False):
        copy[at : at + last - first] = values[number][first:last]
    return pa.LargeListArray.from_arrays(offsets, copy)


def _in_range(path: Path, low: int, high: int) -> pa.Table:
    """Documents whose key is in the range, of a file sorted by key."""
    table = read_arrow(mirror.fetch(path))
    keys = table.column("key").to_numpy()
    first = int(np.searchsorted(keys, np.uint64(low)))
    last = len(keys) if high == 1 << 64 else int(np.searchsorted(keys, np.uint64(high)))
    return table.slice(first, last - first)


# Packing


def _pack_all(
    work: Work, recipe: Recipe, tokenized: list[Summary], shards: list[Summary], target: Path
) -> list[Summary]:
    """The packing index of each set. Sources are packed one by one, so that every row is of one source."""
    packing = {
        source: "concatenate" if _is_code(tokenized, source) else recipe.shards.packing for source in _sources(recipe)
    }
    items = [
        {
            "set": name,
            "sources": {
                source: [shard["number"] for shard in shards if (shard["set"], shard["source"]) == (name, source)]
                for source in _sources(recipe)
            },
            "packing": packing,
        }
        for name in SETS
    ]
    lengths = work.step("shuffle")
    task = partial(_pack, lengths=lengths, target=target, row_tokens=recipe.shards.sequence_length)
    return work.each("pack", items, task, "sets")


def _is_code(tokenized: list[Summary], source: str) -> bool:
    """Whether most of a source is code: then its order, files of a repository one after another, stays in the rows."""
    found = [file for part in tokenized for file in part["files"] if file["source"] == source]
    return 2 * sum(file["code_tokens"] for file in found) > sum(file["tokens"] for file in found)


def _pack(number: int, item: dict[str, Any], step: Step, lengths: Step, target: Path, row_tokens: int) -> Summary:
    """Write the packing index of a set; the rows of each source."""
    empty = np.empty(0, np.int64)
    found = {
        source: np.concatenate([empty, *(read_columns(lengths.file(one, "arrow"))["length"] for one in numbers)])
        for source, numbers in item["sources"].items()
    }
    packed = {source: PACKINGS[item["packing"][source]](values, row_tokens) for source, values in found.items()}
    name = f"{item['set']}/packing.arrow"
    with writing(target / name) as path:
        write_index(joined(list(packed.values()), [len(values) for values in found.values()]), path)
    rows = {source: index.num_rows for source, index in packed.items()}
    return {"set": item["set"], "name": name, "facts": facts(target / name), "rows_per_source": rows}


# The manifest


def _manifest(stage: StageRun, shards: list[Summary], packed: list[Summary]) -> dict[str, Any]:
    loaded = load_tokenizer(mirror.here(stage.input("tokenizer") / "tokenizer"))
    return {
        "schema_version": SCHEMA_VERSION,
        "tokenizer_fingerprint": fingerprint(loaded),
        "vocab_size": len(loaded),
        "pad_id": loaded.pad_token_id,
        "bos_id": None,  # nothing stands before a document
        "eos_id": loaded.eos_token_id,  # once, at the end of each; there is no other special token
        "sequence_length": stage.recipe.shards.sequence_length,
        **{one["set"]: _of_set([shard for shard in shards if shard["set"] == one["set"]], one) for one in packed},
    }


def _of_set(shards: list[Summary], packed: Summary) -> dict[str, Any]:
    sources = packed["rows_per_source"]
    return {
        **{key: sum(shard[key] for shard in shards) for key in SET_KEYS},
        "rows": sum(sources.values()),
        "sources": {
            source: {"rows": rows, **{key: _sum(shards, source, key) for key in SET_KEYS}}
            for source, rows in sources.items()
        },
        "files": {one["name"]: {"bytes": one["facts"][0], "sha256": one["facts"][1]} for one in [*shards, packed]},
    }


def _sum(shards: list[Summary], source: str, key: str) -> int:
    return sum(shard[key] for shard in shards if shard["source"] == source)


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


# Reading it again


def read_manifest(tokens: Path) -> dict[str, Any]:
    """What is in a folder of token shards. BadInput names what is missing, foreign, damaged or of another version."""
    path = tokens / "manifest.json"
    try:
        manifest = json.loads(mirror.here(path).read_text(encoding="utf-8"))
        files = {name: about for one in SETS for name, about in manifest[one]["files"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BadInput(Problem(f"{path} is missing or damaged: {error!r}", REMEDY)) from None
    if manifest["schema_version"] != SCHEMA_VERSION:
        what = f"{tokens} has schema version {manifest['schema_version']}, this is version {SCHEMA_VERSION}"
        raise BadInput(Problem(what, REMEDY))
    if problems := [*_foreign(tokens, files), *_partial(tokens, files)]:
        raise BadInput(*problems)
    return manifest


def verify(tokens: Path, manifest: dict[str, Any], cpus: float) -> None:
    """Compare every file with its SHA-256, in tasks on the cluster. BadInput names those that differ."""
    import ray

    compare = ray.remote(num_cpus=cpus, scheduling_strategy="SPREAD")(_damaged)
    work = [compare.remote(tokens, name, about) for one in SETS for name, about in manifest[one]["files"].items()]
    refuse_damaged(tokens, [name for name in ray.get(work) if name])


def refuse_damaged(tokens: Path, names: list[str]) -> None:
    """BadInput that names the files, if there are any."""
    if names:
        raise BadInput(*(Problem(f"{tokens / name} is damaged: its SHA-256 is another", REMEDY) for name in names))


REMEDY = "restore it, or make it again: --from shards with the stage's done.json removed"


def _foreign(tokens: Path, files: dict[str, Any]) -> list[Problem]:
    """Shards that the manifest doesn't name: they would be read like the others."""
    there = {name for name in mirror.files(tokens) if name.endswith(".arrow")}
    return [Problem(f"{tokens / name} isn't in the manifest", "move it away") for name in sorted(there - {*files})]


def _partial(tokens: Path, files: dict[str, Any]) -> list[Problem]:
    """What is missing or has another size; in object storage sizes are compared when files are fetched."""
    there, problems = set(mirror.files(tokens)), []
    for name, about in files.items():
        if name not in there:
            problems.append(Problem(f"{tokens / name} is missing", REMEDY))
        elif mirror.key_of(tokens) is None and (size := (tokens / name).stat().st_size) != about["bytes"]:
            problems.append(Problem(f"{tokens / name} has {size:,} of {about['bytes']:,} bytes", REMEDY))
    return problems


def _damaged(tokens: Path, name: str, about: dict[str, Any]) -> str | None:
    """The file's name if its bytes aren't those of the manifest."""
    return None if facts(mirror.here(tokens / name)) == [about["bytes"], about["sha256"]] else name


STAGE = Stage(
    name="shards",
    version=3,
    needs=("ingest", "tokenizer"),
    artefacts=("tokens",),
    identity=lambda recipe: {
        **recipe.shards.identity(),
        "held_out": recipe.held_out,
        "sources": _sources(recipe),  # their order is that of the rows
    },
    demand=lambda recipe: Demand((Piece("task", "shards.cpus_per_task", recipe.shards.cpus_per_task),)),
    run=run,
)
