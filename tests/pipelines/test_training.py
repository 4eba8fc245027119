"""Training that goes wrong in other ways than by dying: losses that must not count, ranks that stand still."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from llm.order import batch_rows
from llm.packing import RowReader
from tests.commands import CHECKOUT, environment, losses, records, started, training_workers, wait_until

pytestmark = pytest.mark.slow

BAD = 20  # the batch of the poisoned row; the checkpoint before it is that of step 15


def rows_of(run: Path, batch: int) -> list[int]:
    rows = json.loads((run / "shards/done.json").read_text())["metrics"]["train"]["rows"]
    return batch_rows(batch, 8, rows, seed=1337).tolist()


def poisoned(run: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """`headwater pretrain micro` where a row of batch BAD gives NaN."""
    manifest = json.loads((run / "shards/tokens/manifest.json").read_text())
    reader = RowReader(run / "shards/tokens/train", manifest["pad_id"])
    row = reader.read(rows_of(run, BAD))["input_ids"][5]
    command = [sys.executable, "-m", "tests.pipelines.poisoned", ",".join(map(str, row))]
    words = ("pretrain", "micro", "--runs", str(run.parent), *words)
    return subprocess.run([*command, *words], cwd=CHECKOUT, env=environment(), capture_output=True, text=True)


def test_bad_batches_are_left_out_and_told_and_every_other_row_is_taken_once(micro, before_pretrain):
    ended = poisoned(before_pretrain)
    assert ended.returncode == 0, ended.stderr
    said = " ".join((ended.stdout + ended.stderr).split())
    assert "the loss is nan; back to step 15, batches 15 to 20 left out" in said
    folder = before_pretrain / "pretrain"
    skipped, restart = records(folder / "events.jsonl")[:2]
    assert (skipped["event"], skipped["step"], skipped["batches"]) == ("skipped", BAD, [15, 21])
    assert restart == {"step": 15, "event": "restart"}
    ledger = records(folder / "ledger.jsonl")
    assert [line["step"] for line in ledger] == list(range(60))
    batches = [*range(15), *range(21, 66)]
    assert [line["rows"] for line in ledger] == [rows_of(micro, batch) for batch in batches]
    left_out = [row for batch in range(15, 21) for row in rows_of(micro, batch)]
    assert [line["skipped"] for line in ledger] == [left_out if step == 15 else [] for step in range(60)]
    assert losses(before_pretrain)[:15] == losses(micro)[:15]
    assert losses(before_pretrain)[-1] < losses(micro)[0] - 1, "it goes on learning"


def test_it_gives_up_after_so_many_windows_at_once_and_says_where_to_look(before_pretrain):
    ended = poisoned(before_pretrain, "pretrain.max_skips=0")
    assert ended.returncode == 4
    said = " ".join(ended.stderr.split())
    assert f"step {BAD}: the loss is nan; bad batches were left out 0 times (max_skips)" in said
    log = (before_pretrain / "pretrain/logs/rank-0.log").read_text()
    assert log.count("begins at step") == 1, "starting the workers again would come to the same"


def test_a_rank_that_stands_still_is_named_and_costs_no_step(micro, before_pretrain):
    words = ("pretrain", "micro", "--runs", str(before_pretrain.parent), "pretrain.deadline_s=8")
    with started(*words) as process:
        wait_until(lambda: len(losses(before_pretrain)) >= 20, "20 steps")
        worker = training_workers(process)[1]
        logs = before_pretrain / "pretrain/logs"
        pids = [json.loads((logs / f"rank-{rank}.json").read_text())["pid"] for rank in (0, 1)]
        worker.send_signal(signal.SIGSTOP)
        assert process.wait(240) == 0
    assert losses(before_pretrain) == losses(micro)
    by_the_other = (logs / f"rank-{1 - pids.index(worker.pid)}.log").read_text()
    stopped = f"rank 1 (process {worker.pid} on " if pids[1] == worker.pid else "rank 0, which holds the group's store"
    assert f" s: {stopped}" in by_the_other
