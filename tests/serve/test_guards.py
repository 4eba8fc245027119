"""The guards before an API of the test's own, spoken to in ASGI: what a server would hand over, and when."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import dataclass, field
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from serve import keys
from serve.bounds import Bounds
from serve.guards import LOOPBACK_HOSTS, Guard, Guards, guard
from serve.metrics import Metrics
from serve.refusals import RequestError
from tests.serve.test_metrics import samples

SECRET = "the prompt that nobody may log"
HANG_S = 60  # a test that waits longer has failed


class Api:
    """Endpoints that echo, hang, stream without an end, and fail; `cancelled` has those that learnt of their end."""

    def __init__(self):
        self.app = FastAPI(openapi_url=None)
        self.cancelled: list[str] = []
        self.entered = asyncio.Event()
        self.go = asyncio.Event()
        for path in ("echo", "hang", "stream", "fail", "fail_late", "reserve"):
            self.app.post(f"/v1/{path}", response_model=None)(getattr(self, path))
        self.app.get("/healthz")(self.health)
        self.app.get("/readyz")(self.health)
        self.app.get("/v1/models/{name:path}")(self.health)
        self.app.add_exception_handler(RequestError, self.refuse)

    async def refuse(self, _: Request, error: Any):
        return JSONResponse(error.body, error.status, error.headers)

    async def health(self):
        return {"status": "up"}

    async def echo(self, request: Request):
        return await request.json()

    async def reserve(self, request: Request):
        request.state.account.reserve(10, 50)
        request.state.account.charge(10, 5)
        return {"id": request.state.request_id}

    async def hang(self):
        await self._until_cancelled("hang")

    async def stream(self, request: Request):
        return StreamingResponse(self._events(request.state.account), media_type="text/event-stream")

    async def fail(self):
        raise ValueError(SECRET)

    async def fail_late(self):
        async def events():
            yield "data: 1\n\n"
            raise ValueError(SECRET)

        return StreamingResponse(events(), media_type="text/event-stream")

    async def _events(self, account):
        account.charge(10, 0)
        try:
            for number in range(10**6):
                account.charge(0, 1)
                yield f"data: {number}\n\n"
                await asyncio.sleep(0.001)
        except BaseException:
            self.cancelled.append("stream")
            raise

    async def _until_cancelled(self, name: str):
        self.entered.set()
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise


@dataclass
class Answer:
    """What was sent so far."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    complete: bool = False
    some: asyncio.Event = field(default_factory=asyncio.Event)  # a part of the body is there
    left: asyncio.Event = field(default_factory=asyncio.Event)  # set by a client that goes away
    reads: asyncio.Event = field(default_factory=asyncio.Event)  # cleared by a client that takes nothing more

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.body)["error"]

    def take(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            self.headers = {name.decode().lower(): value.decode() for name, value in message["headers"]}
        else:
            self.body += message.get("body", b"")
            self.complete = not message.get("more_body", False)
            self.some.set()


def begin(
    app: Guard, path: str, body: Any = b"", *, method: str = "POST", key: str = "", **headers: str
) -> tuple[Answer, asyncio.Task[None]]:
    """Send a request; its answer as it comes, and the server's task."""
    answer, pieces = Answer(), [body if isinstance(body, bytes) else json.dumps(body).encode()]
    answer.reads.set()

    async def receive() -> dict[str, Any]:
        if pieces:
            return {"type": "http.request", "body": pieces.pop(), "more_body": False}
        await answer.left.wait()
        return {"type": "http.disconnect"}

    async def send(message: dict[str, Any]) -> None:
        await answer.reads.wait()
        answer.take(message)

    given = {"host": "localhost:8000", "content_type": "application/json", **headers}
    if key:
        given["authorization"] = f"Bearer {key}"
    path, _, query = path.partition("?")
    scope = {
        "type": "http",
        "asgi": {"version": "3.0", "spec_version": "2.3"},
        "http_version": "1.1",
        "method": method,
        "path": path,
        "raw_path": path.encode(),
        "query_string": query.encode(),
        "root_path": "",
        "headers": [(name.replace("_", "-").encode(), value.encode()) for name, value in given.items()],
    }
    return answer, asyncio.create_task(app(scope, receive, send))


async def ask(app: Guard, path: str, body: Any = b"", **settings: Any) -> Answer:
    answer, task = begin(app, path, body, **settings)
    await asyncio.wait_for(task, HANG_S)
    return answer


def statuses(app: Guard) -> dict[tuple[str, str], float]:
    """Requests counted by path and status."""
    found = samples(app.metrics)
    return {name[1:]: value for name, value in found.items() if name[0] == "headwater_requests_total"}


@pytest.fixture
def run():
    """Run a test's coroutine, given an API and what makes its guards."""

    def run(test, **settings: Any) -> None:
        async def main() -> None:
            api = Api()
            await test(api, guard(api.app, Guards(**settings), Metrics(["tiny"])))

        asyncio.run(asyncio.wait_for(main(), 2 * HANG_S))

    return run


def test_what_the_api_does_not_have_is_closed(run):
    async def test(api, app):
        for method, path, status in [
            ("GET", "/", 404),
            ("GET", "/docs", 404),
            ("GET", "/openapi.json", 404),
            ("POST", "/v1/echo/", 404),  # no redirect
            ("POST", "/v1/../healthz", 404),
            ("GET", "/v1/echo", 405),
            ("DELETE", "/healthz", 405),
            ("POST", "/metrics", 405),
            ("GET", "/v1/models/a/b", 200),
            ("GET", "/healthz?x=1", 200),
        ]:
            answer = await ask(app, path, method=method)
            assert (path, answer.status) == (path, status)
            if status != 200:
                assert set(answer.error) == {"message", "type", "param", "code"}
        assert (await ask(app, "/v1/echo", method="GET")).headers["allow"] == "POST"
        assert statuses(app)["unknown", "404"] == 5
        assert statuses(app)["/v1/models/{name:path}", "200"] == 1

    run(test)


def test_other_sites_are_told_nothing(run):
    async def test(api, app):
        origin = {"origin": "https://evil.example", "access_control_request_method": "POST"}
        preflight = await ask(app, "/v1/echo", method="OPTIONS", **origin)
        simple = await ask(app, "/v1/echo", {}, **{**origin, "content_type": "text/plain"})
        allowed = await ask(app, "/v1/echo", {}, origin="https://evil.example")
        assert (preflight.status, simple.status, allowed.status) == (405, 415, 200)
        for answer in (preflight, simple, allowed):
            assert not [name for name in answer.headers if name.startswith("access-control")]

    run(test)


def test_a_name_that_others_made_point_here_is_refused(run):
    async def test(api, app):
        for host in ("localhost", "localhost:8000", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"):
            assert (await ask(app, "/healthz", method="GET", host=host)).status == 200
        for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "", "127.0.0.1:x"):
            assert (await ask(app, "/healthz", method="GET", host=host)).status == 421

    run(test, hosts=LOOPBACK_HOSTS)


def test_a_body_is_judged_before_the_api_sees_it(run):
    async def test(api, app):
        assert (await ask(app, "/v1/echo", {"model": "tiny", "a": "é"})).body == '{"model":"tiny","a":"é"}'.encode()
        assert (await ask(app, "/v1/echo", b'{"a": 1, "a": 2}')).status == 400
        assert (await ask(app, "/v1/echo", b"[" * 500)).status == 400
        large = await ask(app, "/v1/echo", b'"' + b"a" * 1000 + b'"')
        assert (large.status, large.headers["connection"]) == (413, "close")
        assert (await ask(app, "/v1/echo", {}, x="a" * 20_000)).status == 431
        assert (await ask(app, "/v1/echo?" + "a" * 9000, {})).status == 414
        assert samples(app.metrics)["headwater_refusals_total", "body"] == 3

    run(test, bounds=Bounds(body_bytes=1000))


@pytest.fixture
def file(tmp_path):
    return tmp_path / "keys.json"


def test_without_a_valid_key_nothing_is_let_in(run, file):
    text = keys.add(file, "a")

    async def test(api, app):
        for headers in ({}, {"key": "hw-wrong"}, {"authorization": f"Basic {text}"}, {"authorization": "Bearer"}):
            answer = await ask(app, "/v1/hang", {}, **headers)  # which would hang if it were let in
            assert (answer.status, answer.error["code"]) == (401, "invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        assert (await ask(app, "/v1/echo", {}, key=text)).status == 200
        assert (await ask(app, "/v1/echo", {}, authorization=f"bearer  {text}")).status == 200
        assert (await ask(app, "/metrics", method="GET")).status == 401
        assert (await ask(app, "/metrics", method="GET", key=text)).status == 200
        for probe in ("/healthz", "/readyz"):
            assert (await ask(app, probe, method="GET")).status == 200

    run(test, keys_file=str(file))


def test_a_damaged_file_of_keys_lets_nobody_in(run, file):
    text = keys.add(file, "a")

    async def test(api, app):
        file.write_text("{")
        answer = await ask(app, "/v1/echo", {}, key=text)
        assert (answer.status, str(file) in answer.error["message"]) == (503, False)

    run(test, keys_file=str(file))


def test_a_revoked_key_ends_with_what_runs_under_it(run, file):
    text = keys.add(file, "a")

    async def test(api, app):
        answer, task = begin(app, "/v1/stream", {}, key=text)
        await answer.some.wait()
        keys.revoke(file, "a")
        assert (await ask(app, "/v1/echo", {}, key=text)).status == 401
        await asyncio.wait_for(task, HANG_S)
        last = answer.body.decode().split("\n\n")[-2]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "invalid_api_key"
        assert answer.complete
        assert api.cancelled == ["stream"]

    run(test, keys_file=str(file))


def test_budgets_of_a_key(run, file):
    few = keys.add(file, "few", limits={"requests_per_minute": 2})
    one = keys.add(file, "one", limits={"concurrent": 1})
    tokens = keys.add(file, "tokens", limits={"tokens_per_minute": 100})
    narrow = keys.add(file, "narrow", limits={"models": ["tiny"]})

    async def test(api, app):
        assert [(await ask(app, "/v1/echo", {}, key=few)).status for _ in range(3)] == [200, 200, 429]
        _, running = begin(app, "/v1/hang", {}, key=one)
        await api.entered.wait()
        refused = await ask(app, "/v1/echo", {}, key=one)
        assert (refused.status, refused.headers["retry-after"]) == (429, "1")
        api.go.set()
        await running
        assert (await ask(app, "/v1/echo", {}, key=one)).status == 200
        # 60 are reserved and 15 charged each time, whatever the clock adds meanwhile.
        assert [(await ask(app, "/v1/reserve", {}, key=tokens)).status for _ in range(3)] == [200] * 3
        assert (await ask(app, "/v1/reserve", {}, key=tokens)).error["code"] == "rate_limit_exceeded"
        assert (await ask(app, "/v1/echo", {"model": "tiny"}, key=narrow)).status == 200
        other = await ask(app, "/v1/echo", {"model": "large"}, key=narrow)
        assert (other.status, other.error["code"]) == (404, "model_not_found")

    run(test, keys_file=str(file))


@pytest.mark.parametrize("path", ["hang", "stream"])
def test_a_client_that_leaves_cancels_what_runs_for_it(run, path):
    async def test(api, app):
        answer, task = begin(app, f"/v1/{path}", {})
        await (api.entered if path == "hang" else answer.some).wait()
        answer.left.set()
        await asyncio.wait_for(task, HANG_S)
        assert api.cancelled == [path]
        assert statuses(app) == {(f"/v1/{path}", "499"): 1}
        assert app.in_flight == 0

    run(test)


def test_a_server_that_cancels_the_request_cancels_what_runs_for_it(run):
    """As Ray Serve does when a client leaves."""

    async def test(api, app):
        _, task = begin(app, "/v1/hang", {})
        await api.entered.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert api.cancelled == ["hang"]
        assert statuses(app) == {("/v1/hang", "499"): 1}

    run(test)


def test_a_client_that_takes_nothing_ends_its_stream(run):
    async def test(api, app):
        answer, task = begin(app, "/v1/stream", {})
        await answer.some.wait()
        answer.reads.clear()
        await asyncio.wait_for(task, HANG_S)
        assert not answer.complete
        await _until(lambda: api.cancelled == ["stream"])
        assert statuses(app) == {("/v1/stream", "499"): 1}

    run(test, write_deadline_s=0.2)


async def _until(true) -> None:
    while not true():
        await asyncio.sleep(0.01)


def test_the_deadline_before_the_first_byte_and_after(run):
    async def test(api, app):
        hanging = await ask(app, "/v1/hang", {})
        assert (hanging.status, hanging.error["code"]) == (504, "timeout")
        begun = await ask(app, "/v1/stream", {})
        *events, last, nothing = begun.body.decode().split("\n\n")
        assert (begun.status, begun.complete, nothing) == (200, True, "")
        assert events[:2] == ["data: 0", "data: 1"]
        assert json.loads(last.removeprefix("data: "))["error"]["type"] == "server_error"
        assert api.cancelled == ["hang", "stream"]

    run(test, deadline_s=0.5)


def test_a_failure_is_told_without_its_words(run, caplog):
    async def test(api, app):
        failed = await ask(app, "/v1/fail", {})
        late = await ask(app, "/v1/fail_late", {})
        assert (failed.status, late.status, late.complete) == (500, 200, True)
        assert (
            json.loads(late.body.decode().split("\n\n")[1].removeprefix("data: "))["error"]["type"] == "server_error"
        )
        assert SECRET not in str(failed.body) + str(late.body) + caplog.text
        assert "failed with ValueError at" in caplog.text
        assert statuses(app)["/v1/fail", "500"] == 1

    run(test)


def test_a_service_that_ends_lets_nobody_in_and_finishes_what_runs(run):
    async def test(api, app):
        running, task = begin(app, "/v1/hang", {})
        await api.entered.wait()
        app.drain()
        refused = await ask(app, "/v1/echo", {})
        assert (refused.status, refused.headers["retry-after"], refused.headers["connection"]) == (503, "1", "close")
        assert (await ask(app, "/readyz", method="GET")).status == 503
        assert (await ask(app, "/healthz", method="GET")).status == 200
        drained = asyncio.create_task(app.drained())
        await asyncio.sleep(0.05)
        assert not drained.done()
        api.go.set()
        await asyncio.wait_for(drained, HANG_S)
        await task
        assert running.status == 200

    run(test)


def test_no_more_at_once_than_there_is_room_for(run):
    async def test(api, app):
        tasks = [begin(app, "/v1/hang", {})[1] for _ in range(2)]
        await asyncio.sleep(0)
        refused = await ask(app, "/v1/echo", {})
        assert (refused.status, refused.error["code"]) == (429, "overloaded")
        assert (await ask(app, "/healthz", method="GET")).status == 200
        api.go.set()
        await asyncio.gather(*tasks)
        assert (await ask(app, "/v1/echo", {})).status == 200

    run(test, max_in_flight=2)


def test_the_log_has_a_line_for_each_request_and_no_prompt_and_no_key(run, file, caplog):
    text = keys.add(file, "laptop")
    caplog.set_level(logging.INFO, "test.requests")

    async def test(api, app):
        answer = await ask(app, "/v1/reserve", {"model": "tiny", "prompt": SECRET}, key=text, x_request_id="mine-1")
        assert answer.headers["x-request-id"] == "mine-1"
        assert json.loads(answer.body) == {"id": "mine-1"}
        forged = await ask(app, f"/{SECRET}", {"model": SECRET}, key="hw-wrong", x_request_id='x" "y')
        assert len(forged.headers["x-request-id"]) == 32
        await ask(app, "/v1/echo", {"model": SECRET}, key=text, method="POST")

    run(test, keys_file=str(file), request_logger="test.requests")
    lines = [json.loads(record.getMessage()) for record in caplog.records if record.name == "test.requests"]
    first = {name: lines[0][name] for name in ("id", "method", "path", "status", "model", "key")}
    assert first == {
        "id": "mine-1", "method": "POST", "path": "/v1/reserve", "status": 200, "model": "tiny", "key": "laptop"
    }  # fmt: skip
    assert (lines[0]["prompt_tokens"], lines[0]["completion_tokens"]) == (10, 5)
    assert [(line["path"], line["status"], line["model"]) for line in lines[1:]] == [
        ("unknown", 404, "other"),
        ("/v1/echo", 200, "other"),
    ]
    assert SECRET not in caplog.text
    assert text not in caplog.text
    assert "wrong" not in caplog.text


def test_tokens_of_a_stream_that_breaks_off_are_charged(run, file):
    text = keys.add(file, "a", limits={"tokens_per_day": 1000})

    async def test(api, app):
        answer, task = begin(app, "/v1/stream", {}, key=text)
        await _until(lambda: b"data: 4\n\n" in answer.body)
        answer.left.set()
        await asyncio.wait_for(task, HANG_S)
        made = answer.body.count(b"data: ")
        spent = app.accounts.open(keys.stored(file)[0])._spending.tokens["a day"]._used
        assert 10 + made <= spent <= 10 + made + 1  # the one that was on its way

    run(test, keys_file=str(file))


def test_websockets_are_refused(run):
    async def test(api, app):
        sent = []

        async def send(message):
            sent.append(message)

        await app({"type": "websocket", "path": "/v1/echo"}, None, send)
        assert [message["type"] for message in sent] == ["websocket.close"]

    run(test)
