"""Logs and copies of what is printed, where a disk is full. /dev/full refuses every write as a full disk does."""

from __future__ import annotations

import logging
import os
import subprocess
import sys

import pytest

from cluster.errors import Problem, StageFailed
from cluster.progress import log_to


def test_a_log_on_a_full_disk_does_not_hide_the_error_that_ended_the_work(tmp_path, capsys):
    (tmp_path / "driver.log").symlink_to("/dev/full")
    with pytest.raises(StageFailed, match="the disk is full"), log_to(tmp_path / "driver.log"):
        logging.getLogger("headwater").warning("a checkpoint could not be written")
        raise StageFailed(Problem("the disk is full", "free space"))
    assert capsys.readouterr().err == ""


def test_what_is_printed_still_reaches_the_terminal_when_its_copy_has_no_room(tmp_path):
    (tmp_path / "output.log").symlink_to("/dev/full")
    script = f"""
from pathlib import Path
from cluster.progress import copied_output
with copied_output(Path({str(tmp_path / "output.log")!r})):
    for _ in range(4):
        print("x" * 65536, flush=True)
"""
    environment = {**os.environ, "PYTHONPATH": os.getcwd()}
    ended = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True, env=environment
    )
    assert ended.stdout == ("x" * 65536 + "\n") * 4
