"""Pretraining on a disk that fills up, or that becomes read-only, in the midst of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.commands import headwater, records, started, wait_until
from tests.disks import fill, make_read_only, make_writable, small_disk
from tests.faults import before_the_stage, fingerprints

pytestmark = pytest.mark.soak


def test_a_disk_that_fills_up_is_named_and_costs_nothing(micro, tmp_path):
    with small_disk(tmp_path / "disk", 420) as disk:
        before_the_stage(micro, "pretrain", disk / "micro")
        words = ("run", "micro", "--runs", str(disk), "--from", "pretrain", "--to", "pretrain")
        with started(*words, "pretrain.max_failures=0") as process:  # trying again would not make room
            wait_until(lambda: len(records(disk / "micro/pretrain/metrics.jsonl")) >= 20, "20 steps")
            filler = fill(disk)
            assert process.wait(120) == 4
            said = process.stdout.read()
        assert "No space left on device" in said
        assert "free disk space where the run lies" in said
        assert not (disk / "micro/pretrain/done.json").exists()
        filler.unlink()
        goes_on(micro, disk)


def test_a_disk_that_becomes_read_only_is_named_and_costs_nothing(micro, tmp_path):
    with small_disk(tmp_path / "disk", 420) as disk:
        before_the_stage(micro, "pretrain", disk / "micro")
        with started("run", "micro", "--runs", str(disk), "--from", "pretrain", "--to", "pretrain"):
            wait_until(lambda: len(records(disk / "micro/pretrain/metrics.jsonl")) >= 20, "20 steps")
        make_read_only(disk)  # which waits for all that writes to be gone
        refused = headwater("run", "micro", "--runs", str(disk), "--from", "pretrain", "--to", "pretrain")
        assert refused.returncode == 2
        assert "Read-only file system" in refused.stderr
        make_writable(disk)
        goes_on(micro, disk)


def goes_on(micro: Path, disk: Path) -> None:
    """The same command finishes, and made what the undisturbed run had made."""
    again = headwater("run", "micro", "--runs", str(disk), "--from", "pretrain", "--to", "pretrain")
    assert again.returncode == 0, again.stderr
    assert fingerprints(disk / "micro", ("pretrain",)) == fingerprints(micro, ("pretrain",))
