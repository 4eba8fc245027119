"""Benchmarks of data preparation: python -m tests.bench.data [FIGURE ...], or `make bench-data`.

    tokenize               tokens/s of documents to packed shards, against raw `tokenizers.encode_batch`
    tokenize_vs_datatrove  the same, against datatrove's DocumentTokenizer and its merger
    minhash                documents/s of near-duplicate removal, against datatrove's four steps of it
    minhash_recall         planted duplicates found, over those that datatrove finds
    html                   MB/s of WARC files to text that keeps the rules of quality, against datatrove's
    memory_1gb memory_4gb  2 GiB over the peak above an idle Ray of raw text to shards, of that much text
    memory_flat            1.15 times the peak at 1 GB over that at 4 GB

reads   what HEADWATER_BENCH_DATA names (`texts`); datatrove's environment (`peer`)
writes  runs/bench/data.json, and one line a figure: BENCH name value [low, high] bar B met

Ends with an error only where a comparison is invalid. All of it runs on two CPUs.
"""

from __future__ import annotations

import gzip
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain
from pathlib import Path
from statistics import mean
from typing import Any

import yaml
from fastwarc.warc import ArchiveIterator, WarcRecordType

from cluster.local import ray_session
from cluster.progress import progress
from llm.vocabulary import END_OF_TEXT
from pipelines.corpus.collect import crawl_pydoc
from pipelines.corpus.web import FURNITURE
from pipelines.run import Journey
from tests.bench import command, memory, ours, peer, texts
from tests.bench.agreement import HIGH, LOW, same_doubles, same_pages, same_tokens, text_digest
from tests.bench.command import CPUS, Scale
from tests.bench.measure import FOLDER, Figure, Invalid, Turn, at_most, compare

SEED = 20
OBJECT_STORE_MB = 512
TOKENIZE_BYTES = 40_000_000
MINHASH_BYTES, PLANTED = 40_000_000, 3_000
NGRAM, BANDS, ROWS = 5, 14, 8
WARC_COPIES, PYDOC_PAGES = 8, 300
MEMORY_BYTES = {"memory_1gb": 1_000_000_000, "memory_4gb": 4_000_000_000}
MEMORY_LIMIT = 2 << 30
GROWTH = 1.15
FILE_BYTES = 4_000_000


def main(arguments: list[str]) -> int:
    """Measure the figures asked for, all of them by default."""
    return command.run("tests.bench.data", FIGURES, arguments, FOLDER / "data.json")


# The figures


def tokenize(scale: Scale) -> list[Figure]:
    """Documents to shards, against `encode_batch` alone."""
    with ray_session(None, OBJECT_STORE_MB):
        journey = _tokenizable(scale)
        arms = (lambda: ours.tokenize(journey), lambda: _raw(journey))
        return [compare("tokenize", 0.90, *arms, same_tokens, scale.pairs)]


def tokenize_vs_datatrove(scale: Scale) -> list[Figure]:
    """Documents to shards, against datatrove's."""
    with ray_session(None, OBJECT_STORE_MB):
        journey = _tokenizable(scale)
        settings = _inputs(journey) | {"end_of_text": END_OF_TEXT, "work": _empty("datatrove-tokenize")}
        arms = (lambda: ours.tokenize(journey), lambda: _peer("tokenize", settings))
        return [compare("tokenize_vs_datatrove", 2.0, *arms, same_tokens, scale.pairs)]


