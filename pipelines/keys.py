"""`headwater keys`: what its words mean, and what it prints."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from cluster.errors import BadInput, Problem

UNITS = {"m": "minutes", "h": "hours", "d": "days", "w": "weeks"}
BUDGETS = {
    "requests_per_minute": "requests/min",
    "concurrent": "at once",
    "tokens_per_minute": "tokens/min",
    "tokens_per_day": "tokens/day",
}


def expiry(text: str, now: datetime) -> datetime:
    """When a key ends: `30d` from now (m, h, d, w), or at an ISO date or time, of UTC unless it says otherwise.

    BadInput if it is neither, or past.
    """
    try:
        end = _end(text, now)
    except (ValueError, OverflowError):
        remedy = "say how long, as 12h, 30d or 8w, or when, as 2027-01-31 or 2027-01-31T12:00+01:00"
        raise BadInput(Problem(f"--expires {text!r} is neither a time from now nor a date", remedy)) from None
    if end <= now:
        raise BadInput(Problem(f"--expires {text} is past", f"give a time after {now:%Y-%m-%dT%H:%M} UTC"))
    return end


def _end(text: str, now: datetime) -> datetime:
    if match := re.fullmatch(r"(\d{1,9})([mhdw])", text):
        return now + timedelta(**{UNITS[match[2]]: int(match[1])})
    end = datetime.fromisoformat(text)
    return end if end.tzinfo else end.replace(tzinfo=UTC)


def show_new(name: str, key: str, file: Path, as_json: bool) -> None:
    """Print a new key, this once."""
    if as_json:
        print(json.dumps({"name": name, "key": key, "file": str(file)}))
        return
    print(f"{key}\n\nThis is the key of {name}. It is shown this once: {file} keeps its hash alone.")
    print("Clients send it as `Authorization: Bearer KEY`, OpenAI's client as its api_key.")


def show(keys: Sequence[dict[str, Any]], file: Path, as_json: bool) -> None:
    """Print keys, each with `name`, `created`, `expires`, `models` and its budgets; never a hash."""
    if as_json:
        print(json.dumps({"file": str(file), "keys": list(keys)}, default=datetime.isoformat))
        return
    if not keys:
        print(f"no keys in {file}")
    for key in keys:
        budgets = [f"{key[name]} {said}" for name, said in BUDGETS.items() if key[name] is not None]
        ends = f"until {key['expires']:%Y-%m-%d %H:%M}" if key["expires"] else "no end"
        facts = [ends, ", ".join(key["models"] or ["all models"]), ", ".join(budgets) or "no budgets"]
        print(f"{key['name']}  since {key['created']:%Y-%m-%d %H:%M}, {'; '.join(facts)}")
