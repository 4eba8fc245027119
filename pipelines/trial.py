"""A client's view of the service just started: wait for it, ask it something, say how to call it."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from cluster.errors import Problem, StageFailed
from llm.chat import render_turns
from llm.loading import load
from llm.sampling import SamplingParams

READY_WAIT_S = 180.0
ANSWER_TOKENS = 32
SAMPLING: dict[str, Any] = {"temperature": 0.7, "seed": 1}


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
        request = {"model": model, "prompt": opening, "max_tokens": 60, **SAMPLING}
        console.print(f"[bold]{escape(opening)}[/bold]", end="")
        console.print(_post(f"{address}/completions", request)["text"], markup=False)
        console.rule()


def ask_questions(address: str, model: str, questions: tuple[str, ...], others: dict[str, Path]) -> None:
    """Print the service's answers beside those of the models in `others` (names and folders), asked here."""
    served = [_ask(address, model, question) for question in questions]
    columns = [_answers(folder, questions) for folder in others.values()]
    table = Table("question", *(f"{name} (here)" for name in others), f"{model} (served)", title="three questions")
    for row in zip(questions, *columns, served, strict=True):
        table.add_row(*map(escape, row))
    Console().print(table)


def _ask(address: str, model: str, question: str) -> str:
    request = {"model": model, "messages": _turns(question), "max_tokens": ANSWER_TOKENS, **SAMPLING}
    return str(_post(f"{address}/chat/completions", request)["message"]["content"])


def _answers(folder: Path, questions: tuple[str, ...]) -> list[str]:
    engine = load(folder)
    prompts = [render_turns(engine.tokenizer, _turns(question)) for question in questions]
    return [one.text for one in engine.generate(prompts, SamplingParams(max_new_tokens=ANSWER_TOKENS, **SAMPLING))]


def _turns(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


def _post(address: str, request: dict[str, Any]) -> dict[str, Any]:
    """The first choice of the service's answer."""
    answer = httpx.post(address, json=request, timeout=120)
    answer.raise_for_status()
    return answer.json()["choices"][0]


def example(address: str, model: str) -> str:
    """A command that calls the service."""
    body = json.dumps({"model": model, "prompt": "Once upon a", "max_tokens": 40, "seed": 1})
    return f"  curl {address}/completions -H 'Content-Type: application/json' -d '{body}'"


def _beside(address: str, path: str) -> str:
    """An address next to /v1."""
    return f"{address.rsplit('/v1', 1)[0]}/{path}"
