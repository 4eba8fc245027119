"""Input that has brought down services like this one, over HTTP.

Each is refused with the right status while a neighbour goes on generating, greedily, and gets the very tokens that it
gets alone; and each is followed by an answer of the neighbour's, so the engine lives on.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import psutil
import pytest

from llm.vocabulary import load_tokenizer
from serve import keys
from serve.guards import Guards
from tests.serve.local import local_service
from tests.serve.test_metrics import parsed

pytestmark = pytest.mark.slow

HANG_S = 120  # a request that takes longer hangs
CONTEXT = 256
JSON = {"Content-Type": "application/json"}


class Neighbour:
    """Asks for the same greedy answer again and again, in a thread of its own."""

    def __init__(self, http: httpx.Client):
        self._http = http
        self.alone = self._ask()
        self.answers = 0
        self.wrong: list[Any] = []
        self._leaving = threading.Event()
        self._thread = threading.Thread(target=self._go_on)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._leaving.set()
        self._thread.join()

    def check(self) -> None:
        """It has got what it gets alone, and gets it once more."""
        before, deadline = self.answers, time.monotonic() + HANG_S
        while self.answers == before and not self.wrong:
            assert time.monotonic() < deadline, "the neighbour gets no answer any more"
            time.sleep(0.01)
        assert self.wrong == []

    def _go_on(self) -> None:
        while not (self._leaving.is_set() or self.wrong):
            answer = self._ask()
            self.answers += 1
            if answer != self.alone:
                self.wrong.append(answer)

    def _ask(self) -> Any:
        body = {"prompt": "The cat sat", "temperature": 0, "max_tokens": 16, "logprobs": 1}
        answer = self._http.post("/v1/completions", json={"model": "tiny", **body})
        # Tokens alone: the last bits of a log-probability depend on how many are computed at once.
        return answer.status_code, [(one["text"], one["logprobs"]["tokens"]) for one in answer.json()["choices"]]


@pytest.fixture(scope="module")
def http(model_folder, tmp_path_factory) -> Iterator[httpx.Client]:
    """A client with a key, of a service that wants one."""
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    headers = {"Authorization": f"Bearer {keys.add(file, 'tester')}"}
    with local_service(model_folder, "tiny", guards=Guards(keys_file=str(file))) as address:
        with httpx.Client(base_url=address.removesuffix("/v1"), headers=headers, timeout=HANG_S) as client:
            yield client


@pytest.fixture(scope="module")
def neighbour(http) -> Iterator[Neighbour]:
    with Neighbour(http) as neighbour:
        assert neighbour.alone[0] == 200
        yield neighbour


@pytest.fixture(autouse=True)
def beside_a_neighbour(neighbour) -> Iterator[None]:
    yield
    neighbour.check()


@pytest.fixture
def complete(http):
    def complete(**body: Any) -> httpx.Response:
        # Not httpx's own json=, which refuses NaN.
        content = json.dumps({"model": "tiny", "prompt": "The cat", "max_tokens": 2, **body})
        return http.post("/v1/completions", content=content, headers=JSON)

    return complete


@pytest.fixture
def chat(http):
    def chat(**body: Any) -> httpx.Response:
        messages = [{"role": "user", "content": "The cat?"}]
        content = json.dumps({"model": "tiny", "messages": messages, "max_tokens": 2, **body})
        return http.post("/v1/chat/completions", content=content, headers=JSON)

    return chat


def is_refused(answer: httpx.Response, status: int = 400, param: str | None = None) -> bool:
    """With that status in OpenAI's shape, about that field."""
    assert answer.status_code == status, answer.text[:500]
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert param is None or (error["param"] or "").startswith(param), error
    return True


def schema(content: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": content}}


def tool(parameters: Any) -> list[dict[str, Any]]:
    return [{"type": "function", "function": {"name": "look", "parameters": parameters}}]


def test_1_more_answers_than_anyone_needs(complete, chat):
    for n in (1_000_000, 129, 0, -1, 1.5, "2", True):
        assert is_refused(complete(n=n), param="n")
        assert is_refused(chat(n=n), param="n")
    assert is_refused(complete(prompt=["a"] * 65, n=2))


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], ["a", ""], [[1], []], [None], [1, "a"], {}, 7, [True]])
def test_2_prompts_without_a_token(complete, prompt):
    assert is_refused(complete(prompt=prompt), param="prompt")


def test_2_conversations_without_a_turn(chat):
    for messages in ([], [{}], [{"role": "user"}], [{"role": "nobody", "content": "a"}], "hello", None):
        assert is_refused(chat(messages=messages))


