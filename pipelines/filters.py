"""What `ingest` threw away: how much by each rule, with samples."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import documents
from pipelines.corpus.quality import RULES

if TYPE_CHECKING:
    from rich.table import Table

SAMPLES = 3  # of each rule
SHOWN_CHARACTERS = 300
PARTS_LOOKED_AT = 64  # of the dropped documents, spread evenly over all parts

ABOUT = {rule.name: rule.about for rule in RULES}


def report(dropped: Path, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """A row for each reason, the commonest first: documents, their share of all, bytes of text, and samples.

    `dropped`: the folder of dropped documents. `metrics`: what `ingest` said when it was done. The first pieces of the
    parts looked at are the samples: each has url, measured value, detail and the beginning of the text.
    """
    found = _samples(dropped, set(metrics["dropped"]))
    everything = metrics["documents"] + sum(metrics["dropped"].values())
    return [
        {
            "reason": reason,
            "about": ABOUT.get(reason, ""),
            "documents": count,
            "share": count / everything,
            "text_bytes": metrics["dropped_bytes"][reason],
            "samples": found.get(reason, []),
        }
        for reason, count in sorted(metrics["dropped"].items(), key=lambda item: (-item[1], item[0]))
    ]


def flat(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of `report` with a row for each sample, for a dashboard's table."""
    none = {"url": "", "value": None, "detail": "", "text": ""}
    return [
        {key: value for key, value in {**row, **sample}.items() if key != "samples"}
        for row in rows
        for sample in row["samples"] or [none]
    ]


def show(rows: list[dict[str, Any]], metrics: dict[str, Any], as_json: bool) -> None:
    """Print the report: a table with samples for people, or JSON."""
    from rich.console import Console

    if as_json:
        print(json.dumps({"documents": metrics["documents"], "masked": metrics["masked"], "dropped": rows}))
        return
    console = Console(highlight=False)
    console.print(table(rows, metrics))
    for row in rows:
        console.print(f"\n[bold]{row['reason']}[/bold]  [dim]{row['about']}[/dim]")
        for sample in row["samples"]:
            console.print(_line(sample), markup=False, soft_wrap=True)
    masked = ", ".join(f"{count:,} {kind}" for kind, count in metrics["masked"].items()) or "nothing"
    console.print(f"\nmasked: {masked}; repeated passages taken out: {metrics['repeated_passages']:,}")


def table(rows: list[dict[str, Any]], metrics: dict[str, Any]) -> Table:
    """Reason, documents, share of all documents, text."""
    from rich.table import Table

    made = Table(title=f"{metrics['documents']:,} documents kept", title_justify="left")
    for name in ("dropped because", "documents", "% of all", "MB of text"):
        made.add_column(name, justify="left" if name == "dropped because" else "right")
    for row in rows:
        share, size = f"{row['share']:.2%}", f"{row['text_bytes'] / 1e6:.2f}"
        made.add_row(row["reason"], f"{row['documents']:,}", share, size)
    return made


def _line(sample: dict[str, Any]) -> str:
    from llm.pieces import visible

    value = "" if sample["value"] is None else f"{sample['value']:.4g} "
    return f"  {value}{sample['detail']}  {visible(sample['url'])}\n      {visible(sample['text'])}"


def _samples(dropped: Path, reasons: set[str]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    parts = documents.parts(dropped)
    for part in parts[:: max(1, math.ceil(len(parts) / PARTS_LOOKED_AT))]:
        for batch in documents.read(part, ["url", "reason", "value", "detail", "text"]):
            for row in batch.to_pylist():
                some = found.setdefault(row.pop("reason"), [])
                if len(some) < SAMPLES:
                    some.append({**row, "text": row["text"][:SHOWN_CHARACTERS]})
        if all(len(found.get(reason, [])) == SAMPLES for reason in reasons):
            break
    return found


def of_run(ingest: Path, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """The report of an `ingest` stage in that folder."""
    return report(ingest / "dropped", metrics)
