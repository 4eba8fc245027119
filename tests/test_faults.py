"""The journey on a head and two workers, submitted as a job, while every part of the cluster is killed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster import mirror
from cluster.runs import runs_root
from pipelines.stage import NAMES
from tests import faults
from tests.commands import CHECKOUT, headwater, losses, wait_until
from tests.faults import Fault, before_the_stage, drive, fingerprints, same_ledger
from tests.nodes import bridge, cluster, redis_server
from tests.s3 import BUCKET, storage

SOAK_KINDS = (faults.node, faults.driver, faults.head)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_the_journey_survives_the_loss_of_every_part(micro, tmp_path, fault_table, monkeypatch):
    """In object storage, on nodes each of which has an address, and a disk for its copy of the run, of its own."""
    blows = [
        Fault("ingest", faults.data_worker),
        Fault("tokenizer", faults.head_with_redis),
        Fault("shards", faults.link),
        Fault("pretrain", faults.driver),
        Fault("sft", faults.training_worker),
        Fault("rank", faults.node),
        Fault("reward", faults.storage_gone),
        Fault("rlhf", faults.head),
        Fault("evaluate", faults.raylet),
    ]
    with (
        bridge() as network,
        storage(tmp_path / "s3", network.head_ip) as bucket,
        redis_server(tmp_path) as redis,
        cluster(network=network, storage=bucket, redis=redis) as nodes,
    ):
        for name in ("HEADWATER_CACHE", *bucket.variables):
            monkeypatch.setenv(name, nodes.variables[name])
        root = runs_root(f"s3://{BUCKET}/runs")
        codes = drive(nodes, root, tmp_path, blows)
        fault_table(blows)
        assert [blow.kind for blow in blows if not blow.struck] == []
        assert [blow.kind for blow in blows if blow.kill in faults.WAITED_FOR and blow.lost] == []
        assert codes[-1] == 0, (codes, (tmp_path / f"submit-{len(codes) - 1}.log").read_text()[-4000:])
        assert fingerprints(root / "micro") == fingerprints(micro)
        for stage in faults.TRAINING:
            assert losses(root / "micro", stage) == losses(micro, stage)
        assert_it_can_be_looked_at(f"s3://{BUCKET}/runs")


def assert_it_can_be_looked_at(root: str) -> None:
    """From a machine that has nothing of the run."""
    shutil.rmtree(mirror.cache(), ignore_errors=True)
    states = json.loads(headwater("status", "micro", "--runs", root, "--json").stdout)["stages"]
    assert [(one["stage"], one["state"]) for one in states] == [(name, "done") for name in NAMES]
    assert "asks-back" in headwater("report", "micro", "--runs", root).stdout
    assert "begins at step" in headwater("logs", "micro", "--runs", root, "--stage", "pretrain", "--rank", "1").stdout
    assert "evaluate" in headwater("logs", f"{root}/micro").stdout, "what the last attempt printed"
    assert headwater("complete", "micro", "2 + 2", "--runs", root, "--max-new-tokens", "4").returncode == 0
    assert headwater("complete", f"{root}/micro/sft/model", "2 + 2", "--max-new-tokens", "4").returncode == 0


@pytest.mark.slow
def test_training_goes_on_without_a_lost_node_and_with_it_when_it_is_back(micro, before_pretrain, tmp_path):
    """The same rows in every step, dealt out among two workers, one, and two again."""
    log = before_pretrain / "pretrain/logs/rank-0.log"

    def begun(workers: int) -> int:
        return log.read_text().count(f"rank 0 of {workers} begins") if log.exists() else 0

    with cluster() as nodes, slowed_job(nodes, tmp_path, "pretrain.min_workers=1", "pretrain.save_every=5") as job:
        wait_until(lambda: len(losses(before_pretrain)) >= 8, "8 steps")
        nodes.nodes.pop().kill()
        wait_until(lambda: begun(1), "one worker by itself")
        nodes.start_worker()
        wait_until(lambda: begun(2) == 2, "two workers again")
        assert job.wait(240) == 0, (tmp_path / "job.log").read_text()[-4000:]
    assert same_ledger(micro, before_pretrain)
    assert losses(before_pretrain) == pytest.approx(losses(micro), abs=1e-4)


@contextmanager
def slowed_job(nodes, root: Path, *words: str) -> Iterator[subprocess.Popen]:
    """`headwater pretrain micro` as a Ray job, slow enough for nodes to come and go (`tests.pipelines.slowed`)."""
    submit = ["-m", "ray.scripts.scripts", "job", "submit", "--address", nodes.address, "--working-dir", "."]
    line = ["python", "-m", "tests.pipelines.slowed", "pretrain", "micro", "--runs", str(root), *words]
    with open(root / "job.log", "wb") as log:
        process = subprocess.Popen(
            [sys.executable, *submit, "--", *line], cwd=CHECKOUT, env=nodes.variables, stdout=log, stderr=log
        )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.soak
@pytest.mark.parametrize("kill", [faults.link, faults.long_cut], ids=lambda kill: kill.__name__)
def test_a_network_that_is_cut_costs_at_most_the_steps_since_the_checkpoint(micro, tmp_path, fault_table, kill):
    before_the_stage(micro, "pretrain", tmp_path / "micro")
    blow = Fault("pretrain", kill)
    with bridge() as network, cluster(network=network) as nodes:
        codes = drive(nodes, tmp_path, tmp_path, [blow], "--stage", "pretrain")
    fault_table([blow])
    assert blow.struck
    assert codes == [0], (tmp_path / "submit-0.log").read_text()[-4000:]
    assert fingerprints(tmp_path / "micro", ("pretrain",)) == fingerprints(micro, ("pretrain",))


@pytest.mark.soak
@pytest.mark.parametrize("stage", ["ingest", "pretrain", "rank"])
def test_a_head_that_finds_its_tables_in_redis_is_no_other_head(micro, tmp_path, fault_table, stage):
    """On one disk: the workers live on, the driver doesn't, and Ray goes on calling its job RUNNING."""
    before_the_stage(micro, stage, tmp_path / "micro")
    blow = Fault(stage, faults.head_with_redis)
    with redis_server(tmp_path) as redis, cluster(redis=redis) as nodes:
        codes = drive(nodes, tmp_path, tmp_path, [blow], "--stage", stage)
    fault_table([blow])
    assert blow.struck
    assert codes == [4, 0], (tmp_path / f"submit-{len(codes) - 1}.log").read_text()[-4000:]
    assert fingerprints(tmp_path / "micro", (stage,)) == fingerprints(micro, (stage,))


@pytest.mark.soak
@pytest.mark.parametrize("kill", SOAK_KINDS, ids=lambda kill: kill.__name__)
@pytest.mark.parametrize("stage", NAMES)
def test_every_stage_survives_every_loss(micro, tmp_path, fault_table, stage, kill):
    before_the_stage(micro, stage, tmp_path / "micro")
    blow = Fault(stage, kill)
    with cluster() as nodes:
        codes = drive(nodes, tmp_path, tmp_path, [blow], "--stage", stage)
    fault_table([blow])
    assert blow.struck, "the stage was over before the blow"
    assert codes[-1] == 0, (codes, (tmp_path / f"submit-{len(codes) - 1}.log").read_text()[-4000:])
    assert fingerprints(tmp_path / "micro", (stage,)) == fingerprints(micro, (stage,))
