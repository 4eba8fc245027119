"""What a pod does before it is stopped: the run is asked to save, and the pod waits for its own processes."""

from __future__ import annotations

import subprocess
import sys
from contextlib import contextmanager

import pytest

from cluster import leaving
from llm.files import write_json
from tests.commands import command, environment, headwater, records, started, wait_until

WORD = "a-worker-of-this-test"


@contextmanager
def process(seconds: float):
    """A process with WORD in its command line, which Linux shows a moment after the start."""
    code = f"import sys, time; time.sleep({seconds})  # {WORD}"
    with subprocess.Popen([sys.executable, "-c", code]) as started:
        try:
            wait_until(lambda: leaving.running_here(WORD), "the command line")
            yield started
        finally:
            started.kill()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run in which `ingest` is done and `pretrain` has begun."""
    for stage in ("ingest", "pretrain", "wandb"):
        (tmp_path / stage).mkdir()
    for stage in ("ingest", "pretrain"):
        write_json(tmp_path / stage / "state.json", {"key": "x"})
    write_json(tmp_path / "ingest" / "done.json", {"key": "x"})
    write_json(tmp_path / "lineage.json", {})
    monkeypatch.setenv("HEADWATER_RUN", str(tmp_path))
    return tmp_path


def stops(run) -> list[str]:
    return sorted(path.parent.name for path in run.glob("*/stop"))


def test_a_worker_that_goes_asks_the_running_stage_and_waits(run):
    with process(seconds=1.5) as waited_for:
        assert leaving.main([WORD, "--ask", "--for", "60"]) == 0
        assert waited_for.poll() is not None, "it has ended"
    assert stops(run) == ["pretrain"]


def test_a_pod_without_work_goes_at_once_and_stops_nothing(run):
    assert leaving.main([WORD, "--ask", "--for", "20"]) == 0
    assert stops(run) == []


def test_the_wait_ends(run):
    with process(seconds=600) as waited_for:
        assert leaving.main([WORD, "--for", "0.2"]) == 1
        assert waited_for.poll() is None, "it is still there"
    assert stops(run) == [], "nobody said --ask"


@pytest.mark.parametrize("where", ["", "/no/such/run"])
def test_a_run_that_can_not_be_asked_is_left_alone(where):
    assert leaving.ask_to_save(where) == []


@pytest.mark.slow
def test_a_spot_worker_that_goes_costs_no_step(before_pretrain):
    root, run = before_pretrain.parent, before_pretrain
    words = ("pretrain", "micro", "--runs", str(root))
    with started(*words) as driver:
        wait_until(lambda: len(records(run / "pretrain" / "metrics.jsonl")) > 4, "steps")
        hook = [*command()[:-1], "cluster.leaving", "RayTrainWorker", "--ask", "--for", "60"]
        variables = {**environment(), "HEADWATER_RUN": str(run)}
        assert subprocess.run(hook, env=variables, timeout=90).returncode == 0
        assert driver.wait(60) == 5
    stopped = records(run / "pretrain" / "metrics.jsonl")
    assert 4 < len(stopped) < 60, "asked in the middle"
    assert headwater(*words).returncode == 0
    steps = [record["step"] for record in records(run / "pretrain" / "metrics.jsonl")]
    assert steps == list(range(60)), "nothing made twice, nothing left out"
