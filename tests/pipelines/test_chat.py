"""Talking from the terminal: with a model in the process, with a service, and through a pipe."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from cluster.errors import BadInput, HeadwaterError
from llm.chat import render_turns
from llm.loading import load
from llm.sampling import SamplingParams
from pipelines.chat import Conversation, chat
from tests.models import save_tiny_model
from tests.serve.local import local_service

CHECKOUT = Path(__file__).resolve().parents[2]
PARAMS = SamplingParams(max_new_tokens=8, seed=4, top_k=50, stop=("@@",))
FIRST, LONG = "The first line, " * 3, "The cat sat on the mat, " * 8


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def engine(folder):
    return load(folder)


@pytest.fixture(scope="module")
def service(folder) -> Iterator[str]:
    with local_service(folder, "tiny") as address:
        yield address


@pytest.fixture(params=["folder", "service"])
def target(request):
    """What to talk with: both say the same."""
    return request.getfixturevalue(request.param)


def reader(*lines: str):
    """`input` for someone who types `lines` and then Ctrl-D."""
    rest = iter(lines)

    def read(prompt: str) -> str:
        try:
            return next(rest)
        except StopIteration:
            raise EOFError from None

    return read


def replies(engine, lines: list[str], system: str | None = None) -> list[str]:
    """What the engine says to each line, knowing the ones before it."""
    messages = [{"role": "system", "content": system}] if system else []
    said = []
    for line in lines:
        messages.append({"role": "user", "content": line})
        said.append(engine.generate([render_turns(engine.tokenizer, messages)], PARAMS)[0].text)
        messages.append({"role": "assistant", "content": said[-1]})
    return said


def test_every_reply_knows_what_was_said_before(target, engine, capsys):
    chat(target, params=PARAMS, system="Be brief.", read=reader("The cat", "", "  ", "naïve <|end|>"))
    assert capsys.readouterr().out == "".join(
        f"{reply}\n" for reply in replies(engine, ["The cat", "naïve <|end|>"], "Be brief.")
    )


def test_commands(target, engine, capsys):
    chat(
        target, params=PARAMS, system="Be brief.", read=reader("The cat", "/new", "def", "/history", "/quit", "never")
    )
    (first,), (second,) = replies(engine, ["The cat"], "Be brief."), replies(engine, ["def"], "Be brief.")
    shown = f"system: Be brief.\nuser: def\nassistant: {second}\n"
    assert capsys.readouterr().out == f"{first}\n{second}\n{shown}"


def test_a_mistyped_command_is_no_turn(folder, capsys):
    chat(folder, params=PARAMS, read=reader("/exit", "/history"))
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "(no command /exit; /quit: end; /new: forget what was said; /history: show what is remembered)\n"


def test_the_oldest_turns_are_forgotten_and_said_to_be(target, capsys):
    chat(target, params=PARAMS, read=reader(FIRST, LONG, LONG, "/history"))
    out, err = capsys.readouterr()
    assert "the context is full: the oldest 2 turns are forgotten" in err
    history = out[out.index("user: ") :]
    assert FIRST not in history
    assert history.count("user: ") == history.count(f"user: {LONG}") == 2


def test_a_turn_that_cannot_be_answered_is_forgotten(target, engine, capsys):
    chat(target, params=PARAMS, read=reader("The cat", LONG * 9, "def"))
    out, err = capsys.readouterr()
    assert "more than the context of 256: shorten either" in err
    assert out == "".join(f"{reply}\n" for reply in replies(engine, ["The cat", "def"]))


PIPED = """
import sys
from pathlib import Path
from llm.sampling import SamplingParams
from pipelines.chat import chat
chat(Path(sys.argv[1]), params=SamplingParams(max_new_tokens=8, seed=4, top_k=50, stop=("@@",)))
"""


def piped(folder: Path, text: bytes) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-c", PIPED, str(folder)]
    return subprocess.run(command, cwd=CHECKOUT, input=text, capture_output=True, timeout=120)


def test_a_pipe_gets_replies_and_nothing_else(folder, engine):
    done = piped(folder, "The cat\nnaïve".encode())
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode() == "".join(f"{reply}\n" for reply in replies(engine, ["The cat", "naïve"]))
    assert b"(" not in done.stderr


def test_bytes_that_are_no_text_are_refused():
    def read(prompt: str) -> str:
        return b"\xff".decode()

    with pytest.raises(BadInput, match=r"the input isn't text: .*0xff"):
        Conversation(lambda messages: (0, iter(["yes"]))).hold(read)


def test_what_is_no_model_or_service_is_refused(tmp_path, service, folder):
    for target, message in [
        (tmp_path, r"no config\.json"),
        ("http://127.0.0.1:9/v1", r"(?s)no answer from http://127.0.0.1:9/v1.*headwater serve"),
        ("http://host:port/v1", "is no address"),
        (service.removesuffix("/v1"), "answers 404"),
    ]:
        with pytest.raises(BadInput, match=message):
            chat(target, params=PARAMS, read=reader())
    with pytest.raises(BadInput, match="answers 404: no model 'gpt' here; there is 'tiny'"):
        chat(service, params=PARAMS, model_name="gpt", read=reader("The cat"))


class BreaksOff(BaseHTTPRequestHandler):
    """A service that says one word and an error."""

    def do_POST(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'data: {"choices": [{"delta": {"content": "Well"}}]}\n\n')
        self.wfile.write(b'data: {"error": {"message": "the engine failed"}}\n\n')

    def log_message(self, *_) -> None:
        pass


def test_a_service_that_breaks_off_ends_the_conversation(capsys):
    server = HTTPServer(("127.0.0.1", 0), BreaksOff)
    threading.Thread(target=server.handle_request).start()
    with pytest.raises(HeadwaterError, match="the reply broke off: the engine failed"):
        chat(f"http://127.0.0.1:{server.server_port}/v1", model_name="any", params=PARAMS, read=reader("Hi"))
    server.server_close()
    assert capsys.readouterr().out == "Well"
