"""Folders, files that grow, claims and errors, against a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cluster import claims, doctor, mirror, objects, segments
from cluster.errors import BadInput, PreflightRefused, StageFailed
from cluster.runs import Run, ask_to_stop, find_run, hash_folder, read_json, runs_root, stop_is_asked
from llm import checkpoint
from llm.zero import Fragment
from pipelines import checkpoints, records, starts
from pipelines.starts import Begun
from tests.commands import CHECKOUT, headwater, wait_until
from tests.s3 import BUCKET, Storage, storage

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with storage(tmp_path_factory.mktemp("s3") / "server") as made:
        yield made


@pytest.fixture
def bucket(server: Storage, tmp_path, monkeypatch):
    """The server, and a cache of this test's own."""
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HEADWATER_STORAGE_WAIT_S", "20")
    mirror.forget()
    yield server
    server.proxy.open = True
    server.proxy.bytes_per_s = server.proxy.cut_after = server.proxy.slow_down = 0
    server.proxy.cut = server.proxy.told = 0


@pytest.fixture
def run(bucket, request) -> Run:
    return Run(runs_root(f"s3://{BUCKET}/runs") / request.node.name.split("[")[0])


def another_machine() -> None:
    """Forget what this machine has."""
    shutil.rmtree(mirror.cache(), ignore_errors=True)
    mirror.forget()


# Names


@pytest.mark.parametrize("url", ["s3://", "s3:///runs", "gs://bucket/runs", "s3://bucket/../runs", "http://x/y"])
def test_an_address_of_nothing_is_refused(url):
    with pytest.raises(BadInput, match="s3://BUCKET/PREFIX"):
        runs_root(url)


