from __future__ import annotations

import socket
import time
from pathlib import Path

import httpx
import openai
import pytest

from cluster.errors import BadInput
from llm.loading import load
from llm.sampling import SamplingParams
from llm.vocabulary import encode_text
from serve import app
from tests.serve.conftest import free_port

PROMPT = "The cat"

JSON = {"Content-Type": "application/json"}

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def engine(model_folder):
    return load(model_folder)


@pytest.fixture
def client(service) -> openai.OpenAI:
    return openai.OpenAI(base_url=service, api_key="none", max_retries=0)


@pytest.fixture
def http(service) -> httpx.Client:
    return httpx.Client(base_url=service.removesuffix("/v1"), timeout=60)


def expected(engine, prompt: str = PROMPT, **settings):
    params = SamplingParams(**{"max_new_tokens": 24, "temperature": 1.0, "seed": 5, **settings})
    return engine.generate([encode_text(engine.tokenizer, prompt)], params)[0]


@slow
def test_health_and_models(http, client):
    assert http.get("/healthz").json() == {"status": "up"}
    assert http.get("/readyz").json() == {"status": "ready", "models": ["tiny"]}
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").object == "model"


@slow
def test_a_completion_is_the_engines(client, engine):
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, seed=5, logprobs=3)
    own = expected(engine, top_logprobs=3)
    choice = answer.choices[0]
    assert (choice.text, choice.finish_reason) == (own.text, own.finish_reason)
    assert choice.logprobs.token_logprobs == pytest.approx(own.logprobs, abs=1e-4)
    assert len(choice.logprobs.tokens) == len(own.ids) == answer.usage.completion_tokens
    assert all(len(top) == 3 for top in choice.logprobs.top_logprobs)
    assert answer.usage.prompt_tokens == len(own.prompt_ids)


@slow
def test_a_stream_joins_to_the_same_text(client, engine):
    stream = client.completions.create(
        model="tiny", prompt=PROMPT, max_tokens=24, seed=5, stream=True, stream_options={"include_usage": True}
    )
    *events, last = list(stream)
    own = expected(engine)
    assert "".join(event.choices[0].text for event in events) == own.text
    assert [event.choices[0].finish_reason for event in events][-1] == own.finish_reason
    assert len({event.id for event in events}) == 1
    assert last.choices == []
    assert last.usage.completion_tokens == len(own.ids)


@slow
def test_greedy_stop_and_extra_settings(client, engine):
    greedy = expected(engine, temperature=0, seed=None)
    answer = client.completions.create(model="tiny", prompt=PROMPT, max_tokens=24, temperature=0)
    assert answer.choices[0].text == greedy.text
    own = expected(engine, top_k=20, min_p=0.01, top_p=0.9)
    stop = own.text[4:6]
    answer = client.completions.create(
        model="tiny",
        prompt=PROMPT,
        max_tokens=24,
        seed=5,
        top_p=0.9,
        stop=stop,
        extra_body={"top_k": 20, "min_p": 0.01},
    )
    assert answer.choices[0].text == own.text[: own.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@slow
def test_several_prompts_and_answers(client, engine):
    prompts = [PROMPT, "def add"]
    answer = client.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=24, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    texts = [expected(engine, prompt, seed=seed).text for prompt in prompts for seed in (5, 6)]
    assert [choice.text for choice in answer.choices] == texts
    assert answer.usage.prompt_tokens == sum(len(encode_text(engine.tokenizer, prompt)) for prompt in prompts)


@slow
def test_ids_as_a_prompt_and_special_tokens_spelt_in_text(client, engine):
    ids = encode_text(engine.tokenizer, PROMPT)
    answer = client.completions.create(model="tiny", prompt=ids, max_tokens=24, seed=5)
    assert answer.choices[0].text == expected(engine).text
    spelt = client.completions.create(model="tiny", prompt="a<|end|>", max_tokens=1)
    assert spelt.usage.prompt_tokens > 3


@slow
def test_what_clients_send_without_meaning_it_is_accepted(http):
    body = {"model": "tiny", "prompt": "x", "echo": False, "best_of": 1, "presence_penalty": 0.0, "stop": None}
    assert http.post("/v1/completions", json=body).status_code == 200


@slow
def test_bodies_that_are_no_request(http):
    # A web page can send this one to a service on the reader's own machine without asking.
    plain = http.post(
        "/v1/completions", content=b'{"model": "tiny", "prompt": "x"}', headers={"Content-Type": "text/plain"}
    )
    assert plain.status_code == 415
    assert "Content-Type: application/json" in plain.json()["error"]["message"]
    for content, status, words in [
        (b"{not json}", 400, "valid JSON"),
        (b"[]", 400, "JSON object"),
        (b"", 400, "valid JSON"),
        (b'{"prompt": ' * 5000, 400, ""),
        (b" " * (8 * 2**20 + 1), 413, "the most is 8388608"),
        (iter([b"{}"]), 400, "model is required"),
    ]:
        answer = http.post("/v1/completions", content=content, headers=JSON)
        assert answer.status_code == status, answer.text
        assert words in answer.json()["error"]["message"]
    assert http.get("/v1/nothing").status_code == 404
    assert http.get("/v1/completions").status_code == 405
    assert http.get("/readyz").status_code == 200


@slow
def test_clients_that_disconnect_leave_their_slots_to_others(http):
    long = {"model": "tiny", "prompt": PROMPT, "max_tokens": 200, "n": 16, "stream": True}
    for _ in range(3):
        with http.stream("POST", "/v1/completions", json=long) as response:
            next(response.iter_lines())
    start = time.monotonic()
    assert http.post("/v1/completions", json={"model": "tiny", "prompt": PROMPT, "max_tokens": 1}).status_code == 200
    # All 48 answers before it would take several times as long, four at a time.
    assert time.monotonic() - start < 1.5


@slow
def test_a_port_in_use_is_refused_with_a_remedy(ray_cluster, model_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(BadInput, match=r"(?s)can't listen on.*--port"):
            app.start({"tiny": model_folder}, port=taken.getsockname()[1])


@slow
def test_one_ray_serves_once(service, model_folder):
    with pytest.raises(BadInput, match=r"(?s)serves headwater already.*stop it first"):
        app.start({"tiny": model_folder}, port=free_port())


def test_a_host_that_others_reach_needs_plain_words(model_folder):
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(BadInput, match=r"(?s)other machines.*--insecure"):
            app.start({"tiny": model_folder}, host=host)
        app.check_host(host, allowed=True)
    for host in ("127.0.0.1", "localhost", "::1"):
        app.check_host(host, allowed=False)


def test_a_folder_without_a_model_is_refused(tmp_path: Path):
    with pytest.raises(BadInput, match=r"no config\.json"):
        app.start({"tiny": tmp_path})
