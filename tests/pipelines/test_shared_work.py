"""A whole stage whose workers share what is for GPU clusters to share, under Ray on CPUs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from pipelines.records import read_lines
from tests.commands import CHECKOUT, environment, losses
from tests.faults import same_ledger


@pytest.mark.parametrize(
    "setting",
    [
        pytest.param("tensor_parallel", marks=pytest.mark.slow),
        pytest.param("sequence_parallel", marks=pytest.mark.soak),
    ],
)
def test_workers_that_share_layers_or_rows_learn_what_others_do(micro, before_pretrain, setting):
    words = ["pretrain.gpus_per_worker=1", f"pretrain.{setting}=2", "--runs", str(before_pretrain.parent)]
    line = [sys.executable, "-m", "tests.pipelines.as_on_gpus", "pretrain", "micro", *words]
    done = subprocess.run(line, cwd=CHECKOUT, env=environment(), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert losses(before_pretrain) == pytest.approx(losses(micro), abs=1e-4)
    assert same_ledger(micro, before_pretrain)
    held_out = [read_lines(run / "pretrain/held_out.jsonl")[-1]["held_out_loss"] for run in (before_pretrain, micro)]
    assert held_out[0] == pytest.approx(held_out[1], abs=1e-4)
    tokens = [read_lines(run / "pretrain/metrics.jsonl")[-1]["tokens"] for run in (before_pretrain, micro)]
    assert tokens[0] == tokens[1]
