"""A client's view of the service just started: wait for it, let it complete a few openings, say how to call it."""

from __future__ import annotations

import json
import time

import httpx
from rich.console import Console

from cluster.errors import Problem, StageFailed

READY_WAIT_S = 180.0


def wait_until_ready(address: str) -> None:
    """Return when `/readyz` says that the model can generate. StageFailed with its last words after READY_WAIT_S."""
    deadline, said = time.monotonic() + READY_WAIT_S, "no answer"
    while time.monotonic() < deadline:
        try:
            answer = httpx.get(_beside(address, "readyz"), timeout=10)
            if answer.status_code == 200:
                return
            said = answer.text
        except httpx.HTTPError as error:
            said = str(error)
        time.sleep(0.2)
    raise StageFailed(
        Problem(f"the service is not ready after {READY_WAIT_S:.0f} s: {said}", "look at Ray's logs of the replica")
    )


def complete_openings(address: str, model: str, openings: tuple[str, ...]) -> None:
    """Print what the service makes of each opening."""
    console = Console(highlight=False)
    for opening in openings:
        written = _complete(address, model, opening)
        console.print(f"[bold]{opening}[/bold]", end="")
        console.print(written, markup=False)
        console.rule()


def _complete(address: str, model: str, prompt: str) -> str:
    request = {"model": model, "prompt": prompt, "max_tokens": 60, "temperature": 0.7, "seed": 1}
    answer = httpx.post(f"{address}/completions", json=request, timeout=120)
    answer.raise_for_status()
    return str(answer.json()["choices"][0]["text"])


def example(address: str, model: str) -> str:
    """A command that calls the service."""
    body = json.dumps({"model": model, "prompt": "Once upon a", "max_tokens": 40, "seed": 1})
    return f"  curl {address}/completions -H 'Content-Type: application/json' -d '{body}'"


def _beside(address: str, path: str) -> str:
    """An address next to /v1."""
    return f"{address.rsplit('/v1', 1)[0]}/{path}"
