"""The run that slow tests look at, made once."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import settings

from tests.commands import headwater

# A machine that does other things beside is no reason to fail.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Where everything has to be there, as in CI, a test that skips has failed."""
    report = yield
    if report.skipped and os.environ.get("HEADWATER_REQUIRE_ALL") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"skipped, where HEADWATER_REQUIRE_ALL asks for every test: {report.longrepr}"
    return report


def pytest_collection_modifyitems(config, items):
    """Soak tests run when they are asked for by their mark, and not because nothing was asked for."""
    if "soak" not in config.option.markexpr:
        items[:] = [item for item in items if "soak" not in item.keywords]


TABLES: dict[str, list[str]] = {}
FAULTS = "stage, what was killed, what was made again, until it was further than before"


@pytest.fixture
def table():
    """Takes a title and rows for a table that is printed when all tests have run."""
    return lambda title, rows: TABLES.setdefault(title, []).extend(rows)


@pytest.fixture
def fault_table(table):
    """Takes faults for such a table."""
    return lambda faults: table(FAULTS, [fault.row() for fault in faults])


def pytest_terminal_summary(terminalreporter):
    for title, rows in TABLES.items():
        terminalreporter.section(title)
        terminalreporter.write("\n".join(rows) + "\n")


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


@pytest.fixture(scope="module")
def ray():
    """Ray in this process, of two CPUs."""
    import ray

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_AUTH_MODE", "disabled")
        patch.setenv("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
        ray.init(num_cpus=2, include_dashboard=False, object_store_memory=100 << 20, logging_level=logging.ERROR)
        yield ray
        ray.shutdown()
