"""MODEL or a service's address -> a conversation from the terminal, or from a pipe: a line in, a reply out."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx

from cluster.errors import BadInput, HeadwaterError, Problem
from llm.chat import ASSISTANT, DROPPED_TURNS, Message, fit_window, render_turns
from llm.pieces import harmless
from llm.sampling import SamplingParams

COMMANDS = {"/quit": "end", "/new": "forget what was said", "/history": "show what is remembered"}
CONNECT_WAIT_S, REPLY_WAIT_S = 10.0, 300.0  # for a service to be reached, and to say the next thing
NO_SERVICE = "start one with `headwater serve`, and give its address up to /v1 and a model that it has"
OF_THIS_TURN = (400, 429, 503)  # statuses that say nothing of the next turn

# Answers messages: how many of the oldest turns it had no room for, and the reply's text as it comes. ValueError if it
# can't answer these.
Speaker = Callable[[list[Message]], tuple[int, Iterator[str]]]


def chat(
    target: str | Path,
    *,
    params: SamplingParams,
    model_name: str | None = None,
    system: str | None = None,
    read: Callable[[str], str] = input,
) -> None:
    """Talk with the model in the folder `target`, or with `model_name` (else the first) of the service at that URL.

    Each line that `read` gives is a turn, a command of COMMANDS, or (empty) nothing; EOFError ends. Replies go to
    standard output, all else to standard error. Turns beyond the context are forgotten, the oldest first, and said to
    be. BadInput if the folder holds no model or the address no service; HeadwaterError if a service breaks off.
    """
    remote = str(target).startswith(("http://", "https://"))
    speaker = service(str(target), model_name, params) if remote else engine(Path(target), params)
    Conversation(speaker, system).hold(read)


class Conversation:
    """What was said so far, and who answers. `system` opens every conversation and is never forgotten."""

    def __init__(self, speaker: Speaker, system: str | None = None):
        self.speaker = speaker
        self.opening: list[Message] = [{"role": "system", "content": system}] if system else []
        self.turns: list[Message] = []

    def hold(self, read: Callable[[str], str]) -> None:
        """Take lines until the user ends it."""
        prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
        if prompt:
            _note(_help())
        while (line := _line(read, prompt)) is not None and line.strip() != "/quit":
            self._take(line)

    def _take(self, line: str) -> None:
        word = line.strip()
        if word == "/new":
            self.turns.clear()
        elif word == "/history":
            self._show_history()
        elif word.startswith("/") and word[1:].isalpha():
            _note(f"no command {word}; {_help()}")
        elif word:
            self._ask(line)

    def _ask(self, text: str) -> None:
        """Print the reply to `text` and remember both; a turn that can't be answered is said to be, and forgotten."""
        asked: Message = {"role": "user", "content": text}
        try:
            dropped, pieces = self.speaker([*self.opening, *self.turns, asked])
        except ValueError as error:
            _note(str(error))
            return
        if dropped:
            _note(f"the context is full: the oldest {dropped} turns are forgotten")
        self.turns = [*self.turns[dropped:], asked, {"role": ASSISTANT, "content": _print(pieces)}]

    def _show_history(self) -> None:
        for turn in [*self.opening, *self.turns]:
            _print(iter([f"{turn['role']}: {turn['content']}"]))


def _line(read: Callable[[str], str], prompt: str) -> str | None:
    """The next line; None at the end of the input."""
    try:
        return read(prompt)
    except EOFError:
        return None
    except UnicodeDecodeError as error:
        raise BadInput(Problem(f"the input isn't text: {error}", "send it as UTF-8")) from error


def _print(pieces: Iterator[str]) -> str:
    """Write a text as it comes, and a line end; return it. What is no terminal gets it as it is."""
    show = harmless if sys.stdout.isatty() else str
    text = ""
    for piece in pieces:
        print(show(piece), end="", flush=True)
        text += piece
    print(flush=True)
    return text


def _help() -> str:
    return "; ".join(f"{name}: {what}" for name, what in COMMANDS.items())


