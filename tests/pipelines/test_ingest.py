"""The stage `ingest`, with a real Ray: what it writes, that it writes the same again, and how it fails."""

import errno
import gzip
import json
import logging
import resource
import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.errors import BadInput, StageFailed, Stopped
from cluster.runs import Run, hash_folder
from pipelines import ingest
from pipelines.collect import SourceFile
from pipelines.ingest import STAGE, Group
from pipelines.readers import Bounds
from pipelines.recipe import Recipe, load_recipe
from pipelines.schema import Source
from pipelines.stage import StageRun

PROSE = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"


@pytest.fixture(scope="module")
def ray():
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, logging_level=logging.ERROR)
        yield ray
        ray.shutdown()


@pytest.fixture
def corpus(tmp_path):
    """A book, a page, a crawl of one page, a program, and three files that can't be used."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "book.txt").write_text(PROSE * 3)
    (folder / "page.html").write_text(f"<html><title>Pride</title><body><p>{PROSE}</p></body></html>")
    (folder / "deep" / "program.py").write_text("def answer() -> int:\n    return 6 * 7\n")
    (folder / "crawl.warc.gz").write_bytes(gzip.compress(record(f"<p>{PROSE}</p>")))
    (folder / "picture.png").write_bytes(b"\x89PNG\0\0\0")
    (folder / "empty.txt").touch()
    (folder / "short.txt").write_text("Too short.")
    return folder


def record(body: str) -> bytes:
    block = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\n\r\n{body}".encode()
    head = (
        "WARC/1.1\r\nWARC-Type: response\r\nWARC-Record-ID: <urn:uuid:12345678-1234-1234-1234-123456789abc>\r\n"
        "WARC-Date: 2026-01-01T00:00:00Z\r\nWARC-Target-URI: http://a.example/\r\n"
        f"Content-Type: application/http; msgtype=response\r\nContent-Length: {len(block)}\r\n\r\n"
    )
    return head.encode() + block + b"\r\n\r\n"


def recipe(folder: Path | None = None, **settings) -> Recipe:
    tiny = load_recipe("tiny")
    own = tiny.ingest.model_copy(update={"folder": str(folder) if folder else None, "max_characters": 1000} | settings)
    return tiny.model_copy(update={"ingest": own})


def begin(recipe: Recipe, path: Path) -> StageRun:
    run = Run(path)
    folder = run.stage("ingest")
    folder.begin("key")
    return StageRun(recipe, run, folder, logging.getLogger("test"), lambda numbers: None)


def rows(stage: StageRun, artefact: str) -> list[dict]:
    return pq.read_table(stage.folder.path / artefact).to_pylist()


@pytest.mark.slow
def test_documents_and_drops_of_a_folder(ray, corpus, tmp_path):
    stage = begin(recipe(corpus), tmp_path / "run")
    outcome = STAGE.run(stage)
    documents = {row["url"]: row for row in rows(stage, "documents")}
    assert {url: row["kind"] for url, row in documents.items()} == {
        "file:book.txt": "book",
        "file:page.html": "web",
        "file:deep/program.py": "code",
        "http://a.example/": "web",
    }
    assert documents["file:book.txt"]["text"] == (PROSE * 3).rstrip()
    assert json.loads(documents["file:page.html"]["meta"]) == {"title": "Pride"}
    assert {row["url"]: row["reason"] for row in rows(stage, "dropped")} == {
        "file:picture.png": "binary",
        "file:empty.txt": "empty",
        "file:short.txt": "too short",
    }
    assert outcome.read.startswith("7 files, ")
    assert outcome.wrote == "4 documents"
    assert outcome.metrics["dropped"] == {"binary": 1, "empty": 1, "too short": 1}
    assert outcome.metrics["kinds"]["web"] == {"documents": 2, "text_bytes": 2 * len(PROSE.rstrip())}
    assert outcome.metrics["text_bytes"] == sum(len(row["text"].encode()) for row in documents.values())
    assert not list(stage.folder.path.rglob(".partial-*"))


@pytest.mark.slow
def test_the_same_corpus_gives_the_same_bytes_wherever_it_lies(ray, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "SMALLEST_GROUP_BYTES", 200)
    moved = shutil.copytree(corpus, tmp_path / "elsewhere" / "corpus")
    one, two = begin(recipe(corpus, cpus_per_task=2), tmp_path / "one"), begin(recipe(moved), tmp_path / "two")
    STAGE.run(one)
    STAGE.run(two)
    for artefact in STAGE.artefacts:
        assert hash_folder(one.folder.path / artefact) == hash_folder(two.folder.path / artefact)
    assert len(hash_folder(one.folder.path / "documents")) > 2


@pytest.mark.slow
def test_a_crawl_that_is_complete_is_not_made_again(ray, tmp_path, monkeypatch):
    docs = Source(name="docs", kind="web", path="pydoc:", max_files=3)
    stage = begin(recipe(sources=(docs,)), tmp_path / "run")
    STAGE.run(stage)
    first = rows(stage, "documents")
    monkeypatch.setattr(ingest, "crawl_pydoc", None)
    STAGE.run(stage)
    assert rows(stage, "documents") == first
    assert {row["source"] for row in first} == {"docs"}


@pytest.mark.slow
def test_a_corpus_of_which_nothing_is_left_is_bad_input_and_leaves_no_artefact(ray, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.png").write_bytes(b"\0")
    (tmp_path / "corpus" / "b.txt").write_text("short")
    stage = begin(recipe(tmp_path / "corpus"), tmp_path / "run")
    with pytest.raises(BadInput, match=r"no document was left of the sources \(1 binary, 1 too short\)"):
        STAGE.run(stage)
    assert sorted(path.name for path in stage.folder.path.iterdir()) == ["logs", "state.json"]


@pytest.mark.slow
def test_a_request_to_stop_ends_it(ray, corpus, tmp_path):
    stage = begin(recipe(corpus), tmp_path / "run")
    stage.folder.stop_request.touch()
    with pytest.raises(Stopped):
        STAGE.run(stage)
    assert not (stage.folder.path / "documents").exists()


@pytest.mark.slow
def test_a_machine_that_does_not_see_the_run_folder_fails_the_stage_with_a_remedy(ray, corpus, tmp_path):
    stage = begin(recipe(corpus), tmp_path / "run")
    files = [SourceFile(corpus / "book.txt", "file:book.txt", 1)]
    group = Group(stage.recipe.ingest.chosen()[0], files)
    with pytest.raises(StageFailed, match="storage that every machine of the cluster sees"):
        list(ingest._read_all([group], stage, [tmp_path / "nowhere", tmp_path / "nowhere"]))


def test_a_disk_that_takes_no_more_is_told_and_leaves_no_part(tmp_path):
    (tmp_path / "book.txt").write_text("".join(f"{number} bottles on the wall\n" for number in range(200_000)))
    source = Source(name="mine", path=str(tmp_path))
    item = ingest._item(0, Group(source, [SourceFile(tmp_path / "book.txt", "file:book.txt", 1)]))
    targets = [tmp_path / "documents", tmp_path / "dropped"]
    for target in targets:
        target.mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        told = ingest._read_group(item, targets, Bounds(1, 1000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert told["errno"] == errno.EFBIG
    assert list(targets[0].iterdir()) == []


def test_a_run_folder_that_cannot_be_written_fails_the_stage(corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ingest").write_text("a file where the folder belongs")
    run = Run(tmp_path / "run")
    stage = StageRun(recipe(corpus), run, run.stage("ingest"), logging.getLogger("test"), lambda numbers: None)
    with pytest.raises(StageFailed, match="cannot write documents under"):
        STAGE.run(stage)


def test_check_names_every_source_that_cannot_be_found_and_demand_still_answers(tmp_path):
    missing = Source(name="gone", path=str(tmp_path / "gone"))
    absent = Source(name="absent", path="package:no_such_package/x")
    asked = recipe(sources=(missing, absent))
    assert [problem.what.split(":")[0] for problem in STAGE.check(asked)] == ["source 'gone'", "source 'absent'"]
    assert STAGE.demand(asked).disk_bytes == 0


def test_the_key_follows_the_content_and_not_the_place(corpus, tmp_path):
    def key(folder: Path, **settings) -> str:
        asked = recipe(folder, **settings)
        return STAGE.key(asked, STAGE.sources(asked, False))

    before = key(corpus)
    moved = tmp_path / "moved"
    corpus.rename(moved)
    assert key(moved, cpus_per_task=2.0) == before
    assert key(moved, min_characters=5) != before
    (moved / "short.txt").write_text("It is longer now.")
    assert key(moved) != before


def test_groups_follow_the_order_of_files_and_keep_sources_apart(monkeypatch):
    monkeypatch.setattr(ingest, "SMALLEST_GROUP_BYTES", 10)
    first, second = (Source(name=name, path=".") for name in ("first", "second"))
    files = [SourceFile(Path(str(size)), f"file:{size}", size) for size in (0, 4, 5, 6, 30, 1)]
    sizes = [[file.size for file in group.files] for group in ingest._groups({first: files, second: files[:1]})]
    assert sizes == [[0, 4, 5], [6], [30], [1], [0]]