def test_an_address_has_a_place_in_the_cache_and_back(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    path = mirror.local("s3://bucket/a/b/")
    assert path == tmp_path / "s3/bucket/a/b"
    assert (mirror.shown(path), mirror.key_of(path)) == ("s3://bucket/a/b", "bucket/a/b")
    assert mirror.key_of(tmp_path / "elsewhere") is None


# Artefacts


def fill(run: Run, text: str) -> None:
    with run.stage("sft").artefact("model") as folder:
        (folder / "inside").mkdir()
        (folder / "inside" / "weights").write_text(text)
        (folder / "config").write_text("{}")


def test_an_artefact_is_whole_on_another_machine(run):
    fill(run, "first")
    there = hash_folder(run.stage("sft").path / "model")
    another_machine()
    assert (mirror.here(run.stage("sft").path / "model") / "inside/weights").read_text() == "first"
    assert hash_folder(run.stage("sft").path / "model") == there
    assert sorted(there) == ["config", "inside/weights"]


def test_of_a_part_of_an_artefact_no_more_is_fetched(run):
    fill(run, "first")
    another_machine()
    part = mirror.here(run.stage("sft").path / "model" / "inside")
    assert [path.name for path in part.parent.rglob("*") if path.is_file()] == ["weights"]


def test_an_artefact_that_replaces_another_leaves_no_trace_of_it(run, bucket):
    fill(run, "first")
    fill(run, "second")
    another_machine()
    assert (mirror.here(run.stage("sft").path / "model") / "inside/weights").read_text() == "second"
    names = {name.split("/")[-2] for name in bucket.names(f"runs/{run.name}") if name.endswith("config")}
    assert len(names) == 1


def test_an_artefact_that_fails_leaves_the_one_before(run):
    fill(run, "first")
    with pytest.raises(ZeroDivisionError), run.stage("sft").artefact("model") as folder:
        (folder / "config").write_text("{")
        mirror.send(folder / "config")
        raise ZeroDivisionError
    another_machine()
    assert mirror.files(run.stage("sft").path / "model") == ["config", "inside/weights"]


def test_what_another_machine_wrote_is_part_of_the_artefact(run):
    with run.stage("shards").artefact("tokens") as folder:
        (folder / "a").write_text("here")
        objects.put(f"{mirror.key_of(folder)}/train/b", b"there")
    another_machine()
    found = mirror.here(run.stage("shards").path / "tokens")
    assert ((found / "a").read_text(), (found / "train/b").read_text()) == ("here", "there")


def test_a_file_that_was_altered_is_named(run):
    fill(run, "first")
    pointer = read_json(run.stage("sft").path / "model.json")
    objects.put(f"{mirror.key_of(run.stage('sft').path)}/{pointer['folder']}/inside/weights", b"other")
    another_machine()
    with pytest.raises(StageFailed, match="weights is not what was written there"):
        mirror.here(run.stage("sft").path / "model")


@pytest.mark.parametrize("outside", ["../../../../../../outside", "{machine}/outside"])
def test_a_name_that_leads_out_of_its_folder_is_refused(run, tmp_path, outside):
    """Whoever may write to the bucket could otherwise write anywhere on every machine."""
    fill(run, "first")
    key = f"{mirror.key_of(run.stage('sft').path)}/model.json"
    pointer = json.loads(objects.get(key))
    pointer["files"] = {outside.format(machine=tmp_path): [1, "0" * 64]}
    objects.put(key, json.dumps(pointer).encode())
    another_machine()
    with pytest.raises(StageFailed, match="leads out of its folder"):
        mirror.here(run.stage("sft").path / "model")
    assert not list(tmp_path.rglob("outside"))


def test_what_a_killed_command_left_is_swept(run, bucket):
    stage = run.stage("sft")
    stage.begin("key")
    fill(run, "first")
    lost = mirror.new_folder(stage.path / "tokens")
    (lost / "half").write_text("x")
    mirror.send(lost)
    stage.begin("key")
    assert not [name for name in bucket.names(f"runs/{run.name}") if "half" in name]
    assert stage.has("model")


def test_other_settings_put_a_stage_aside_and_take_it_back(run):
    stage = run.stage("sft")
    stage.begin("a" * 64)
    fill(run, "first")
    stage.finish({"key": "a"})
    stage.begin("b" * 64)
    assert (stage.has("model"), stage.done()) == (False, None)
    fill(run, "second")
    another_machine()
    stage.begin("a" * 64)
    assert (mirror.here(stage.path / "model") / "inside/weights").read_text() == "first"
    assert stage.done() == {"key": "a"}


def test_a_cache_that_another_user_made_is_refused(monkeypatch, tmp_path):
    monkeypatch.setattr(mirror, "_default_cache", lambda: tmp_path)
    monkeypatch.delenv("HEADWATER_CACHE", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 12345)
    with pytest.raises(StageFailed, match="belongs to another user"):
        mirror.local("s3://bucket/runs")


def test_a_run_is_found_by_name_and_address(run):
    Path(run.path).mkdir(parents=True)
    from cluster.runs import write_json

    write_json(run.lineage, {"schema_version": 1})
    another_machine()
    assert find_run(run.name, run.path.parent) == find_run(mirror.shown(run.path), Path("elsewhere")) == run
    with pytest.raises(BadInput, match=f"runs there: .*{run.name}"):
        find_run("nobody", run.path.parent)


def test_a_stop_is_seen_on_another_machine(run, monkeypatch):
    run.stage("sft").begin("key")
    ask_to_stop(run.stage("sft").path)
    another_machine()
    assert stop_is_asked(run.stage("sft").path)
    run.stage("sft").begin("key")
    monkeypatch.setattr("cluster.runs.STOP_LOOKED_FOR_EVERY_S", 0.0)
    assert not stop_is_asked(run.stage("sft").path)


def test_a_file_that_another_machine_replaced_is_fetched_again(run):
    part = run.stage("rank").path / "answers" / "part-0"
    part.parent.mkdir(parents=True)
    part.write_text("ours")
    mirror.send(part)
    assert mirror.fetch(part).read_text() == "ours"
    time.sleep(1.1)  # the storage's clock has whole seconds
    objects.put(str(mirror.key_of(part)), b"them")
    assert mirror.fetch(part).read_text() == "them"


def test_a_move_that_was_cut_off_is_no_stage_that_is_done(run, monkeypatch):
    stage = run.stage("sft")
    stage.begin("a" * 64)
    fill(run, "first")
    stage.finish({"key": "a"})
    copy = objects.copy

    def fail(source: str, target: str) -> None:
        if source.endswith("weights"):
            raise StageFailed("killed here")
        copy(source, target)

    monkeypatch.setattr(objects, "copy", fail)
    with pytest.raises(StageFailed, match="killed here"):
        stage.begin("b" * 64)
    monkeypatch.setattr(objects, "copy", copy)
    another_machine()
    assert not mirror.exists(stage.path.parent / ".previous/sft-aaaaaaaaaaaa/done.json")
    stage.begin("a" * 64)
    assert stage.done() == {"key": "a"}
    stage.begin("b" * 64)
    stage.begin("a" * 64)
    assert (mirror.here(stage.path / "model") / "inside/weights").read_text() == "first"


# Checkpoints


def save(folder: Path, step: int, value: float, flush=lambda: None) -> str:
    """A checkpoint of one rank; its name."""
    tensor = torch.full((4,), value)
    kept_in = checkpoints.store(folder, f"{step:08x}", flush)
    checkpoint.save(
        folder,
        step,
        rank=0,
        world=1,
        fragments=[Fragment("weight", 0, {"weight": tensor})],
        save_model=lambda path: (path.mkdir(), (path / "config.json").write_text(f"{value}")),
        gather=lambda mine: [mine],
        facts={},
        store=kept_in,
    )
    return kept_in.name(step)


def test_a_checkpoint_is_restored_on_another_machine(run):
    folder = run.stage("pretrain").path / "checkpoints"
    save(folder, 5, 1.0)
    newer = save(folder, 10, 2.0)
    another_machine()
    found = checkpoints.newest(folder)
    restored = torch.zeros(4)
    checkpoint.restore_state(found, [Fragment("weight", 0, {"weight": restored})])
    assert (found.step, found.path.name, restored.tolist()) == (10, newer, [2.0] * 4)


@pytest.mark.parametrize("damage", ["altered", "missing", "no manifest"])
def test_the_newest_checkpoint_if_damaged_is_named_and_the_one_before_used(run, caplog, damage):
    folder = run.stage("pretrain").path / "checkpoints"
    save(folder, 5, 1.0)
    key = f"{mirror.key_of(folder)}/{save(folder, 10, 2.0)}"
    if damage == "altered":
        objects.put(f"{key}/model/config.json", b"3.0")
    else:
        objects.delete(f"{key}/manifest.json" if damage == "no manifest" else f"{key}/model/config.json")
    another_machine()
    assert checkpoints.newest(folder).step == 5
    assert damage == "no manifest" or "model/config.json" in caplog.text
    checkpoints.prune(folder, newest=1, best=0)
    assert checkpoints.newest(folder).step == 5, "pruning doesn't count what is damaged"


def test_a_damaged_copy_of_a_sound_checkpoint_is_fetched_again(run):
    folder = run.stage("pretrain").path / "checkpoints"
    save(folder, 5, 1.0)
    found = checkpoints.newest(folder)
    stat = (found.model / "config.json").stat()
    (found.model / "config.json").write_text("3.0")
    os.utime(found.model / "config.json", ns=(stat.st_mtime_ns, stat.st_mtime_ns))
    assert (checkpoints.newest(folder).model / "config.json").read_text() == "1.0"


def test_a_worker_that_was_given_up_publishes_nothing(run):
    folder = run.stage("pretrain").path
    folder.mkdir(parents=True)
    with pytest.raises(StageFailed, match="another worker writes"), records.followed(folder, 0) as flush:
        records.append(folder / "metrics.jsonl", {"step": 0})
        save(folder / "checkpoints", 1, 1.0, flush)
        with records.followed(folder, 1):
            pass
        save(folder / "checkpoints", 2, 2.0, flush)
    assert checkpoints.newest(folder / "checkpoints").step == 1
    assert records.read_lines(folder / "metrics.jsonl") == [{"step": 0}]


def test_what_an_earlier_start_publishes_late_counts_no_more(run):
    """Its records up to there were cut back: a ledger that went on from it would have a gap."""
    stage = run.stage("pretrain").path
    folder = stage / "checkpoints"
    stage.mkdir(parents=True)
    older = save(folder, 5, 1.0)
    with records.followed(stage, 0):
        for step in range(10):
            records.append(stage / "ledger.jsonl", {"step": step, "rows": [step]})
    starts.begin(folder, Begun("anew", 5, older))  # by a start that found step 5 to be the newest,
    with records.followed(stage, 5):  # took the records over, and died
        save(folder, 10, 2.0)  # what the earlier one, whose records were safe, had begun to send
    another_machine()
    assert checkpoints.newest(folder).step == len(records.read_lines(stage / "ledger.jsonl")) == 5
    checkpoints.prune(folder, newest=1, best=0)
    assert checkpoints.newest(folder).step == 5, "it takes no sound one's place"
    starts.begin(folder, Begun(f"{15:08x}", 5, older))
    save(folder, 15, 3.0)
    assert checkpoints.newest(folder).step == 15, "those of the last start count"


# Files that grow


def add(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as handle:
        handle.write(text)


def test_a_file_that_grows_is_read_whole_after_several_writers(run):
    log = run.stage("sft").logs / "driver.log"
    for word in ("one ", "two "):
        another_machine()
        log.parent.mkdir(parents=True)
        with segments.growing(log) as flush:
            add(log, word)
            flush()
            add(log, word)
    assert segments.read(log) == b"one one two two "


def test_what_a_file_held_before_is_not_sent_twice(run):
    log = run.stage("sft").logs / "driver.log"
    for word in ("one ", "two "):
        log.parent.mkdir(parents=True, exist_ok=True)
        with segments.growing(log):
            add(log, word)
    assert segments.read(log) == b"one two "


def test_many_pieces_are_made_one_again(run, monkeypatch, bucket):
    monkeypatch.setattr(segments, "MANY_PIECES", 5)
    path = run.stage("sft").path / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    with segments.growing(path, base=True) as flush:
        for number in range(20):
            add(path, f"{number}\n")
            flush()
    assert segments.read(path) == b"".join(b"%d\n" % number for number in range(20))
    assert len(bucket.names(f"runs/{run.name}/sft/metrics.jsonl")) <= 7


def test_a_base_replaces_what_came_before_it(run):
    path = run.stage("sft").path / "metrics.jsonl"
    add(path, "1\n2\n3\n")
    with segments.growing(path, base=True):
        add(path, "4\n")
    follower = segments.Follower(path)
    assert follower.new() == (True, b"1\n2\n3\n4\n")
    path.write_text("1\n2\n")
    with segments.growing(path, base=True) as flush:
        add(path, "3\n")
        flush()
        follower._looked = -9.0
        assert follower.new() == (True, b"1\n2\n3\n")
        add(path, "5\n")
        flush()
        follower._looked = -9.0
        assert follower.new() == (False, b"5\n")
    assert segments.read(path) == b"1\n2\n3\n5\n"


# Claims


def test_a_run_is_held_by_one_command_at_a_time(run, monkeypatch):
    monkeypatch.setattr(claims, "RENEW_S", 0.5)
    with run.locked():
        assert run.is_held()
        with pytest.raises(PreflightRefused, match=f"process {os.getpid()} on .* is working on s3://"):
            with claims.claimed(run.path):
                pass
    assert not run.is_held()


def test_the_claim_of_a_killed_command_is_taken_over_at_once_on_its_machine(run, monkeypatch):
    words = "import sys, time; from pathlib import Path; from cluster import claims\n"
    words += "with claims.claimed(Path(sys.argv[1])): print('held', flush=True); time.sleep(600)"
    with subprocess.Popen([sys.executable, "-c", words, run.path], cwd=CHECKOUT, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout.readline() == b"held\n"
        finally:
            process.kill()
    told: list[str] = []
    monkeypatch.setattr(claims, "console", SimpleNamespace(print=told.append))
    with claims.claimed(run.path):
        assert told == [], "it says so where it waits"


def test_the_claim_of_a_lost_machine_is_taken_over_when_it_was_silent_for_long(run, monkeypatch):
    monkeypatch.setattr(claims, "LEASE_S", 3.0)
    objects.put(f"{mirror.key_of(run.path)}/.claims/lost", b'{"host": "gone", "pid": 1, "boot": "another"}')
    begun = time.monotonic()
    with claims.claimed(run.path):
        assert time.monotonic() - begun >= 3.0


# A bad network, a bad server, bad settings


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("AWS_ACCESS_KEY_ID", "nobody", "correct AWS_ACCESS_KEY_ID"),
        ("AWS_SECRET_ACCESS_KEY", "wrong", "correct AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_wrong_credentials_are_refused_at_once(run, monkeypatch, name, value, said):
    monkeypatch.setenv(name, value)
    with pytest.raises(PreflightRefused, match=said):
        run.check_access()


def test_a_bucket_that_is_not_there_is_refused_at_once(bucket):
    with pytest.raises(PreflightRefused, match=r"(?s)NO_SUCH_BUCKET.*make the bucket"):
        Run(runs_root("s3://no-such-bucket/runs") / "x").check_access()


def test_a_server_that_comes_back_is_waited_for(run, bucket):
    bucket.proxy.open = False
    again = threading.Timer(3.0, lambda: setattr(bucket.proxy, "open", True))
    again.start()
    try:
        begun = time.monotonic()
        objects.put(f"{mirror.key_of(run.path)}/x", b"there")
        assert time.monotonic() - begun > 2.5
    finally:
        again.join()
    assert objects.get(f"{mirror.key_of(run.path)}/x") == b"there"


def test_a_server_that_is_killed_and_started_again_is_waited_for(run, bucket, monkeypatch):
    monkeypatch.setenv("HEADWATER_STORAGE_WAIT_S", "60")
    fill(run, "first")
    another_machine()
    bucket.server.kill()
    again = threading.Timer(3.0, bucket.server.start)
    again.start()
    try:
        assert (mirror.here(run.stage("sft").path / "model") / "inside/weights").read_text() == "first"
    finally:
        again.join()


@pytest.mark.parametrize(
    ("root", "change", "said"),
    [
        (f"s3://{BUCKET}/runs", {"AWS_SECRET_ACCESS_KEY": "wrong"}, "correct AWS_SECRET_ACCESS_KEY"),
        ("s3://no-such-bucket/runs", {}, "make the bucket"),
    ],
)
def test_the_command_refuses_storage_that_refuses_it(bucket, monkeypatch, root, change, said):
    for name, value in change.items():
        monkeypatch.setenv(name, value)
    done = headwater("run", "micro", "--runs", root)
    assert (done.returncode, said in done.stderr) == (3, True), done.stderr


def test_a_server_that_stays_away_is_named(run, bucket, monkeypatch):
    monkeypatch.setenv("HEADWATER_STORAGE_WAIT_S", "3")
    bucket.proxy.open = False
    with pytest.raises(StageFailed, match=f"127.0.0.1:{bucket.proxy.port}.*for 3 s"):
        objects.put(f"{mirror.key_of(run.path)}/x", b"")


def test_a_server_that_is_too_busy_is_tried_again(run, bucket):
    bucket.proxy.slow_down = 3
    objects.put(f"{mirror.key_of(run.path)}/x", b"there")
    assert bucket.proxy.told >= 3
    assert objects.get(f"{mirror.key_of(run.path)}/x") == b"there"


def test_an_upload_that_is_cut_off_is_made_again_and_never_half_there(run, bucket):
    path = run.path / "large"
    path.parent.mkdir(parents=True)
    path.write_bytes(os.urandom(3 << 20))
    bucket.proxy.cut_after = 1
    sending = threading.Thread(target=mirror.send, args=(path,))
    sending.start()
    wait_until(lambda: bucket.proxy.cut, "the cut")
    assert objects.size(str(mirror.key_of(path))) in (None, 3 << 20)
    sending.join()
    assert objects.get(str(mirror.key_of(path))) == path.read_bytes()


def test_a_slow_network_costs_time_alone(run, bucket):
    path = run.path / "large"
    path.parent.mkdir(parents=True)
    path.write_bytes(os.urandom(1 << 20))
    bucket.proxy.bytes_per_s = 1 << 18
    begun = time.monotonic()
    mirror.send(path)
    assert time.monotonic() - begun > 2.0
    bucket.proxy.bytes_per_s = 0
    assert objects.get(str(mirror.key_of(path))) == path.read_bytes()


def test_the_doctor_finds_nothing_wrong_with_sound_storage(run):
    assert doctor.storage_problems(run.path) == {}
    assert mirror.names(run.path) == []
