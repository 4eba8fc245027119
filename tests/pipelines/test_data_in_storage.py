"""Text in object storage, and text larger than the object store of Ray: a real server, a real Ray."""

import json
import random
import tempfile
from pathlib import Path

import pytest

from cluster import mirror
from cluster.runs import find_run, hash_folder
from tests.commands import headwater
from tests.s3 import BUCKET, storage

WORDS = [
    f"{first}{last}"
    for first in ("al", "be", "co", "du", "er", "fi", "go", "hu")
    for last in ("ra", "se", "ti", "lo", "mu")
]


def said(seed, words):
    draw = random.Random(seed)
    return " ".join(draw.choices(WORDS, k=words))


@pytest.mark.slow
def test_sources_and_runs_in_object_storage_give_the_same_documents_as_on_disk(tmp_path, monkeypatch):
    (tmp_path / "corpus" / "deep").mkdir(parents=True)
    for number in range(6):
        lines = (json.dumps({"text": said(f"{number}/{line}", 60)}) for line in range(40))
        (tmp_path / "corpus" / "deep" / f"{number}.jsonl").write_text("\n".join(lines))
    (tmp_path / "corpus" / "empty.txt").touch()
    with storage(tmp_path / "s3") as server:
        for name, value in server.variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
        mirror.forget()
        upload(tmp_path / "corpus", mirror.local(f"s3://{BUCKET}/corpus"))
        said_there = {}
        for place, root in ((str(tmp_path / "corpus"), str(tmp_path / "runs")), (f"s3://{BUCKET}/corpus",) * 2):
            source = {"name": "words", "kind": "article", "path": place, "licence": "CC0-1.0", "rules": []}
            words = (f"ingest.sources=[{json.dumps(source)}]", "wandb.enabled=false", "ingest.decontaminate=false")
            root = root if place.startswith("/") else f"s3://{BUCKET}/runs"
            done = headwater("run", "micro", "--to", "shards", "--runs", root, *words)
            assert done.returncode == 0, done.stderr
            run = find_run("micro", mirror.local(root) if "://" in root else tmp_path / "runs")
            tokens = run.stage("shards").path / "tokens"
            found = run.stage("ingest").done()["metrics"]
            # Which are held out follows from their ids, and those from their addresses.
            sharded = run.stage("shards").done()["metrics"]
            sums = [sum(sharded[name][key] for name in ("train", "held_out")) for key in ("documents", "tokens")]
            said_there[place] = (found["documents"], found["dropped"], sorted(texts(run)), sums)
            assert set(hash_folder(tokens)) > {"manifest.json", "train/packing.arrow", "held_out/packing.arrow"}
    on_disk, in_storage = said_there.values()
    assert on_disk == in_storage
    assert on_disk[1] == {"empty": 1}


def upload(folder, place):
    for path in folder.rglob("*"):
        if path.is_file():
            target = place / path.relative_to(folder)
            mirror.make(target.parent)
            target.write_bytes(path.read_bytes())
            mirror.send(target)


def texts(run):
    from pipelines import documents

    parts = documents.parts(run.stage("ingest").path / "documents")
    return [row["text"] for part in parts for batch in documents.read(part, ["text"]) for row in batch.to_pylist()]


@pytest.mark.soak
@pytest.mark.timeout(3000)
def test_a_corpus_ten_times_the_object_store_is_never_spilled(tmp_path, monkeypatch):
    """The smallest object store that the recipe allows is 80 MiB."""
    (tmp_path / "corpus").mkdir()
    for number in range(80):
        lines = (json.dumps({"text": said(f"{number}/{line}", 1000)}) for line in range(2600))
        (tmp_path / "corpus" / f"{number:03d}.jsonl").write_text("\n".join(lines))
    assert sum(path.stat().st_size for path in (tmp_path / "corpus").iterdir()) > 800 << 20
    source = {"name": "words", "kind": "article", "path": str(tmp_path / "corpus"), "licence": "CC0-1.0", "rules": []}
    words = (f"ingest.sources=[{json.dumps(source)}]", "cluster.object_store_mb=80", "wandb.enabled=false")
    with tempfile.TemporaryDirectory(prefix="hw-") as ray_folder:  # a short path: sockets lie in it
        monkeypatch.setenv("RAY_TMPDIR", ray_folder)
        done = headwater("run", "micro", "--to", "shards", "--runs", str(tmp_path / "runs"), *words, timeout=2900)
        assert done.returncode == 0, done.stderr
        assert list(Path(ray_folder).rglob("raylet.out")), "Ray was here"
        spilled = [path for path in Path(ray_folder).rglob("ray_spilled_objects*/*") if path.is_file()]
    assert not spilled, "nothing went through the object store that it couldn't hold"