def minhash(scale: Scale) -> list[Figure]:
    """JSONL to what is left without near-duplicates, against datatrove's."""
    folder, known, pairs = _with_doubles(scale)
    settings = {"ngram": NGRAM, "bands": BANDS, "rows": ROWS}
    only_near = {"exact": False, "near": True, "passages": False, **settings}
    recipe = ours.recipe("minhash", [_jsonl(folder)], **ours.AS_IS, deduplicate=only_near)
    theirs = settings | {"documents": folder, "work": _empty("datatrove-minhash")}
    with ray_session(None, OBJECT_STORE_MB):
        journey = ours.begin(recipe)
        arms = (lambda: ours.ingest(journey), lambda: _peer("minhash", theirs))
        speed = compare(
            "minhash", 5.0, *arms, lambda mine, other: same_doubles(mine, other, known, pairs), scale.pairs
        )
    found = speed.detail["our_recall"] / speed.detail["their_recall"]
    expected = mean(1 - (1 - similarity**ROWS) ** BANDS for *_, similarity in pairs if similarity >= HIGH)
    detail = {key: speed.detail[key] for key in ("pairs", "our_recall", "their_recall")}
    return [speed, Figure("minhash_recall", found, found, found, 1.0, {**detail, "expected_recall": expected})]


def html(scale: Scale) -> list[Figure]:
    """WARC files to pages that keep the rules, against datatrove's with the same extractor."""
    folder = _pages(scale)
    urls, size = _responses(folder)
    source = {"name": "pages", "kind": "web", "path": str(folder), "licence": "unknown", "respect": []}
    recipe = ours.recipe("html", [source], **ours.AS_IS, **ours.KEEP_DOUBLES)
    theirs = {"pages": folder, "skip": FURNITURE, "work": _empty("datatrove-html")}
    with ray_session(None, OBJECT_STORE_MB):
        journey = ours.begin(recipe)
        arms = (lambda: ours.ingest(journey), lambda: _peer("html", theirs))
        agree = lambda mine, other: same_pages(mine, other, urls) | {"html_bytes": size}  # noqa: E731
        return [compare("html", 1.2, *arms, agree, scale.pairs)]


def memory_of_all(scale: Scale) -> list[Figure]:
    """Raw text to shards, on a small and on a large corpus: what it holds at most beyond an idle Ray."""
    idle = memory.idle_ray(OBJECT_STORE_MB)
    peaks = {name: _peak(name, scale.of(size)) - idle for name, size in MEMORY_BYTES.items()}
    detail = {"idle_bytes": idle, "peak_bytes_above_idle": peaks}
    small, large = peaks.values()
    figures = [at_most(name, above, MEMORY_LIMIT, detail) for name, above in peaks.items()]
    return [*figures, at_most("memory_flat", large, GROWTH * small, detail)]


FIGURES: dict[str, command.Measure] = {
    "tokenize": tokenize,
    "tokenize_vs_datatrove": tokenize_vs_datatrove,
    "minhash": minhash,
    "html": html,
    "memory": memory_of_all,
}


# Arms


