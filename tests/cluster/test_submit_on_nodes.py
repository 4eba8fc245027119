"""Jobs on a real head and two workers with token authentication: submitted, attached to, stopped, resumed."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pipelines.records import read_lines
from tests.commands import CHECKOUT, command
from tests.nodes import Cluster, cluster

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


def on(nodes: Cluster, root: Path, verb: str, *words: str, token: str | None = None) -> subprocess.CompletedProcess:
    """`headwater VERB micro WORDS` against the cluster and the root."""
    line = command(verb, "micro", "--cluster", nodes.address, "--runs", str(root), *words)
    variables = nodes.variables | ({"RAY_AUTH_TOKEN": token} if token else {})
    return subprocess.run(line, cwd=CHECKOUT, env=variables, capture_output=True, text=True, timeout=1200)


def attempts(nodes: Cluster, root: Path) -> list[dict]:
    return json.loads(on(nodes, root, "status", "--json").stdout)["attempts"]


# In a process of its own: Ray reads the token once a process, and the command starts too slowly for so few steps.
STOP_AT_FIVE = """
import sys, time
from pathlib import Path
from cluster.jobs import Jobs

jobs, metrics = Jobs(sys.argv[1]), Path(sys.argv[2])
while not metrics.exists() or metrics.read_text().count("\\n") < 5:
    time.sleep(0.02)
jobs.stop("micro-pretrain-1")
while jobs.find("micro-pretrain-1").live:
    time.sleep(0.2)
"""


@contextmanager
def killed_at_the_end(process: subprocess.Popen) -> Iterator[subprocess.Popen]:
    """A failed assertion must not wait for a process that waits for what never comes."""
    with process:
        try:
            yield process
        finally:
            process.kill()


def test_pretraining_on_two_nodes_is_stopped_and_resumed_bit_for_bit(nodes, micro, before_pretrain):
    root, metrics = before_pretrain.parent, before_pretrain / "pretrain" / "metrics.jsonl"
    assert on(nodes, root, "submit", "--stage", "pretrain", "--no-wait").returncode == 0
    stopper = [sys.executable, "-c", STOP_AT_FIVE, nodes.address, str(metrics)]
    with killed_at_the_end(subprocess.Popen(stopper, cwd=CHECKOUT, env=nodes.variables)) as stopping:
        assert "is running: attached" in on(nodes, root, "submit", "--stage", "pretrain", "--no-wait").stderr
        assert stopping.wait(240) == 0
    assert [one["status"] for one in attempts(nodes, root)] == ["STOPPED"]
    assert 5 <= len(read_lines(metrics)) < len(read_lines(micro / "pretrain" / "metrics.jsonl"))

    resumed = on(nodes, root, "submit", "--stage", "pretrain")
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert attempts(nodes, root)[-1]["id"] == "micro-pretrain-2"
    losses, expected = (
        [one["loss"] for one in read_lines(run / "pretrain/metrics.jsonl")] for run in (before_pretrain, micro)
    )
    assert losses == expected
    assert "base model of" in (before_pretrain / "jobs" / "micro-pretrain-2.log").read_text()


def test_a_wrong_token_is_refused(nodes, tmp_path):
    refused = on(nodes, tmp_path, "submit", token="0" * 64)
    assert refused.returncode == 3
    assert "refused the token" in refused.stderr


def test_a_failed_job_ends_the_command_with_its_exit_code(nodes, tmp_path):
    failed = on(nodes, tmp_path, "submit", "--stage", "tokenizer")
    assert failed.returncode == 2, failed.stdout + failed.stderr
    assert "tokenizer needs ingest" in failed.stdout


def test_plain_ray_job_submit_works_too(nodes, tmp_path):
    words = ["job", "submit", "--address", nodes.address, "--working-dir", ".", "--"]
    line = ["python", "-m", "pipelines", "run", "micro", "--to", "tokenizer", "--runs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "ray.scripts.scripts", *words, *line],
        cwd=CHECKOUT, env=nodes.variables, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "micro" / "tokenizer" / "done.json").exists()


def test_the_doctor_examines_every_node(nodes, tmp_path):
    line = command("doctor", "--cluster", nodes.address, "--runs", str(tmp_path), "--json")
    done = subprocess.run(line, cwd=CHECKOUT, env=nodes.variables, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    states = {one["what"]: one["state"] for one in json.loads(done.stdout[done.stdout.index("[\n") :])}
    assert [states[what] for what in ("versions", "clocks", "run root", "shared run root")] == ["ok"] * 4
    assert "bandwidth" in states
    assert states["token"] == states["W&B"] == "ok"
