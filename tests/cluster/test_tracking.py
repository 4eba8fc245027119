"""W&B beside a stage: kept under one id, and never in the way."""

import json

import pytest

from cluster.runs import Run, read_json
from cluster.tracking import Tracker


@pytest.fixture
def folder(tmp_path):
    stage = Run(tmp_path / "run").stage("pretrain")
    stage.path.mkdir(parents=True)
    return stage


def test_a_restart_keeps_the_id(folder, tmp_path, monkeypatch):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    for _ in range(2):
        tracker = Tracker(Run(tmp_path / "run"), folder, "test", {"a": 1})
        tracker.log({"step": 0, "loss": 1.0})
        tracker.finish({"final": 1})
    kept = read_json(folder.path / "wandb.json")["id"]
    offline = list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert offline
    # Two runs that begin in one second share a name but for a number at its end.
    assert all(f"-{kept}" in path.name for path in offline)


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
    import wandb

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