def _raw(journey: Journey) -> Turn:
    """`encode_batch` in a process of its own, a thread for each CPU."""
    command = [sys.executable, "-m", "tests.bench.encode", *map(str, _inputs(journey).values())]
    environment = {**os.environ, "RAYON_NUM_THREADS": str(CPUS), "TOKENIZERS_PARALLELISM": "true"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise Invalid(f"encode_batch failed:\n{done.stderr[-2000:]}")
    return _turn(json.loads(done.stdout.splitlines()[-1]))


def _peer(job: str, settings: dict[str, Any]) -> Turn:
    return _turn(peer.run(job, **settings))


def _turn(said: dict[str, Any]) -> Turn:
    return Turn(said.pop("seconds"), said)


def _peak(name: str, size: int) -> int:
    """Peak PSS of the command as users give it, raw text to shards."""
    folder = _empty(f"{name}-text")
    texts.write_jsonl(texts.perturbed(_pool(), size, SEED), folder, FILE_BYTES * 16)
    recipe = ours.recipe(name, [_jsonl(folder)])
    path = folder.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json")), encoding="utf-8")
    shutil.rmtree(ours.WORK / name, ignore_errors=True)
    command = [sys.executable, "-m", "pipelines", "run", str(path), "--to", "shards", "--runs", str(ours.WORK)]
    most = memory.peak(command, folder.with_suffix(".log"))
    shutil.rmtree(folder)
    return most


# What is measured on


def _tokenizable(scale: Scale) -> Journey:
    folder = _empty("tokenize-text")
    texts.write_jsonl(texts.perturbed(_pool(), scale.of(TOKENIZE_BYTES), SEED), folder, FILE_BYTES)
    recipe = ours.recipe("tokenize", [_jsonl(folder)], **ours.AS_IS, **ours.KEEP_DOUBLES)
    return ours.begin(recipe, "ingest", "tokenizer")


def _inputs(journey: Journey) -> dict[str, Path]:
    """What tokenizing reads."""
    documents = journey.run.stage("ingest").path / "documents"
    return {"documents": documents, "tokenizer": journey.run.stage("tokenizer").path / "tokenizer" / "tokenizer.json"}


def _with_doubles(scale: Scale) -> tuple[Path, dict[str, str], list[tuple[str, str, float]]]:
    """A folder of documents, the id of each by its digest, and the near-duplicates among them."""
    folder, pool = _empty("minhash-text"), _pool()
    originals = list(texts.perturbed(pool, scale.of(MINHASH_BYTES), SEED))
    planted = texts.planted(pool, originals[: scale.of(PLANTED)], SEED)
    everything = list(chain(originals, (pair.copy for pair in planted)))
    texts.write_jsonl(everything, folder, FILE_BYTES)
    known = {text_digest(text): f"{number:09d}" for number, text in enumerate(everything)}
    similar = [pair for pair in planted if pair.jaccard >= LOW]
    names = [(known[text_digest(pair.original)], known[text_digest(pair.copy)], pair.jaccard) for pair in similar]
    return folder, known, names


def _pages(scale: Scale) -> Path:
    """A folder of WARC files, each a copy of what there is."""
    folder = _empty("html-pages")
    folder.mkdir(parents=True)
    given = texts.data_folder()
    found = sorted(given.glob("*.warc.gz")) if given else [_crawled()]
    for path in found:
        labelled = _labelled(path)
        for number in range(scale.of(WARC_COPIES)):
            (folder / f"{number:02d}-{path.name}").write_bytes(labelled)
    return folder


def _labelled(path: Path) -> bytes:
    """A WARC file whose responses say that they are HTML, as those of Common Crawl do: others datatrove may skip."""
    written = []
    with open(path, "rb") as handle:
        for record in ArchiveIterator(handle, record_types=WarcRecordType.response):
            record.headers["WARC-Identified-Payload-Type"] = "text/html"
            one = io.BytesIO()
            record.write(one)
            written.append(gzip.compress(one.getvalue(), compresslevel=6))
    return b"".join(written)


def _crawled() -> Path:
    path = FOLDER / "arms" / "pydoc.warc.gz"
    if not path.exists():
        with progress("crawl", PYDOC_PAGES, "pages") as told:
            crawl_pydoc(path, PYDOC_PAGES, told)
    return path


def _responses(folder: Path) -> tuple[set[str], int]:
    """Addresses of all responses, and their bytes without HTTP's head."""
    found = [(record.headers["WARC-Target-URI"], len(record.reader.read())) for record in _records(folder)]
    return {url for url, _ in found}, sum(size for _, size in found)


def _records(folder: Path) -> Iterator[Any]:
    for path in sorted(folder.iterdir()):
        with open(path, "rb") as handle:
            yield from ArchiveIterator(handle, record_types=WarcRecordType.response)


def _jsonl(folder: Path) -> dict[str, Any]:
    return {
        "name": "text",
        "kind": "article",
        "path": str(folder),
        "licence": "unknown",
        "id_column": "id",
        "rules": [],
    }


@cache
def _pool() -> texts.Pool:
    return texts.gather(texts.real_texts())


def _empty(name: str) -> Path:
    folder = ours.WORK / name
    shutil.rmtree(folder, ignore_errors=True)
    return folder


if __name__ == "__main__":
    command.on_few_cpus()
    sys.exit(main(sys.argv[1:]))
