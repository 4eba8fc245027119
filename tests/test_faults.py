"""The journey on a head and two workers, submitted as a job, while every part of the cluster is killed."""

from __future__ import annotations

import pytest

from pipelines.stage import NAMES
from tests import faults
from tests.commands import losses
from tests.faults import Fault, before_the_stage, drive, fingerprints
from tests.nodes import bridge, cluster

SOAK_KINDS = (faults.node, faults.driver, faults.head)


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_the_journey_survives_the_loss_of_every_part(micro, tmp_path, fault_table):
    blows = [
        Fault("ingest", faults.data_worker),
        Fault("pretrain", faults.node),
        Fault("sft", faults.training_worker),
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
    for stage in faults.TRAINING:
        assert losses(tmp_path / "micro", stage) == losses(micro, stage)


@pytest.mark.soak
@pytest.mark.parametrize("kill", [faults.link, faults.long_cut], ids=lambda kill: kill.__name__)
def test_a_network_that_is_cut_costs_the_steps_since_the_checkpoint(micro, tmp_path, fault_table, kill):
    before_the_stage(micro, "pretrain", tmp_path / "micro")
    blow = Fault("pretrain", kill)
    with bridge() as network, cluster(network=network) as nodes:
        codes = drive(nodes, tmp_path, [blow], "--stage", "pretrain")
    fault_table([blow])
    assert blow.struck
    assert codes == [0], (tmp_path / "submit-0.log").read_text()[-4000:]
    assert fingerprints(tmp_path / "micro", ("pretrain",)) == fingerprints(micro, ("pretrain",))


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