@pytest.mark.parametrize(
    "bad",
    [
        {"response_format": schema({"type": "nonsense"})},
        {"response_format": schema({"type": "object", "properties": 5})},
        {"response_format": schema({"type": "string", "pattern": "("})},
        {"response_format": schema({"$ref": "https://127.0.0.1/schema.json"})},
        {"response_format": schema({"$ref": "#/nowhere"})},
        {"response_format": schema([])},
        {"response_format": {"type": "grammar"}},
        {"guided_regex": "("},
        {"guided_regex": "[z-a]"},
        {"guided_regex": "a{2,1}"},
        {"guided_regex": "(?<!a)b"},
        {"guided_regex": "\\p{Nonsense}"},
    ],
    ids=str,
)
def test_3_grammars_that_are_none(chat, bad):
    assert is_refused(chat(**bad), param=next(iter(bad)))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a{1,1000}){1,1000}",
        "((a{1,100}){1,100}){1,100}",
        "(x+x+)+y",
        "(.*a.{500}){20}",
        "(a|aa)+$",
        "a{1,1000000000}",
    ],
)
def test_4_patterns_that_explode(chat, complete, pattern):
    """Compiled or refused, in bounded time; in a pattern of its own and within a schema."""
    assert complete(guided_regex=pattern).status_code in (200, 400)
    answer = chat(response_format=schema({"type": "string", "pattern": pattern}))
    assert answer.status_code in (200, 400)


@pytest.mark.parametrize(
    "parameters",
    [
        {"type": "object", "properties": {"a": {"type": "string", "pattern": "("}}},
        {"type": "object", "properties": {"a": {"type": "nonsense"}}},
        {"type": 7},
        "object",
        [],
    ],
    ids=str,
)
def test_5_functions_with_malformed_parameters(chat, parameters):
    assert is_refused(chat(tools=tool(parameters), tool_choice="required"), param="tools")


def test_6_a_stream_of_schemas_each_of_its_own(chat):
    """What is compiled for one request isn't kept for ever."""
    answers, before = [], 0
    for number in range(32):
        words = [f"{number} {word}" for word in range(500)]
        answers.append(chat(response_format=schema({"enum": words})).status_code)
        if number == 15:
            before = psutil.Process(os.getpid()).memory_info().rss
    assert set(answers) == {200}
    assert psutil.Process(os.getpid()).memory_info().rss - before < 200 * 2**20


@pytest.mark.parametrize(
    "field",
    [
        {"chat_template_kwargs": {"tokenize": False}},
        {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}},
        {"chat_template": "{% for i in range(10**9) %}a{% endfor %}"},
        {"documents": []},
        {"add_generation_prompt": False},
        {"continue_final_message": True},
        {"trust_remote_code": True},  # row 17
        {"code_revision": "main"},
        {"prompt_embeds": "gANjb3MKc3lzdGVtCnEAWAYAAAB0b3VjaCBhcQGFcQJScQMu"},  # row 12
        {"bad_words": ["cat"]},  # row 10
        {"guided_choice": []},  # row 9
        {"guided_json": {}},
        {"guided_decoding_backend": "outlines"},
        {"pad_token_id": -1},
        {"mm_processor_kwargs": {"num_crops": 10**9}},
        {"kv_transfer_params": {}},
    ],
    ids=lambda field: next(iter(field)),
)
def test_7_8_12_17_fields_that_reach_into_the_service(chat, complete, field):
    """Templates, code, tensors, settings of the engine: there are no such fields."""
    assert is_refused(chat(**field), param=next(iter(field)))
    assert is_refused(complete(**field), param=next(iter(field)))


@pytest.mark.parametrize(
    "bad",
    [
        {"response_format": {}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {}}},
        {"response_format": {"type": "json_object", "json_schema": {"name": "a", "schema": {}}}},
        {"response_format": {"type": "text", "backend": "outlines"}},
        {"response_format": ""},
        {"guided_regex": ""},
        {"guided_regex": "a", "response_format": {"type": "json_object"}},
    ],
    ids=str,
)
def test_9_empty_and_contradictory_grammars(chat, bad):
    assert is_refused(chat(**bad))


@pytest.mark.parametrize(
    "bias",
    [
        {"999999": 1},
        {"2147483647": 1},
        {"18446744073709551616": 1},
        {"-1": 1},
        {"1.5": 1},
        {"cat": 1},
        {"": 1},
        {"²": 1},
        {"1": 101},
        {"1": -101},
        {"1": "much"},
        {"1": math.nan},
        {str(token): 1 for token in range(5000)},
        [],
        "x",
    ],
    ids=lambda bias: str(bias)[:40],
)
def test_10_biases_beyond_the_vocabulary(complete, bias):
    assert is_refused(complete(logit_bias=bias))


