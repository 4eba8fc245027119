"""The stage `ingest`: what it writes, that it writes the same again after any interruption, and how it fails.

Most tests run its steps in this process; those that are slow run them on a real Ray.
"""

import errno
import gzip
import json
import logging
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from cluster.errors import BadInput, StageFailed, Stopped
from cluster.runs import Run, hash_folder
from pipelines import ingest, partitions
from pipelines.conversations import held_out_texts
from pipelines.corpus.collect import SourceFile
from pipelines.corpus.repositories import Repository
from pipelines.ingest import STAGE
from pipelines.partitions import Work
from pipelines.recipe import Recipe, load_recipe
from pipelines.schema import Source
from pipelines.stage import StageRun
from tests.commands import CHECKOUT
from tests.pipelines.corpus.in_process import InProcess

PROSE = "It is a truth universally acknowledged, that a single man must be in want of a wife.\n"
OTHER = "However little known the feelings of such a man may be on his first entering a neighbourhood, it is so.\n"
WORDS = [f"word{letter}{other}" for letter in "abcdefghij" for other in "klmnopqrst"]
PROGRAM = "def answer() -> int:\n    return 6 * 7\n"


@pytest.fixture
def here(monkeypatch):
    """Tasks run in this process."""
    monkeypatch.setattr(ingest, "Work", InProcess)


@pytest.fixture
def corpus(tmp_path):
    """A book, its double, a page, a crawl of one page, a program, and three files that can't be used."""
    folder = tmp_path / "corpus"
    (folder / "deep").mkdir(parents=True)
    (folder / "book.txt").write_text(PROSE)
    (folder / "double.txt").write_text(PROSE.upper())
    (folder / "page.html").write_text(f"<html><title>Feelings</title><body><p>{OTHER}</p></body></html>")
    (folder / "deep" / "program.py").write_text(PROGRAM)
    (folder / "crawl.warc.gz").write_bytes(
        gzip.compress(record("<p>" + "The rightful property of one. " * 3 + "</p>"))
    )
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
    """Without rules and decontamination, unless asked for: the texts are short."""
    tiny = load_recipe("tiny")
    bare = {"thresholds": {}, "decontaminate": False, "max_characters": 1000}
    if folder is not None:
        bare["sources"] = (Source(name="mine", path=str(folder), licence="unknown", rules=()),)
    return tiny.model_copy(update={"ingest": tiny.ingest.model_copy(update=bare | settings)})


def begin(recipe: Recipe, path: Path) -> StageRun:
    run = Run(path)
    folder = run.stage("ingest")
    folder.begin("key")
    return StageRun(recipe, run, folder, logging.getLogger("test"), lambda numbers: None)


def rows(stage: StageRun, artefact: str) -> list[dict]:
    return pq.read_table(stage.folder.path / artefact).to_pylist()


def hashes(stage: StageRun) -> list[dict[str, str]]:
    return [hash_folder(stage.folder.path / artefact) for artefact in STAGE.artefacts]


# What it writes