def _note(text: str) -> None:
    print(f"({text})", file=sys.stderr, flush=True)


# Who answers


def engine(folder: Path, params: SamplingParams) -> Speaker:
    """The model in `folder`, in this process."""
    from llm.loading import load

    try:
        loaded = load(folder, slots=1)
    except ValueError as error:
        raise BadInput(Problem(str(error), "give a run, or a folder with a Hugging Face model")) from error

    def speak(messages: list[Message]) -> tuple[int, Iterator[str]]:
        kept = fit_window(loaded.tokenizer, messages, loaded.context, params.max_new_tokens)
        tokens = loaded.stream(render_turns(loaded.tokenizer, kept), params)
        return len(messages) - len(kept), (token.text for token in tokens)

    return speak


def service(address: str, model_name: str | None, params: SamplingParams) -> Speaker:
    """`model_name`, by default the first model, of the OpenAI-compatible service at `address` (`http://…/v1`)."""
    client = _client(address)
    settings = {"model": model_name or _first_model(client), "stream": True, **_as_fields(params)}

    def speak(messages: list[Message]) -> tuple[int, Iterator[str]]:
        response = _send(client, "POST", "chat/completions", {**settings, "messages": messages})
        if response.status_code in OF_THIS_TURN:
            raise ValueError(_complaint(response))
        _check(response)
        return int(response.headers.get(DROPPED_TURNS, 0)), _pieces(response)

    return speak


def _client(address: str) -> httpx.Client:
    try:
        return httpx.Client(base_url=address, timeout=httpx.Timeout(REPLY_WAIT_S, connect=CONNECT_WAIT_S))
    except httpx.InvalidURL as error:
        raise BadInput(
            Problem(f"{address} is no address: {error}", "give one such as http://127.0.0.1:8000/v1")
        ) from error


def _as_fields(params: SamplingParams) -> dict[str, Any]:
    """The request's fields for `params`; those that OpenAI's API lacks only where they change something."""
    fields = {"max_tokens": params.max_new_tokens, "temperature": params.temperature, "top_p": params.top_p}
    optional = {"top_k": params.top_k, "min_p": params.min_p, "stop": list(params.stop)}
    if params.seed is not None:
        fields["seed"] = params.seed
    return {**fields, **{name: value for name, value in optional.items() if value}}


def _first_model(client: httpx.Client) -> str:
    response = _send(client, "GET", "models")
    _check(response)
    try:
        return str(json.loads(response.read())["data"][0]["id"])
    except (ValueError, LookupError, TypeError) as error:
        raise BadInput(Problem(f"{response.url} lists no models", NO_SERVICE)) from error


def _send(client: httpx.Client, method: str, path: str, body: Any = None) -> httpx.Response:
    """The response, its body still to be read."""
    try:
        return client.send(client.build_request(method, path, json=body), stream=True)
    except httpx.HTTPError as error:
        raise BadInput(Problem(f"no answer from {client.base_url}: {error}", NO_SERVICE)) from error


def _check(response: httpx.Response) -> None:
    if response.status_code != 200:
        raise BadInput(Problem(f"{response.url} answers {response.status_code}: {_complaint(response)}", NO_SERVICE))


def _complaint(response: httpx.Response) -> str:
    """What a service says of a request that it refuses."""
    text = response.read().decode(errors="replace")
    try:
        return str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        return text[:200]


def _pieces(response: httpx.Response) -> Iterator[str]:
    """The reply's text out of a stream of server-sent events. HeadwaterError if it breaks off."""
    try:
        for line in response.iter_lines():
            if line.startswith("data: ") and line != "data: [DONE]":
                yield _text(json.loads(line.removeprefix("data: ")))
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise HeadwaterError(
            Problem(f"the reply broke off: {error}", "look at the service's log, ask again")
        ) from error
    finally:
        response.close()


def _text(event: dict[str, Any]) -> str:
    if "error" in event:
        raise ValueError(event["error"]["message"])
    return "".join(choice["delta"].get("content") or "" for choice in event["choices"])
