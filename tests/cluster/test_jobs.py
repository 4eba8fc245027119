from __future__ import annotations

from types import SimpleNamespace

import pytest

from cluster.errors import BadInput, PreflightRefused, StageFailed
from cluster.jobs import Attempt, Jobs, cluster_address, next_number


def job(submission_id: str | None, status: str = "RUNNING") -> SimpleNamespace:
    empty = dict.fromkeys(("driver_exit_code", "message", "start_time", "end_time", "driver_node_id"))
    return SimpleNamespace(submission_id=submission_id, status=status, **empty)


@pytest.mark.parametrize(
    ("submission_id", "parts"),
    [
        ("tiny-all-1", ("tiny", "all", 1)),
        ("my-run.2-pretrain-12", ("my-run.2", "pretrain", 12)),
        ("tiny-sft_rlhf-3", ("tiny", "sft_rlhf", 3)),
    ],
)
def test_an_attempt_is_found_again_by_its_submission_id(submission_id, parts):
    found = Attempt.of(job(submission_id))
    assert (found.run, found.stage, found.number) == parts
    assert found.id == submission_id


@pytest.mark.parametrize("submission_id", [None, "raysubmit_Xe7cvjyGJCyuCvm2", "tiny-all"])
def test_jobs_of_others_are_no_attempts(submission_id):
    assert Attempt.of(job(submission_id)) is None


def test_the_next_number_follows_what_the_cluster_and_the_run_folder_remember(tmp_path):
    known = [Attempt("tiny", "all", 2, "FAILED")]
    assert next_number([], tmp_path) == 1
    assert next_number(known, tmp_path) == 3
    (tmp_path / "tiny-all-7.log").write_text("a cluster that is gone made this")
    (tmp_path / "job-20260101-000000.log").write_text("submitted by hand")
    assert next_number(known, tmp_path) == 8


def test_the_address_comes_from_the_flag_or_the_environment(monkeypatch):
    for name in ("RAY_API_SERVER_ADDRESS", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(BadInput, match="no cluster named"):
        cluster_address(None)
    monkeypatch.setenv("RAY_ADDRESS", "http://head:8265/")
    assert cluster_address(None) == "http://head:8265"
    assert cluster_address("https://other:1") == "https://other:1"
    with pytest.raises(BadInput, match="ray://head:10001"):
        cluster_address("ray://head:10001")


def test_a_cluster_that_does_not_answer_is_refused_by_name():
    with pytest.raises(PreflightRefused, match=r"127\.0\.0\.1:9"):
        Jobs("http://127.0.0.1:9")


class Interrupted:
    """A Jobs API whose connection breaks in the middle of the output, once."""

    def __init__(self):
        self.tails = 0

    def list_jobs(self):
        return [job("tiny-all-1", "RUNNING" if self.tails == 0 else "SUCCEEDED")]

    async def tail_job_logs(self, attempt_id):
        self.tails += 1
        yield "one\ntw"
        if self.tails == 1:
            raise RuntimeError("the connection was closed")
        yield "o\nthree\n"


def followed(client) -> tuple[list[str], Attempt]:
    jobs = object.__new__(Jobs)
    jobs.address, jobs._client = "http://head:8265", client
    said: list[str] = []
    return said, jobs.follow("tiny-all-1", said.append)


def test_output_is_told_once_although_the_connection_broke():
    said, ended = followed(Interrupted())
    assert "".join(said) == "one\ntwo\nthree\n"
    assert ended.status == "SUCCEEDED"


def test_a_job_that_a_new_head_knows_nothing_of_is_said_to_be_forgotten():
    with pytest.raises(StageFailed, match="no longer knows tiny-all-1"):
        followed(SimpleNamespace(list_jobs=list))


@pytest.mark.parametrize(("status", "seen_as"), [("RUNNING", "FAILED"), ("SUCCEEDED", "SUCCEEDED")])
def test_an_attempt_whose_node_is_gone_is_not_live(monkeypatch, status, seen_as):
    """Ray calls it RUNNING for ever, where a new head found in Redis what the one before it knew."""
    jobs = object.__new__(Jobs)
    here, gone = job("tiny-all-2", "RUNNING"), job("tiny-all-1", status)
    here.driver_node_id, gone.driver_node_id = "here", "gone"
    jobs._client = SimpleNamespace(list_jobs=lambda: [here, gone])
    monkeypatch.setattr(jobs, "_live_nodes", lambda: [{"node_id": "here"}])
    lost, live = jobs.attempts("tiny")
    assert (lost.status, lost.live, live.live) == (seen_as, False, True)
