from __future__ import annotations

import socket
from pathlib import Path

import httpx
import openai
import pytest

from cluster.errors import BadInput
from llm.sampling import SamplingParams
from llm.vocabulary import encode_text
from serve import app
from tests.serve.conftest import free_port

PROMPT = "The cat"

slow = pytest.mark.slow


@slow
def test_it_is_ready_and_has_the_model(service):
    url = service.removesuffix("/v1")
    assert httpx.get(f"{url}/healthz").json() == {"status": "up"}
    assert httpx.get(f"{url}/readyz").json() == {"status": "ready", "models": ["tiny"]}
    other = httpx.get(f"{url}/readyz", headers={"Host": "example.org"})
    assert other.status_code == 421, "a page of another name can't ask a service on loopback"


@slow
def test_answers_through_ray_are_the_engines(service, engine):
    client = openai.OpenAI(base_url=service, api_key="none", max_retries=0)
    settings = {"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "seed": 5, "temperature": 1}
    prompt = encode_text(engine.tokenizer, PROMPT)
    own = engine.generate([prompt], SamplingParams(max_new_tokens=24, temperature=1.0, seed=5))[0]
    whole = client.completions.create(**settings, logprobs=3)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (own.text, own.finish_reason)
    assert whole.choices[0].logprobs.token_logprobs == pytest.approx(own.logprobs, abs=1e-4)
    *events, last = client.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    assert "".join(event.choices[0].text for event in events) == own.text
    assert last.usage.completion_tokens == len(own.ids)


@slow
def test_vectors_and_ids_come_through_ray(service, engine):
    client = openai.OpenAI(base_url=service, api_key="none", max_retries=0)
    (vector,) = client.embeddings.create(model="tiny", input=PROMPT, encoding_format="float").data
    assert len(vector.embedding) == engine.model.config.hidden_size
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary"):
        client.completions.create(model="tiny", prompt=[1, 10**6], max_tokens=1)


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
