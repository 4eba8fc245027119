"""`headwater doctor`: what is wrong with this machine, or with every node of a cluster, and what to do about it."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from cluster import doctor, mirror
from cluster.doctor import Finding
from cluster.errors import PreflightRefused, Problem
from cluster.jobs import Attempt, Jobs, next_number
from pipelines.submit import follow, packed_code

COLOURS = {"ok": "green", "warning": "yellow", "failure": "red"}


def findings_here(root: Path) -> list[Finding]:
    """This machine alone; nothing is started."""
    return [*doctor.judge([doctor.examine(root)], doctor.tested_versions()), *doctor.local_findings()]


def findings_on_cluster(root: Path, address: str) -> list[Finding]:
    """Every node of the cluster that Ray answers for at `address`."""
    from cluster.local import ray_session

    with ray_session(address, 0):
        nodes, findings = doctor.cluster_findings(root)
    return [*doctor.judge(nodes, doctor.tested_versions()), *findings, *doctor.driver_findings()]


def submit(root: Path, jobs: Jobs, as_json: bool) -> None:
    """Examine the cluster from within, as a job, and print what it prints. PreflightRefused if it is open to all."""
    api = doctor.jobs_api_finding(jobs.address)
    known = jobs.attempts("doctor")
    attempt = Attempt("doctor", "nodes", next_number(known, root / "none"), "PENDING")
    words = ["python", "-m", "pipelines", "doctor", "--address", "auto", "--runs", mirror.shown(root)]
    with packed_code() as folder:
        jobs.submit(attempt, [*words, *(["--json"] if as_json else [])], folder)
    follow(jobs, attempt)
    if api.state != "ok":
        raise PreflightRefused(Problem(f"{api.what}: {api.found}", api.remedy))


def show(findings: list[Finding], as_json: bool) -> None:
    """Print the findings. PreflightRefused with those that nothing can run with."""
    if as_json:
        json.dump([dataclasses.asdict(one) for one in findings], sys.stdout, indent=1)
        print()
    else:
        Console().print(_table(findings))
    if wrong := [Problem(f"{one.what}: {one.found}", one.remedy) for one in findings if one.state == "failure"]:
        raise PreflightRefused(*wrong)


def _table(findings: list[Finding]) -> Table:
    table = Table("", "state", "found", "remedy")
    for one in findings:
        table.add_row(one.what, f"[{COLOURS[one.state]}]{one.state}[/]", one.found, one.remedy)
    return table
