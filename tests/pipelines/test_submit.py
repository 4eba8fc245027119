from __future__ import annotations

from pathlib import Path

import pytest

from cluster.errors import PreflightRefused
from cluster.jobs import Attempt
from cluster.preflight import Place
from cluster.runs import Run
from pipelines.recipe import load_recipe
from pipelines.run import Journey
from pipelines.submit import packed, stage_label, submit


def journey(root: Path, first: str = "ingest", last: str = "evaluate") -> Journey:
    return Journey(load_recipe("micro"), Run(root / "micro"), first, last)


class FakeJobs:
    """What `submit` asks of a cluster's jobs."""

    address = "http://head:8265"

    def __init__(self, attempts=(), cpus: tuple[float, ...] = (2.0,)):
        self.known, self.cpus, self.submitted = list(attempts), cpus, []

    def attempts(self, run):
        return self.known

    def places(self):
        return [Place(f"10.0.0.{at}", {"CPU": cpus}) for at, cpus in enumerate(self.cpus)]

    def submit(self, attempt, words, folder):
        self.submitted.append((attempt.id, words, sorted(path.name for path in folder.iterdir())))


@pytest.mark.parametrize(
    ("first", "last", "label"),
    [("ingest", "evaluate", "all"), ("sft", "sft", "sft"), ("sft", "rlhf", "sft_rlhf")],
)
def test_the_label_says_what_an_attempt_covers(tmp_path, first, last, label):
    assert stage_label(journey(tmp_path, first, last)) == label


def test_what_travels_is_the_code_and_the_resolved_recipe(tmp_path):
    (tmp_path / "micro").mkdir()
    with packed(journey(tmp_path)) as folder:
        assert sorted(path.name for path in folder.iterdir()) == [
            "cluster",
            "llm",
            "pipelines",
            "recipe.yaml",
            "serve",
        ]
        assert load_recipe(str(folder / "recipe.yaml")) == load_recipe("micro")
        assert {path.suffix for path in folder.rglob("*") if path.is_file()} == {".py", ".yaml"}


def test_an_attempt_is_submitted_with_the_next_number(tmp_path):
    jobs = FakeJobs([Attempt("micro", "all", 4, "FAILED")])
    submit(journey(tmp_path), jobs, wait=False)
    [(attempt_id, words, _)] = jobs.submitted
    assert attempt_id == "micro-all-5"
    assert words[:5] == ["python", "-m", "pipelines", "run", "recipe.yaml"]
    assert words[words.index("--runs") + 1] == str(tmp_path)


def test_a_running_attempt_is_attached_to(tmp_path, capsys):
    jobs = FakeJobs([Attempt("micro", "all", 1, "RUNNING")])
    submit(journey(tmp_path), jobs, wait=False)
    assert not jobs.submitted
    assert "micro-all-1 is running: attached" in capsys.readouterr().err


def test_a_run_that_another_attempt_works_on_is_refused(tmp_path):
    jobs = FakeJobs([Attempt("micro", "pretrain", 1, "PENDING")])
    with pytest.raises(PreflightRefused, match="micro-pretrain-1 is working on the run"):
        submit(journey(tmp_path), jobs, wait=False)


def test_what_does_not_fit_is_refused_by_name_before_anything_is_sent(tmp_path):
    jobs = FakeJobs(cpus=(1.0,))
    with pytest.raises(PreflightRefused, match=r"pretrain needs .* CPUs at once.* Ray has 1"):
        submit(journey(tmp_path), jobs, wait=False)
    assert not jobs.submitted


def test_what_fits_in_sum_and_on_no_node_is_refused_before_anything_is_sent(tmp_path):
    """Ray would wait for such a node without end."""
    jobs = FakeJobs(cpus=(0.5,) * 8)
    with pytest.raises(PreflightRefused, match=r"each worker of pretrain needs .* on one node, the largest node \(10"):
        submit(journey(tmp_path), jobs, wait=False)
    assert not jobs.submitted
