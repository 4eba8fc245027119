"""Pretraining killed at many points, and pretraining for long: what `make soak` runs of it, each with its table."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random

import pytest

from tests import faults
from tests.bench.processes import running
from tests.commands import command, headwater, losses, wait_until
from tests.faults import Fault, before_the_stage, drive, fingerprints, past, same_ledger
from tests.nodes import cluster
from tests.usage import assert_no_more, compared, usage

pytestmark = pytest.mark.soak

# Batches so large that an epoch ends within the 60 steps, and saves so near to one another that kills meet them.
BATCH, SAVE_EVERY = 128, 5
WORDS = (f"pretrain.global_batch={BATCH}", "pretrain.micro_batch=32", f"pretrain.save_every={SAVE_EVERY}")
RANDOM_KILLS = (faults.training_worker, faults.driver, faults.node, faults.training_worker, faults.node)


@pytest.fixture(scope="module")
def undisturbed(micro, tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("undisturbed")
    before_the_stage(micro, "pretrain", root / "micro")
    done = headwater("pretrain", "micro", "--runs", str(root), *WORDS)
    assert done.returncode == 0, done.stderr
    return root / "micro"


def blows(stage: Path, seed: int, epoch_end: int) -> list[Fault]:
    """Kills at steps that `seed` draws, in the midst of a save, and where one epoch's rows give way to the next's."""
    random = Random(seed)
    kills = random.sample(RANDOM_KILLS, len(RANDOM_KILLS))
    points = sorted(random.sample(range(SAVE_EVERY + 1, epoch_end - SAVE_EVERY), len(kills)))
    drawn = [Fault("pretrain", kill, past(step)) for kill, step in zip(kills, points, strict=True)]
    in_save = Fault("pretrain", faults.workers_in_a_save(stage / "checkpoints"), past(points[2]))
    at_the_edge = [faults.training_worker, faults.driver, faults.node][seed % 3]
    return [*drawn[:3], in_save, *drawn[3:], Fault("pretrain", at_the_edge, past(epoch_end))]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pretraining_killed_at_many_points_is_the_undisturbed_one(undisturbed, tmp_path, fault_table, seed):
    rows = json.loads((undisturbed / "shards/done.json").read_text())["metrics"]["train"]["rows"]
    before_the_stage(undisturbed, "pretrain", tmp_path / "micro")
    struck = blows(tmp_path / "micro/pretrain", seed, epoch_end=rows // BATCH)
    with cluster() as nodes:
        words = ("--stage", "pretrain", *WORDS, "pretrain.max_failures=100")
        codes = drive(nodes, tmp_path, tmp_path, struck, *words)
    fault_table(struck)
    assert [fault.kind for fault in struck if not fault.struck] == []
    assert codes[-1] == 0, (codes, (tmp_path / f"submit-{len(codes) - 1}.log").read_text()[-4000:])
    assert losses(tmp_path / "micro") == losses(undisturbed)
    assert same_ledger(tmp_path / "micro", undisturbed)
    assert fingerprints(tmp_path / "micro", ("pretrain",)) == fingerprints(undisturbed, ("pretrain",))


def test_storage_that_is_gone_for_half_a_minute_is_waited_for(micro, tmp_path, fault_table, monkeypatch):
    from cluster import mirror
    from cluster.runs import runs_root
    from tests.s3 import BUCKET, storage

    blow = Fault("pretrain", faults.storage_gone)
    with storage(tmp_path / "s3") as bucket, cluster(storage=bucket) as nodes:
        for name in ("HEADWATER_CACHE", *bucket.variables):
            monkeypatch.setenv(name, nodes.variables[name])
        mirror.forget()
        root = runs_root(f"s3://{BUCKET}/runs")
        codes = drive(nodes, root, tmp_path, [blow], "--to", "pretrain")
        fault_table([blow])
        assert blow.struck
        assert codes == [0], (tmp_path / "submit-0.log").read_text()[-4000:]
        assert losses(root / "micro") == losses(micro)


def test_dropout_is_the_same_after_a_kill(micro, tmp_path):
    """Of a model of another architecture, whose configuration has dropout."""
    dropout = "resid_pdrop: 0.1, embd_pdrop: 0.1, attn_pdrop: 0.1"
    config = f"{{model_type: gpt2, n_layer: 2, n_embd: 64, n_head: 2, n_positions: 64, {dropout}}}"
    words = (f"model={{config: {config}}}", "pretrain.save_every=10")
    found = []
    for name, stopped_at in (("whole", None), ("stopped", 15)):
        before_the_stage(micro, "pretrain", tmp_path / name / "micro")
        line = ("pretrain", "micro", "--runs", str(tmp_path / name), *words)
        with running(command(*line), tmp_path / f"{name}.log") as process:
            if stopped_at:
                wait_until(lambda: len(losses(tmp_path / "stopped/micro")) >= 15, "15 steps")
                process.terminate()
            assert process.wait(240) == (5 if stopped_at else 0)
        if stopped_at:
            assert headwater(*line).returncode == 0
        found.append((losses(tmp_path / name / "micro"), fingerprints(tmp_path / name / "micro", ("pretrain",))))
    assert found[0] == found[1]


@pytest.mark.parametrize("setting", ["activation_checkpointing", "compile"])
def test_settings_that_only_save_memory_or_time_leave_the_losses_as_they_are(micro, before_pretrain, setting):
    done = headwater("pretrain", "micro", "--runs", str(before_pretrain.parent), f"pretrain.{setting}=true")
    assert done.returncode == 0, done.stderr
    assert losses(before_pretrain) == pytest.approx(losses(micro), abs=1e-4)


# For long

STEPS, EARLY, LATE = 10_000, 2_000, 9_700
LONG = (
    f"pretrain.steps={STEPS}", "pretrain.global_batch=2", "pretrain.micro_batch=1", "pretrain.save_every=250",
    "pretrain.evaluate_every=1000", "pretrain.held_out_rows=8", "pretrain.zero_stage=1",
)  # fmt: skip


@pytest.mark.timeout(3600)
def test_ten_thousand_steps_take_no_more_memory_handles_or_shared_memory_than_two_thousand(micro, tmp_path, table):
    before_the_stage(micro, "pretrain", tmp_path / "micro")
    steps = tmp_path / "micro/pretrain/metrics.jsonl"

    def taken() -> int:
        return steps.read_bytes().count(b"\n") if steps.exists() else 0

    with running(command("pretrain", "micro", "--runs", str(tmp_path), *LONG), tmp_path / "log") as process:
        found = {}
        for step in (EARLY, LATE):
            wait_until(lambda step=step: taken() >= step, f"{step} steps", timeout=1500)
            found[step] = usage(process)
        assert process.wait(600) == 0
    early, late = found.values()
    table(f"{STEPS:,} steps: what is held after {EARLY:,}, and after {LATE:,}", compared(early, late))
    assert_no_more(early, late)
