"""What a run would do and what it has done, as tables for people and JSON for programs."""

from __future__ import annotations

import json
import sys
from typing import Any

import yaml
from rich.console import Console
from rich.table import Table

from cluster import mirror
from cluster.runs import Run
from pipelines.run import Journey
from pipelines.stage import NAMES, Demand


def show_plan(journey: Journey, as_json: bool) -> None:
    """The resolved recipe, the stages that would run with the reason, and what they need."""
    steps = journey.plan()
    needs = {step.stage.name: step.stage.demand(journey.recipe) for step in steps}
    resolved = journey.recipe.model_dump(mode="json")
    if as_json:
        plan = [
            {"stage": step.stage.name, "runs": step.runs, "why": step.why, **_told(needs[step.stage.name])}
            for step in steps
        ]
        json.dump({"run": mirror.shown(journey.run.path), "recipe": resolved, "plan": plan}, sys.stdout, indent=1)
        print()
        return
    print(yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True))
    table = Table("stage", "runs", "why", "CPUs", "GPUs", "disk", title=f"plan for {mirror.shown(journey.run.path)}")
    for step in steps:
        need = needs[step.stage.name]
        disk = f"{need.disk_bytes / 1e6:,.0f} MB"
        table.add_row(
            step.stage.name, "yes" if step.runs else "no", step.why, f"{need.cpus:g}", f"{need.gpus:g}", disk
        )
    Console().print(table)


def _told(need: Demand) -> dict[str, Any]:
    return {"cpus": need.cpus, "gpus": need.gpus, "disk_bytes": need.disk_bytes}


def show_run(run: Run, as_json: bool) -> None:
    """The stages that are done: what went in, what came out, seconds, the figure that matters; and what to do next."""
    done = {name: marker for name in NAMES if (marker := run.stage(name).done())}
    if as_json:
        json.dump({"run": mirror.shown(run.path), "stages": done}, sys.stdout, indent=1)
        print()
        return
    Console().print(_table(run, done))
    print(_next(run, done))


def _table(run: Run, done: dict[str, dict[str, Any]]) -> Table:
    table = Table("stage", "in", "out", "seconds", "figure", title=mirror.shown(run.path))
    for name, marker in done.items():
        table.add_row(name, marker["read"], marker["wrote"], f"{marker['seconds']:.0f}", marker["figure"])
    return table


def _next(run: Run, done: dict[str, Any]) -> str:
    recipe = mirror.shown(run.path / "recipe.yaml")
    if NAMES[-1] not in done:
        return f"next: headwater run {recipe}"
    ways = {
        f"complete {run.name} 'Once upon a' --top 5": "a text goes on, with the distribution at each step",
        f"look tokens {run.name} 'Hello, hello'": "how a text splits",
        f"serve {run.name}": "an OpenAI-compatible API on 127.0.0.1:8000",
        f"run {recipe} name=mine ingest.folder=~/texts ingest.folder_licence=unknown": "the same from your own text",
    }
    return "what to do next:\n" + "\n".join(f"  headwater {way:<46}  {what}" for way, what in ways.items())
