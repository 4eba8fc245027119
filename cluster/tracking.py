"""Weights & Biases: one group a run, one job type a stage, offline unless a key is set, and never in the way."""

from __future__ import annotations

import logging
import os
import uuid
from pathlib import Path
from typing import Any

from cluster import mirror
from cluster.runs import Run, StageFolder, read_json, write_json

log = logging.getLogger("headwater")


class Tracker:
    """A stage's W&B run. Whatever fails in it is said once in the log, and the stage goes on without it."""

    def __init__(self, run: Run, folder: StageFolder, project: str | None, config: dict[str, Any]):
        self._wandb: Any = None
        if project is not None:
            self._try(self._start, run, folder, project, config)

    def _start(self, run: Run, folder: StageFolder, project: str, config: dict[str, Any]) -> None:
        import wandb

        online = bool(os.environ.get("WANDB_API_KEY")) and os.environ.get("WANDB_MODE", "online") == "online"
        self._wandb = wandb.init(
            project=project,
            group=run.name,
            job_type=folder.name,
            name=f"{run.name}-{folder.name}",
            id=_kept_id(folder),
            resume="allow",
            dir=str(run.path),
            mode="online" if online else "offline",
            config=config,
            settings=wandb.Settings(silent=True, x_disable_stats=True, init_timeout=30, console="off"),
        )
        self._files = Path(self._wandb.dir).parent
        self._wandb.define_metric("step")
        self._wandb.define_metric("*", step_metric="step")

    def log(self, record: dict[str, Any]) -> None:
        """Log one step's numbers, under the step's own number.

        W&B would count from 0 again in an attempt that is offline, and on from the last line in one that is not.
        """
        if self._wandb is not None:
            self._try(self._wandb.log, record, record.get("step"))

    def tables(self, tables: dict[str, list[dict[str, Any]]]) -> None:
        """Log tables of rows that have the same columns."""
        for name, rows in tables.items():
            if self._wandb is not None and rows:
                self._try(self._log_table, name, rows)

    def _log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        import wandb

        columns = list(rows[0])
        self._wandb.log(
            {name: wandb.Table(columns=columns, data=[[row[column] for column in columns] for row in rows])}
        )

    def finish(self, summary: dict[str, Any], exit_code: int = 0) -> None:
        """Write the final figures and close the run."""
        if self._wandb is not None:
            self._try(self._wandb.summary.update, summary)
        if self._wandb is not None:
            self._try(self._wandb.finish, exit_code)
            self._try(self._send)
        self._wandb = None

    def _send(self) -> None:
        import wandb

        if mirror.key_of(self._files):
            wandb.teardown()  # `finish` comes back some milliseconds before the log on disk is whole
            mirror.send(self._files)

    def _try(self, call: Any, *args: Any) -> None:
        try:
            call(*args)
        except Exception as error:  # tracking is a convenience: nothing of it may end a stage
            self._wandb = None
            log.warning("W&B is left out from here on: %s", error)


def _kept_id(folder: StageFolder) -> str:
    """The W&B id of this stage's result, the same after a restart."""
    path = folder.path / "wandb.json"
    kept = read_json(path) or {"id": uuid.uuid4().hex[:8]}
    write_json(path, kept)
    return str(kept["id"])