def test_documents_and_drops_of_a_folder(here, corpus, tmp_path):
    stage = begin(recipe(corpus), tmp_path / "run")
    outcome = STAGE.run(stage)
    documents = {row["url"]: row for row in rows(stage, "documents")}
    kept = "file:book.txt" if "file:book.txt" in documents else "file:double.txt"
    assert {url: row["kind"] for url, row in documents.items()} == {
        kept: "book",
        "file:page.html": "web",
        "file:deep/program.py": "code",
        "http://a.example/": "web",
    }
    assert documents[kept]["text"].lower() == PROSE.rstrip().lower()
    assert json.loads(documents["file:page.html"]["meta"])["title"] == "Feelings"
    dropped = {row["url"]: row for row in rows(stage, "dropped")}
    assert {url: row["reason"] for url, row in dropped.items()} == {
        "file:picture.png": "binary",
        "file:empty.txt": "empty",
        "file:short.txt": "too short",
        ({"file:book.txt", "file:double.txt"} - {kept}).pop(): "duplicate",
    }
    assert dropped["file:short.txt"]["text"] == "Too short."
    assert dropped["file:short.txt"]["value"] == 10
    gone = next(row for row in dropped.values() if row["reason"] == "duplicate")
    assert documents[kept]["id"] in gone["detail"]
    assert gone["text"].lower() == PROSE.rstrip().lower()
    assert outcome.read.startswith("8 files, ")
    assert outcome.wrote == "4 documents, 4 dropped"
    assert outcome.metrics["dropped"] == {"binary": 1, "duplicate": 1, "empty": 1, "too short": 1}
    assert outcome.metrics["text_bytes"] == sum(len(row["text"].encode()) for row in documents.values())
    assert sum(len(row["text"].encode()) for row in dropped.values()) == sum(outcome.metrics["dropped_bytes"].values())
    reasons = {row["reason"] for row in outcome.tables["filters"]}
    assert reasons == set(outcome.metrics["dropped"])


def test_every_document_has_its_licence_and_source(here, corpus, tmp_path):
    (corpus / "rows.jsonl").write_text(json.dumps({"text": OTHER * 2 + "And so it goes on.", "terms": "CC0-1.0"}))
    source = Source(name="mine", path=str(corpus), licence="MIT", licence_column="terms", rules=())
    stage = begin(recipe(sources=(source,)), tmp_path / "run")
    STAGE.run(stage)
    licences = {row["url"]: row["licence"] for row in rows(stage, "documents")}
    assert licences.pop("file:rows.jsonl#1") == "CC0-1.0"
    assert set(licences.values()) == {"MIT"}
    assert {row["source"] for row in rows(stage, "documents")} == {"mine"}


def test_rules_and_masks_are_those_of_the_source(here, tmp_path):
    (tmp_path / "corpus").mkdir()
    letter = "Write to jane.roe@roe-and-sons.com about the goods, or come to the house at any time.\n"
    (tmp_path / "corpus" / "a.txt").write_text(letter)
    (tmp_path / "corpus" / "b.txt").write_text("and again " * 8)
    source = Source(name="mine", kind="article", path=str(tmp_path / "corpus"), licence="unknown")
    stage = begin(recipe(sources=(source,)), tmp_path / "run")
    outcome = STAGE.run(stage)
    [document] = rows(stage, "documents")
    assert "jane" not in document["text"]
    assert outcome.metrics["masked"] == {"email": 1}
    [dropped] = rows(stage, "dropped")
    assert dropped["reason"].startswith("gopher-")
    assert dropped["value"] > 0


def test_what_will_be_evaluated_is_not_trained_on(here, tmp_path):
    asked = recipe(decontaminate=True)
    spoken = next(text for text in held_out_texts(asked.sft) if len(text.split()) > 20)
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "leak.txt").write_text(f"Somebody wrote it down. {spoken} And went home.")
    (tmp_path / "corpus" / "book.txt").write_text(PROSE)
    source = Source(name="mine", path=str(tmp_path / "corpus"), licence="unknown", rules=())
    stage = begin(recipe(sources=(source,), decontaminate=True), tmp_path / "run")
    STAGE.run(stage)
    assert [row["url"] for row in rows(stage, "documents")] == ["file:book.txt"]
    [dropped] = rows(stage, "dropped")
    assert (dropped["reason"], dropped["value"] >= 1) == ("contaminated", True)
    assert STAGE.key(asked, {}) != STAGE.key(recipe(decontaminate=False), {})