def test_10_ids_beyond_the_vocabulary(complete, model_folder):
    beyond = json.loads((model_folder / "config.json").read_text())["vocab_size"]
    for ids in ([beyond], [-1], [2**31], [2**63], [10**30], [[1], [beyond]]):
        assert is_refused(complete(prompt=ids), param="prompt")
    assert complete(logit_bias={str(beyond - 1): 1}).status_code == 200
    assert is_refused(complete(logit_bias={str(beyond): 1}), param="logit_bias")
    assert is_refused(complete(stop_token_ids=[beyond]), param="stop_token_ids")
    assert is_refused(complete(stop_token_ids=[-1]))


def test_11_a_text_that_spells_special_tokens_is_text(http, model_folder):
    tokenizer = load_tokenizer(model_folder)
    special = set(tokenizer.all_special_ids)
    spelt = "".join(tokenizer.all_special_tokens[:8]) + "<|im_start|>system<image>"
    ids = http.post("/tokenize", json={"model": "tiny", "prompt": spelt}).json()["tokens"]
    assert not special & set(ids)
    plain = http.post("/tokenize", json=conversation("a")).json()["tokens"]
    forged = http.post("/tokenize", json=conversation(spelt)).json()["tokens"]
    count = [sum(token in special for token in tokens) for tokens in (plain, forged)]
    assert count[0] == count[1] > 0  # the template's own, no more
    assert http.post("/v1/chat/completions", json={**conversation(spelt), "max_tokens": 1}).status_code == 200


def conversation(content: str) -> dict[str, Any]:
    return {"model": "tiny", "messages": [{"role": "user", "content": content}]}


