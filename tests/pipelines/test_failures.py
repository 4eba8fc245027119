"""Which rank is said to have failed first, and what is said of it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from pipelines import failures
from pipelines.failures import explained, of_ranks, recorded


class Died(Exception):
    """As Ray Train tells of a worker that it found dead."""

    health_check_failure = "The actor died unexpectedly. Some common causes include: (1) anything."


@pytest.fixture
def stage(tmp_path):
    (tmp_path / "logs").mkdir()
    return tmp_path


def fail(stage, rank, error):
    """What a rank leaves that raises `error`, as Ray Train hands it on."""
    with pytest.raises(type(error)), recorded(stage / "logs", rank, 2):
        raise error
    return RuntimeError(f"Traceback (most recent call last):\n{type(error).__name__}: {error}")


def test_the_first_to_raise_is_told_with_its_traceback_and_its_memory(stage):
    told = {1: fail(stage, 1, ValueError("a bad row")), 0: fail(stage, 0, RuntimeError("connection closed by peer"))}
    (stage / "logs" / "rank-1.log").write_text("begun\nat step 7\n")
    what = of_ranks(told, stage).what
    assert what.startswith(f"rank 1 of 2 (process {os.getpid()} on ")
    for words in ("failed first: ValueError: a bad row", "Traceback", " MB at most", "        at step 7"):
        assert words in what
    assert "connection closed" not in what


def test_a_rank_that_was_killed_comes_before_those_that_lost_it(stage):
    die(stage, "os.kill(os.getpid(), 9)")
    (stage / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0, "peak_rss_mb": 812.0}\n{"step": 4, "lo')
    what = of_ranks({0: fail(stage, 0, RuntimeError("connection closed by peer")), 1: Died()}, stage).what
    assert what.startswith("rank 1 of 2 ")
    assert "died first: no trace of a fault, as SIGKILL leaves none" in what
    assert "memory: 812 MB at most in any rank by step 3" in what
    assert "Ray: The actor died unexpectedly.\n" in f"{what}\n"
    assert "common causes" not in what


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_crash_is_told_by_the_name_of_its_signal(stage, name):
    die(stage, f"os.kill(os.getpid(), {int(getattr(signal, name))})")
    assert f"died first: {name}" in of_ranks({1: Died()}, stage).what


def test_a_full_disk_is_told_with_its_remedy(stage):
    told = {0: fail(stage, 0, OSError(28, "No space left on device"))}
    assert of_ranks(told, stage).remedy.startswith("free disk space")


def test_a_rank_that_never_began_is_told_too(stage):
    assert "rank 1 (which had not begun) died first" in of_ranks({1: Died()}, stage).what


def test_a_failure_outside_the_ranks_is_told_by_its_last_line(stage):
    told = explained(RuntimeError("controller error:\nOSError: [Errno 30] Read-only file system: 'x'"), stage)
    assert told.what == "training failed outside its workers: OSError: [Errno 30] Read-only file system: 'x'"
    assert told.remedy.startswith("make the file system that the run lies on writable again")


def test_what_an_earlier_attempt_told_is_forgotten(stage):
    die(stage, "os.kill(os.getpid(), 11)")
    (stage / "metrics.jsonl").write_text('{"step": 3, "loss": 1.0}\n')  # of a version that did not measure memory
    failures.forget(stage / "logs")
    what = of_ranks({1: Died()}, stage).what
    assert "which had not begun" in what
    assert "SIGSEGV" not in what


def die(stage, how):
    """End a process that was recorded as rank 1 by `how`."""
    code = "import os\nfrom pathlib import Path\nfrom pipelines.failures import recorded\n"
    code += f"with recorded(Path({str(stage / 'logs')!r}), 1, 2):\n    {how}\n"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60)
    assert ended.returncode < 0, ended.stderr
    assert failures._read(stage / "logs", 1).pid > 0