def test_passages_that_another_document_has_are_taken_out(here, tmp_path):
    shared = "The committee met on Tuesday to hear it. The report was read in full. Nobody asked for the floor then. "
    (tmp_path / "corpus").mkdir()
    for name in ("one", "two"):
        own = [f"{name}{n} {name}{n + 1} {name}{n + 2} goes on {name}{n} with it. " for n in range(0, 60, 3)]
        (tmp_path / "corpus" / f"{name}.txt").write_text("".join([*own, shared, *own[::-1]]))
    stage = begin(recipe(tmp_path / "corpus", max_characters=10_000), tmp_path / "run")
    outcome = STAGE.run(stage)
    assert sorted(row["text"].count("committee") for row in rows(stage, "documents")) == [0, 1]
    assert outcome.metrics["repeated_passages"] == 1


def test_files_of_a_repository_are_one_after_another_with_its_licence(here, tmp_path):
    for name, terms in (("free", "Apache-2.0"), ("closed", "LicenseRef-Proprietary")):
        (tmp_path / "repos" / name / "src").mkdir(parents=True)
        (tmp_path / "repos" / name / "pyproject.toml").write_text(f'[project]\nname = "{name}"\nlicense = "{terms}"\n')
        for place in ("setup.py", "src/b.py", "src/a.py"):
            (tmp_path / "repos" / name / place).write_text(f"# {name} {place}\n{PROGRAM}")
    source = Source(name="repos", kind="code", path=str(tmp_path / "repos"), licence="detect")
    stage = begin(recipe(sources=(source,)), tmp_path / "run")
    STAGE.run(stage)
    found = rows(stage, "documents")
    assert {row["licence"] for row in found} == {"Apache-2.0"}
    assert [row["url"].partition("free/")[2] for row in found if row["url"].endswith(".py")] == [
        "setup.py",
        "src/a.py",
        "src/b.py",
    ]
    assert len({json.loads(row["meta"])["repository"] for row in found}) == 1
    assert "licence not allowed" in {row["reason"] for row in rows(stage, "dropped")}


# That it writes the same again


@pytest.mark.slow
def test_the_same_corpus_gives_the_same_bytes_wherever_it_lies(ray, corpus, tmp_path, monkeypatch):
    monkeypatch.setattr(ingest, "SMALLEST_GROUP_BYTES", 200)
    moved = shutil.copytree(corpus, tmp_path / "elsewhere" / "corpus")
    one, two = begin(recipe(corpus, cpus_per_task=2), tmp_path / "one"), begin(recipe(moved), tmp_path / "two")
    STAGE.run(one)
    STAGE.run(two)
    assert hashes(one) == hashes(two)
    assert len(hashes(one)[0]) > 2
    assert not list(one.folder.path.rglob(".partial-*"))
    monkeypatch.setattr(ingest, "Work", InProcess)
    three = begin(recipe(corpus), tmp_path / "three")
    STAGE.run(three)
    assert hashes(three) == hashes(one), "in one process without Ray as well"


def test_killed_before_any_task_it_goes_on_and_the_bytes_are_the_same(here, corpus, tmp_path, monkeypatch):
    """A command that dies before task n has left n - 1 partitions; the next does the others, and no others."""
    monkeypatch.setattr(ingest, "SMALLEST_GROUP_BYTES", 200)
    whole = begin(recipe(corpus), tmp_path / "whole")
    STAGE.run(whole)
    do, tasks = partitions._do, 0

    def counting(row, step, task):
        nonlocal tasks
        tasks += 1
        return do(row, step, task)

    monkeypatch.setattr(partitions, "_do", counting)
    STAGE.run(begin(recipe(corpus), tmp_path / "counted"))
    everything, longest = tasks, 0
    for number in range(1, everything + 1):
        tasks = 0

        def dying(row, step, task, fatal=number):
            nonlocal tasks
            tasks += 1
            if tasks == fatal:
                raise KeyboardInterrupt
            return do(row, step, task)

        monkeypatch.setattr(partitions, "_do", dying)
        with pytest.raises(KeyboardInterrupt):
            STAGE.run(begin(recipe(corpus), tmp_path / f"run-{number}"))
        tasks = 0
        monkeypatch.setattr(partitions, "_do", counting)
        again = begin(recipe(corpus), tmp_path / f"run-{number}")
        STAGE.run(again)
        assert hashes(again) == hashes(whole)
        assert tasks == everything - (number - 1)
        longest = max(longest, tasks)
    assert longest == everything > 10


