"""The run that slow tests look at, made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.commands import headwater


@pytest.fixture(scope="session")
def micro(tmp_path_factory) -> Path:
    """The recipe `micro`, run from raw text to the end by the command. Tests read it and change copies."""
    root = tmp_path_factory.mktemp("runs")
    done = headwater("run", "micro", "--runs", str(root))
    assert done.returncode == 0, done.stderr
    return root / "micro"


@pytest.fixture
def before_pretrain(micro, tmp_path) -> Path:
    """A copy of that run in which pretraining has not begun."""
    shutil.copytree(micro, tmp_path / "micro", ignore=shutil.ignore_patterns("pretrain", "wandb", "*.log"))
    return tmp_path / "micro"
