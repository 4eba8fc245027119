"""Pretraining on a disk that fills up in the midst of it, or has become read-only before it goes on."""

from __future__ import annotations

import pytest

from tests.commands import headwater, records, started, wait_until
from tests.disks import fill, make_read_only, make_writable, small_disk
from tests.faults import before_the_stage, fingerprints

pytestmark = pytest.mark.slow

WORDS = ("--from", "pretrain", "--to", "pretrain")


def test_a_disk_that_fills_up_or_becomes_read_only_is_named_and_costs_nothing(micro, tmp_path):
    with small_disk(tmp_path / "disk", 420) as disk:
        before_the_stage(micro, "pretrain", disk / "micro")
        steps, words = disk / "micro/pretrain/metrics.jsonl", ("run", "micro", "--runs", str(disk), *WORDS)

        with started(*words, "pretrain.max_failures=0") as process:  # trying again would not make room
            wait_until(lambda: len(records(steps)) >= 20, "20 steps")
            filler = fill(disk)
            code, said = process.wait(300), process.stdout.read()
            assert code == 4, said
        assert "No space left on device" in said
        assert "free disk space where the run lies" in said
        assert not (disk / "micro/pretrain/done.json").exists()
        filler.unlink()

        make_read_only(disk)  # which waits for all that writes to be gone
        refused = headwater(*words)
        assert refused.returncode == 2
        assert "Read-only file system" in refused.stderr
        make_writable(disk)

        again = headwater(*words)
        assert again.returncode == 0, again.stderr
        assert fingerprints(disk / "micro", ("pretrain",)) == fingerprints(micro, ("pretrain",))
