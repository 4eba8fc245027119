from __future__ import annotations

import json

import pytest

from cluster.errors import BadInput
from cluster.runs import Run
from pipelines.control import log_file, show_logs, show_status, stage_states, stop


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run(tmp_path / "mine")
    for name in ("ingest", "pretrain"):
        made.stage(name).begin("key")
    made.lineage.write_text('{"schema_version": 1}')
    made.stage("ingest").finish({"key": "key"})
    (made.stage("pretrain").path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}\n')
    (made.stage("pretrain").logs / "rank-1.log").write_text("one\ntwo\nthree\n")
    return made


def test_stages_are_done_running_or_cut_off(run):
    assert [(one["stage"], one["state"], one["step"]) for one in stage_states(run)] == [
        ("ingest", "done", None),
        ("pretrain", "cut off", 2),
    ]
    with run.locked():
        assert stage_states(run)[1]["state"] == "running"


def test_status_for_programs(run, capsys):
    show_status(run, [], as_json=True)
    assert [one["state"] for one in json.loads(capsys.readouterr().out)["stages"]] == ["done", "cut off"]


def test_the_end_of_a_ranks_log(run, capsys):
    show_logs(run, "pretrain", rank=1, lines=2, follow=False)
    assert capsys.readouterr().out == "two\nthree\n"


def test_the_last_attempts_output_comes_first_to_hand(run):
    run.jobs.mkdir()
    (run.jobs / "mine-all-1.log").write_text("said")
    assert log_file(run, None, None).name == "mine-all-1.log"


def test_a_log_that_is_not_there_names_those_that_are(run):
    with pytest.raises(BadInput, match=r"pretrain/rank-1\.log"):
        log_file(run, "pretrain", 7)


def test_a_run_that_nobody_works_on_cannot_be_stopped(run):
    with pytest.raises(BadInput, match="nothing works on"):
        stop("mine", run.path.parent, None)