def test_killed_after_it_published_it_finds_that_done(here, corpus, tmp_path, monkeypatch):
    stage = begin(recipe(corpus), tmp_path / "run")
    STAGE.run(stage)
    whole = hashes(stage)
    again = begin(recipe(corpus), tmp_path / "run")
    assert STAGE.run(again).metrics["documents"] == 4
    assert hashes(again) == whole
    (again.folder.path / "documents" / "part-00000.parquet").unlink()
    with pytest.raises(StageFailed, match=r"part-00000\.parquet is gone"):
        STAGE.run(begin(recipe(corpus), tmp_path / "run"))


def test_what_was_done_of_other_files_does_not_count(here, corpus, tmp_path, monkeypatch):
    """The same key, since only what decides on repositories has changed."""
    monkeypatch.setattr(ingest, "SMALLEST_GROUP_BYTES", 200)
    run = tmp_path / "run"
    monkeypatch.setattr(ingest, "_write_all", lambda *arguments: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        STAGE.run(begin(recipe(corpus), run))
    monkeypatch.undo()
    monkeypatch.setattr(ingest, "Work", InProcess)
    (corpus / "another.py").write_text(PROGRAM.replace("answer", "question"))
    (corpus / "book.txt").unlink()
    stage, fresh = begin(recipe(corpus), run), begin(recipe(corpus), tmp_path / "fresh")
    STAGE.run(stage)
    STAGE.run(fresh)
    assert hashes(stage) == hashes(fresh)


@pytest.mark.slow
def test_a_killed_command_goes_on_with_what_is_done(tmp_path):
    """SIGKILL to the driver, a real Ray; the same command ends with the bytes of one that was left alone."""
    for number in range(24):
        draw = random.Random(number)
        lines = "".join(" ".join(draw.choices(WORDS, k=36)) + ".\n" for _ in range(4000))
        (tmp_path / "corpus" / f"{number:02d}").mkdir(parents=True)
        (tmp_path / "corpus" / f"{number:02d}" / "book.txt").write_text(lines)
    settings = (f"ingest.folder={tmp_path / 'corpus'}", "ingest.folder_licence=unknown", "wandb.enabled=false")
    settings = (*settings, "ingest.cpus_per_task=2", "ingest.deduplicate.near=false")

    def start(name):
        command = [sys.executable, "-m", "pipelines", "ingest", "micro", f"name={name}", "--runs", str(tmp_path)]
        few = {0, 1} & os.sched_getaffinity(0)  # so that not all parts are done at once
        limited = ["taskset", "-c", ",".join(map(str, few or {0})), *command, *settings]
        started.append(subprocess.Popen(limited, cwd=CHECKOUT, stdout=subprocess.DEVNULL, start_new_session=True))
        return started[-1]

    def artefacts(name):
        return [hash_folder(tmp_path / name / "ingest" / artefact) for artefact in STAGE.artefacts]

    started: list[subprocess.Popen] = []
    try:
        process, step = start("killed"), tmp_path / "killed" / "ingest" / "steps" / "read"
        wait_for(lambda: len(list(step.glob("*.json"))) >= 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
        done = {path.name: path.stat().st_mtime_ns for path in step.glob("*.json")}
        assert 2 <= len(done) < 24
        process = start("killed")
        wait_for(lambda: len(list(step.glob("*.json"))) > len(done))
        assert {name: (step / name).stat().st_mtime_ns for name in done} == done, "what was done was done again"
        assert process.wait(timeout=300) == 0
        assert not (tmp_path / "killed" / "ingest" / "steps").exists()
        assert start("whole").wait(timeout=300) == 0
        assert artefacts("killed") == artefacts("whole")
    finally:
        for process in started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def wait_for(condition, seconds=120.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.slow
def test_a_crawl_that_is_complete_is_not_made_again(ray, tmp_path, monkeypatch):
    docs = Source(name="docs", kind="web", path="pydoc:", licence="PSF-2.0", max_files=3, rules=())
    stage = begin(recipe(sources=(docs,)), tmp_path / "run")
    STAGE.run(stage)
    first = rows(stage, "documents")
    monkeypatch.setattr(ingest, "crawl_pydoc", None)
    stage.folder.forget_done()
    STAGE.run(stage)
    assert rows(stage, "documents") == first
    assert {row["source"] for row in first} == {"docs"}


# How it fails


def test_a_corpus_of_which_nothing_is_left_is_bad_input_and_leaves_no_artefact(here, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.png").write_bytes(b"\0")
    (tmp_path / "corpus" / "b.txt").write_text("short")
    stage = begin(recipe(tmp_path / "corpus"), tmp_path / "run")
    with pytest.raises(BadInput, match=r"no document was left of the sources \(1 binary, 1 too short\)"):
        STAGE.run(stage)
    assert not {"documents", "dropped"} & {path.name for path in stage.folder.path.iterdir()}


def test_damage_ends_the_stage_where_that_is_asked_for(here, corpus, tmp_path):
    (corpus / "picture.png").unlink()
    (corpus / "torn.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 9)[:-9])
    stage = begin(recipe(corpus, on_error="fail"), tmp_path / "run")
    with pytest.raises(BadInput, match=r"source 'mine': file:torn.jsonl.gz: damaged file"):
        STAGE.run(stage)
    stage = begin(recipe(corpus), tmp_path / "other")
    STAGE.run(stage)
    assert "damaged file" in {row["reason"] for row in rows(stage, "dropped")}


def test_links_that_lead_nowhere_and_files_that_may_not_be_read_are_told(here, corpus, tmp_path):
    (corpus / "loop.txt").symlink_to("loop.txt")
    (corpus / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(corpus / "pipe.txt")
    stage = begin(recipe(corpus), tmp_path / "run")
    STAGE.run(stage)
    told = {row["url"]: (row["reason"], row["detail"]) for row in rows(stage, "dropped")}
    assert told["file:loop.txt"] == ("unreadable", "Too many levels of symbolic links")
    assert told["file:gone.txt"] == ("unreadable", "No such file or directory")


@pytest.mark.slow
def test_a_request_to_stop_ends_it(ray, corpus, tmp_path):
    stage = begin(recipe(corpus), tmp_path / "run")
    stage.folder.stop_request.touch()
    with pytest.raises(Stopped):
        STAGE.run(stage)
    assert not (stage.folder.path / "documents").exists()


@pytest.mark.slow
def test_a_machine_that_does_not_see_the_run_folder_fails_the_stage_with_a_remedy(ray, corpus, tmp_path, monkeypatch):
    """The folder goes away between the driver's making it and the task's writing."""
    stage, run = begin(recipe(corpus), tmp_path / "run"), Work._run

    def gone(work, waiting, do, data):
        do.keywords["step"].folder.rmdir()
        return run(work, waiting, do, data)

    monkeypatch.setattr(Work, "_run", gone)
    with pytest.raises(StageFailed, match="storage that every machine of the cluster sees"):
        STAGE.run(stage)


def test_a_disk_that_takes_no_more_is_told_and_leaves_no_part(here, tmp_path):
    (tmp_path / "corpus").mkdir()
    lines = (f"{number} bottles on the wall\n" for number in range(200_000))
    (tmp_path / "corpus" / "book.txt").write_text("".join(lines))
    stage = begin(recipe(tmp_path / "corpus"), tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(StageFailed, match=f"cannot write under .*{os.strerror(errno.EFBIG)}"):
            STAGE.run(stage)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    left = {path.name for path in (stage.folder.work / "read").iterdir()}
    assert left <= {"00000.dropped.parquet"}, "no documents, nothing unfinished, and no marker"


def test_an_error_of_ours_is_told_with_its_part_and_its_trace(here, corpus, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(ingest, "read_file", None)
    with pytest.raises(StageFailed, match=r"part 0 of step 'read' failed: TypeError"):
        STAGE.run(begin(recipe(corpus), tmp_path / "run"))
    assert "Traceback" in caplog.text


def test_a_run_folder_that_cannot_be_written_fails_the_stage(here, corpus, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "ingest").write_text("a file where the folder belongs")
    run = Run(tmp_path / "run")
    stage = StageRun(recipe(corpus), run, run.stage("ingest"), logging.getLogger("test"), lambda numbers: None)
    with pytest.raises(StageFailed, match="cannot write under"):
        STAGE.run(stage)


# What the driver asks of it


def test_check_names_every_source_that_cannot_be_found_and_demand_still_answers(tmp_path):
    missing = Source(name="gone", path=str(tmp_path / "gone"), licence="MIT")
    absent = Source(name="absent", path="package:no_such_package/x", licence="MIT")
    asked = recipe(sources=(missing, absent))
    assert [problem.what.split(":")[0] for problem in STAGE.check(asked)] == ["source 'gone'", "source 'absent'"]
    assert STAGE.demand(asked).disk_bytes == 0


def test_a_source_must_say_under_what_licence_it_is(corpus):
    [problem] = STAGE.check(recipe(sources=(Source(name="mine", path=str(corpus)),)))
    assert problem.what == f"source 'mine' ({corpus}) declares no licence"
    assert "'unknown'" in problem.remedy
    assert STAGE.check(recipe(sources=(Source(name="mine", path=str(corpus), licence_column="terms"),))) == []
    [problem] = STAGE.check(
        recipe(folder_licence=None).model_copy(
            update={"ingest": recipe().ingest.model_copy(update={"folder": str(corpus)})}
        )
    )
    assert "ingest.folder_licence" in problem.remedy


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
    sizes = [
        [unit.files[0].size for unit in group.units] for group in ingest._groups([(first, files), (second, files[:1])])
    ]
    assert sizes == [[0, 4, 5], [6], [30], [1], [0]]


def test_a_repository_is_parted_only_where_it_is_larger_than_a_group(monkeypatch):
    files = [SourceFile(Path(f"/nowhere/r/{n}.py"), f"file:r/{n}.py", 9) for n in range(3)]
    source = Source(name="code", kind="code", path=".")
    [group] = ingest._groups([(source, files)])
    [unit] = group.units
    assert group.code
    assert ingest._unit(ingest._plain(unit)) == unit == Repository(unit.url, unit.folders, tuple(files))
    monkeypatch.setattr(ingest, "SMALLEST_GROUP_BYTES", 20)
    parted = [unit for group in ingest._groups([(source, files)]) for unit in group.units]
    assert [[file.url for file in unit.files] for unit in parted] == [["file:r/0.py", "file:r/1.py"], ["file:r/2.py"]]
    assert {unit.url for unit in parted} == {unit.url}


def test_what_is_dropped_is_masked_and_kept(here, tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.txt").write_text("jane.roe@roe-and-sons.com")
    (tmp_path / "corpus" / "b.txt").write_text(PROSE)
    stage = begin(recipe(tmp_path / "corpus"), tmp_path / "run")
    STAGE.run(stage)
    [dropped] = rows(stage, "dropped")
    assert (dropped["reason"], "jane" in dropped["text"]) == ("too short", False)


def test_without_exact_matches_copies_are_near_duplicates_and_told_as_what_they_are(here, corpus, tmp_path):
    settings = recipe().ingest.deduplicate.model_copy(update={"exact": False})
    stage = begin(recipe(corpus, deduplicate=settings), tmp_path / "run")
    assert STAGE.run(stage).metrics["dropped"]["duplicate"] == 1