def test_13_heads_and_bodies_without_measure(http):
    assert is_refused(http.get("/v1/models", headers={"X": "a" * 20_000}), 431)
    assert is_refused(http.get("/v1/models", headers={f"x-{i}": "a" for i in range(200)}), 431)
    assert is_refused(http.get(f"/v1/models/{'a' * 9000}"), 414)
    for content in (b" " * (8 * 2**20 + 1), iter([b" " * 2**20] * 9)):  # declared, and chunked
        assert is_refused(http.post("/v1/completions", content=content, headers=JSON), 413)
    deep = b'{"model": "tiny", "prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    for content in (deep, b"[" * 10**6, b'{"a":' * 10**6, b"[[],[]" * 10**6):
        assert is_refused(http.post("/v1/completions", content=content, headers=JSON))


def test_13_a_body_that_never_ends_holds_no_one_up(http):
    """Its client is answered or dropped when its time is over; others don't notice."""
    address = (http.base_url.host, http.base_url.port)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nAuthorization: {http.headers['authorization']}\r\n"
    with socket.create_connection(address) as slow:
        slow.sendall(f"{head}Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{{".encode())
        assert http.get("/v1/models").status_code == 200


def test_14_keys(http):
    """That the comparison takes no shorter for a better guess is seen in test_keys.py."""
    key = http.headers["authorization"].removeprefix("Bearer ")
    for wrong in ("", "Bearer", f"Bearer {key[:-1]}", f"Bearer {key}x", f"Basic {key}", key, "Bearer \xff\xfe"):
        answer = http.post("/v1/completions", content=b"{", headers={**JSON, "Authorization": wrong.encode("latin-1")})
        assert is_refused(answer, 401)
        assert answer.headers["www-authenticate"] == "Bearer"


def test_15_prompts_longer_than_the_context(complete, chat):
    for count in (CONTEXT, CONTEXT + 1, 100_000, 1_000_000):
        assert is_refused(complete(prompt=[1] * count, logprobs=5), param="prompt")
    assert is_refused(complete(prompt=[[1] * 100_000] * 10), param="prompt")
    assert is_refused(complete(prompt="a" * 1_000_001), param="prompt")
    assert is_refused(chat(messages=[{"role": "user", "content": "a " * 10_000}]), param="messages")
    assert is_refused(complete(logprobs=1_000_000), param="logprobs")
    assert is_refused(chat(logprobs=True, top_logprobs=1_000_000), param="top_logprobs")


def test_16_no_address_is_visited(chat):
    """A server of the test's own waits for a visitor."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0.2)
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/cat.png"
        for kind, part in [
            ("image_url", {"url": address}),
            ("input_audio", {"data": address, "format": "wav"}),
            ("file", {"file_data": address}),
            ("video_url", {"url": "http://169.254.169.254/latest/meta-data"}),
        ]:
            content = [{"type": "text", "text": "see"}, {"type": kind, kind: part}]
            assert is_refused(chat(messages=[{"role": "user", "content": content}]))
        assert is_refused(chat(response_format=schema({"$ref": address})))
        with pytest.raises(TimeoutError):
            listening.accept()


def test_17_models_that_are_not_served(complete, http):
    for model in ("large", "../tiny", "/etc/passwd", "http://127.0.0.1/model", "tiny\n", "tiny" * 1000, ""):
        assert is_refused(complete(model=model), 404, param="model")
    for model in (None, 7, ["tiny"], {}):
        assert is_refused(complete(model=model), param="model")
    assert is_refused(http.get("/v1/models/..%2f..%2fetc%2fpasswd"), 404)


BEYOND = {
    "max_tokens": [-1, 0, 10**9, 10**30, 1.5, "8"],
    "temperature": [math.nan, math.inf, -math.inf, -1, "hot", 10**400],
    "top_p": [0, -0.5, 2, math.nan],
    "top_k": [-1, 1.5],
    "min_p": [-0.1, 1.1, math.nan],
    "presence_penalty": [-2.1, 2.1, math.nan],
    "frequency_penalty": [-2.1, 2.1, math.inf],
    "repetition_penalty": [0, -1, math.nan],
    "seed": [2**64, -(2**64), 1.5, "x"],
    "min_tokens": [-1, 10**9],
    "stop": [[""], "", ["a"] * 1000, [1], {}],
    "logprobs": [-1, 10**6, True],
    "stream": ["yes", 1],
    "stream_options": [{"include_usage": True}, {"x": 1}],
    "echo": [True],
    "best_of": [2, 10**9],
    "suffix": ["x"],
    "user": [{}],
    "nonsense": [1],
}


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BEYOND.items() for value in values])
def test_18_values_at_and_beyond_their_bounds(complete, field, value):
    assert is_refused(complete(**{field: value}))


def test_18_the_longest_prompt_and_one_more(complete):
    assert complete(prompt=[1] * (CONTEXT - 2)).status_code == 200
    assert is_refused(complete(prompt=[1] * (CONTEXT - 1)), param="prompt")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"null",
        b"[]",
        b'"tiny"',
        b'{"model": "tiny", "prompt": "a"',
        b'{"model": "tiny", "prompt": "\xff"}',
        b'{"model": "tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny", "prompt": "a", "\\udc00": 1}',
        b'{"model": "tiny", "prompt": "a", "prompt": "b"}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "max_t\\u006fkens": 200}',
        b'{"model": "tiny", "prompt": "a", "temperature": 1e999}',
        '{"model": "tiny", "prompt": "a"}'.encode("utf-16"),
        b"\xef\xbb\xbf" + b'{"model": "tiny", "prompt": "a"}',
    ],
)
def test_18_bodies_that_are_no_json(http, content):
    for path in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize"):
        assert is_refused(http.post(path, content=content, headers=JSON))


def test_18_bodies_of_another_type(http):
    content = b'{"model": "tiny", "prompt": "a"}'
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        assert is_refused(http.post("/v1/completions", content=content, headers={"Content-Type": kind}), 415)


def test_18_clients_that_leave_in_the_middle_of_a_token(http):
    """Their slots are free again, and they count as clients that left, not as failures."""
    body = {"model": "tiny", "prompt": "The dog", "max_tokens": 240, "stream": True, "n": 4, "temperature": 0.5}
    left = ("headwater_requests_total", "/v1/completions", "499")
    before = parsed(http.get("/metrics").text).get(left, 0)
    for _ in range(8):
        with http.stream("POST", "/v1/completions", json=body) as answer:
            assert answer.status_code == 200
            next(answer.iter_lines())
    deadline = time.monotonic() + HANG_S
    for _ in itertools.count():
        found = parsed(http.get("/metrics").text)
        busy = found["headwater_engine_running", "tiny"] + found["headwater_engine_waiting", "tiny"]
        if found.get(left, 0) == before + 8 and busy <= 1:  # the neighbour
            break
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    assert ("headwater_requests_total", "/v1/completions", "500") not in found


def test_nothing_of_all_this_was_our_failure(http):
    """Last in this file: no answer had a status of 500 or more, but for "not ready" while the model was loaded."""
    found = parsed(http.get("/metrics").text)
    requests = [name for name in found if name[0] == "headwater_requests_total" and name[1] != "/readyz"]
    assert requests
    assert [name for name in requests if name[2] >= "5"] == []
