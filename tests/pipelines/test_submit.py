from __future__ import annotations

from pathlib import Path

import pytest

import pipelines.submit
from cluster.errors import BadInput, PreflightRefused
from cluster.jobs import Attempt
from cluster.preflight import Place
from cluster.runs import Run
from pipelines.recipe import load_recipe
from pipelines.run import Journey
from pipelines.submit import packed, stage_label, submit
from tests.commands import CHECKOUT


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


def sent(root: Path) -> set[str]:
    """Every file that a job takes along."""
    with packed(journey(root)) as folder:
        assert load_recipe(str(folder / "recipe.yaml")) == load_recipe("micro")
        return {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()}


def test_what_travels_is_all_of_the_code_and_the_resolved_recipe(tmp_path):
    found = {
        str(path.relative_to(CHECKOUT))
        for room in ("cluster", "llm", "pipelines", "serve")
        for path in (CHECKOUT / room).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert sent(tmp_path) == {*found, "recipe.yaml"}


# What people leave in a checkout, and none of which may go to a cluster.
LEFT = (
    ".env",
    ".git/config",
    "secrets.json",
    "data/books.parquet",
    "runs/tiny/pretrain/model/model.safetensors",
    "tests/test_all.py",
    "llm/.env",
    "llm/id_rsa",
    "llm/token.pem",
    "llm/books.txt",
    "llm/notes.ipynb",
    "llm/.ipynb_checkpoints/model.py",
    "llm/__pycache__/model.cpython-311.pyc",
    "pipelines/wandb.yaml",
    "pipelines/recipes/.mine.yaml",
    "pipelines/data/part-0.jsonl",
    "serve/.venv/lib/other.py",
    "serve/keys.db",
)


def test_nothing_else_of_the_checkout_travels(tmp_path, monkeypatch):
    checkout, elsewhere = tmp_path / "checkout", tmp_path / "elsewhere"
    code = ("cluster/__init__.py", "llm/model.py", "pipelines/recipes/mine.yaml", "serve/pages/chat.html")
    for name in (*code, *LEFT):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text(name)
    elsewhere.mkdir()
    (elsewhere / "secret.py").write_text("")
    (checkout / "llm" / "linked").symlink_to(elsewhere)
    (checkout / "llm" / "secret.py").symlink_to(elsewhere / "secret.py")
    monkeypatch.setattr(pipelines.submit, "CHECKOUT", checkout)
    assert sent(tmp_path) == {*code, "recipe.yaml"}


def test_a_file_too_large_to_be_code_is_named(tmp_path, monkeypatch):
    (tmp_path / "llm").mkdir()
    (tmp_path / "llm" / "table.py").write_bytes(b"#" * 2_000_000)
    monkeypatch.setattr(pipelines.submit, "CHECKOUT", tmp_path)
    with pytest.raises(BadInput, match=r"llm/table\.py has 2\.0 MB"):
        sent(tmp_path)


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
