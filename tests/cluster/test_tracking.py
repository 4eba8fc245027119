"""W&B beside a stage: kept under one id, and never in the way."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import pytest
import wandb
from wandb.proto import wandb_internal_pb2

from cluster import mirror
from cluster.runs import Run, read_json
from cluster.tracking import Tracker


@pytest.fixture
def folder(tmp_path):
    stage = Run(tmp_path / "run").stage("pretrain")
    stage.path.mkdir(parents=True)
    return stage


def attempt(folder, steps) -> None:
    """One attempt at a stage, which takes those steps."""
    tracker = Tracker(Run(folder.path.parent), folder, "test", {"a": 1})
    for step in steps:
        tracker.log({"step": step, "loss": 1.0 / (step + 1)})
    tracker.finish({"final": 1})
    wandb.teardown()  # as at the end of the process


def test_after_a_restart_the_same_run_goes_on_offline_too(folder, monkeypatch):
    """Its lines carry the steps' own numbers, so that `wandb sync` of both attempts puts each where it belongs."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    attempt(folder, range(0, 4))
    attempt(folder, range(2, 6))  # from the checkpoint on
    kept = read_json(folder.path / "wandb.json")["id"]
    logs = sorted((folder.path.parent / "wandb").glob(f"offline-run-*-{kept}*/run-{kept}.wandb"))
    runs = [next(record.run for record in records(log) if record.HasField("run")) for log in logs]
    assert [(run.run_id, run.project, run.run_group) for run in runs] == [(kept, "test", "run")] * 2
    assert [history(log) for log in logs] == [
        [(step, step, 1.0 / (step + 1)) for step in range(0, 4)],
        [(step, step, 1.0 / (step + 1)) for step in range(2, 6)],
    ]


def test_with_a_key_the_same_run_is_resumed_on_the_server(folder, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "not-a-real-key")
    asked = []
    monkeypatch.setattr(wandb, "init", lambda **settings: asked.append(settings) or Mock(dir=str(folder.path)))
    attempt(folder, range(4))
    attempt(folder, range(2, 6))
    kept = read_json(folder.path / "wandb.json")["id"]
    assert [(one["id"], one["resume"], one["mode"]) for one in asked] == [(kept, "allow", "online")] * 2


def test_to_object_storage_goes_the_whole_log(folder, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setattr(mirror, "key_of", lambda path: f"bucket{path}")
    sent = []
    monkeypatch.setattr(mirror, "send", lambda path: sent.extend(map(history, path.glob("run-*.wandb"))))
    for number in range(2):  # the log is whole only some milliseconds after `finish`, mostly
        run = Run(folder.path.parent / str(number))
        monkeypatch.setattr("cluster.tracking._kept_id", lambda folder, number=number: f"id{number}")
        run.path.mkdir()
        tracker = Tracker(run, folder, "test", {})
        tracker.log({"step": 7, "loss": 0.5})
        tracker.finish({})
    assert sent == [[(7, 7, 0.5)]] * 2


def test_another_stage_is_another_run(folder, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    other = Run(folder.path.parent).stage("sft")
    other.path.mkdir()
    attempt(folder, [0])
    attempt(other, [0])
    assert read_json(folder.path / "wandb.json") != read_json(other.path / "wandb.json")


def history(log: Path) -> list[tuple[int, int, float]]:
    """W&B's own number, step and loss of each line that it has kept."""
    lines = [record.history.item for record in records(log) if record.HasField("history")]
    values = [{".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in line} for line in lines]
    return [(line["_step"], line["step"], line["loss"]) for line in values if "loss" in line]


def records(log: Path) -> Iterator[wandb_internal_pb2.Record]:
    """What a W&B log holds: a header of 7 bytes, then LevelDB's log format, in blocks of 32 KiB."""
    data, at, parts = log.read_bytes(), 7, b""
    while at < len(data):
        if 32_768 - at % 32_768 < 7:  # too little for a header: padding
            at += 32_768 - at % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(parts)
            parts = b""


def test_tables_are_kept_with_all_their_rows(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    tracker = Tracker(Run(tmp_path / "run"), folder, "test", {})
    tracker.tables(
        {"filters": [{"reason": "too short", "documents": 3}, {"reason": "binary", "documents": 1}], "none": []}
    )
    tracker.finish({})
    [kept] = (tmp_path / "run" / "wandb").rglob("filters*.table.json")
    assert json.loads(kept.read_text())["data"] == [["too short", 3], ["binary", 1]]


def test_a_failing_tracker_is_said_once_and_stops_nothing(folder, tmp_path, monkeypatch, caplog):
    def fail(**settings):
        raise OSError("no network")

    monkeypatch.setattr(wandb, "init", fail)
    tracker = Tracker(Run(tmp_path / "run"), folder, "test", {})
    tracker.log({"step": 0})
    tracker.finish({})
    assert caplog.text.count("W&B is left out") == 1


def test_switched_off_it_writes_nothing(folder, tmp_path):
    tracker = Tracker(Run(tmp_path / "run"), folder, None, {})
    tracker.log({"step": 0})
    tracker.finish({})
    assert list(folder.path.iterdir()) == []
