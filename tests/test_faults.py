"""The journey on a head and two workers, submitted as a job, while every part of the cluster is killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pipelines.stage import NAMES
from tests import faults
from tests.faults import Fault, drive, fingerprints
from tests.nodes import cluster

SOAK_KINDS = (faults.node, faults.driver, faults.head)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_journey_survives_the_loss_of_every_part(micro, tmp_path, fault_table):
    blows = [
        Fault("ingest", faults.data_worker),
        Fault("pretrain", faults.training_worker),
        Fault("sft", faults.node),
        Fault("rank", faults.driver),
        Fault("reward", faults.raylet),
        Fault("rlhf", faults.head),
    ]
    with cluster() as nodes:
        codes = drive(nodes, tmp_path, blows)
    fault_table(blows)
    assert [blow.kind for blow in blows if not blow.struck] == []
    assert codes[-1] == 0, (codes, (tmp_path / f"submit-{len(codes) - 1}.log").read_text()[-4000:])
    assert fingerprints(tmp_path / "micro") == fingerprints(micro)


@pytest.mark.soak
@pytest.mark.parametrize("kill", SOAK_KINDS, ids=lambda kill: kill.__name__)
@pytest.mark.parametrize("stage", NAMES)
def test_every_stage_survives_every_loss(micro, tmp_path, fault_table, stage, kill):
    before_the_stage(micro, stage, tmp_path / "micro")
    blow = Fault(stage, kill)
    with cluster() as nodes:
        codes = drive(nodes, tmp_path, [blow], "--stage", stage)
    fault_table([blow])
    assert blow.struck, "the stage was over before the blow"
    assert codes[-1] == 0, (codes, (tmp_path / f"submit-{len(codes) - 1}.log").read_text()[-4000:])
    assert fingerprints(tmp_path / "micro", (stage,)) == fingerprints(micro, (stage,))


def before_the_stage(run: Path, stage: str, target: Path) -> None:
    """A copy of the run in which `stage` and those after it have not begun."""
    later = NAMES[NAMES.index(stage) :]

    def left_out(folder: str, names: list[str]) -> list[str]:
        return [name for name in names if Path(folder) == run and name in (*later, "wandb", "jobs")]

    shutil.copytree(run, target, ignore=left_out)
