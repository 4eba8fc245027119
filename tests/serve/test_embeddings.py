"""Embeddings as OpenAI's client asks for them, against the mean of the model's own last hidden states."""

from __future__ import annotations

import asyncio
import base64

import numpy as np
import openai
import pytest
import torch

from llm.vocabulary import encode_text
from serve.embeddings import MAX_INPUTS

TEXTS = ["The cat sat.", "naïve", "x" * 100]


def reference(engine, text: str) -> np.ndarray:
    ids = torch.tensor([encode_text(engine.tokenizer, text)])
    with torch.inference_mode():
        return engine.model.model(input_ids=ids).last_hidden_state[0].mean(0).float().numpy()


def test_each_text_gets_the_mean_of_its_states(client, engine):
    answer = client.embeddings.create(model="tiny", input=TEXTS)  # which asks for base64
    assert [item.index for item in answer.data] == [0, 1, 2]
    for item, text in zip(answer.data, TEXTS, strict=True):
        np.testing.assert_allclose(item.embedding, reference(engine, text), rtol=1e-4, atol=1e-4)
    count = sum(len(encode_text(engine.tokenizer, text)) for text in TEXTS)
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)


def test_numbers_base64_and_ids_say_the_same(client, post, engine):
    numbers = client.embeddings.create(model="tiny", input=TEXTS[0], encoding_format="float").data[0].embedding
    raw = post("embeddings", model="tiny", input=TEXTS[0], encoding_format="base64").json()["data"][0]["embedding"]
    np.testing.assert_array_equal(np.frombuffer(base64.b64decode(raw), "<f4"), np.float32(numbers))
    ids = [encode_text(engine.tokenizer, text) for text in TEXTS]
    for given, count in ((ids[0], 1), (ids, 3)):
        answer = client.embeddings.create(model="tiny", input=given, encoding_format="float")
        assert len(answer.data) == count
        np.testing.assert_allclose(answer.data[0].embedding, numbers, rtol=1e-5, atol=1e-5)


def test_the_asynchronous_client(address, engine):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            answer = await client.embeddings.create(model="tiny", input=TEXTS[1])
            np.testing.assert_allclose(answer.data[0].embedding, reference(engine, TEXTS[1]), rtol=1e-4, atol=1e-4)

    asyncio.run(main())


BAD = [
    ({"input": ""}, 400, "input", "empty"),
    ({"input": []}, 400, "input", "empty"),
    ({"input": [[]]}, 400, "input", "empty"),
    ({"input": None}, 400, "input", "required"),
    ({"input": ["a"] * (MAX_INPUTS + 1)}, 400, "input", "at most 2048"),
    ({"input": "x " * 300}, 400, "input", "more than the context of 256"),
    ({"input": [320]}, 400, "input", "id 320, outside"),
    ({"input": [[60] * 200] * 400}, 400, "input", "65536 tokens together, got 80000"),
    ({"encoding_format": "hex"}, 400, "encoding_format", "'base64'"),
    ({"dimensions": 8}, 400, "dimensions", "unsupported fields: dimensions"),
    ({"model": "gpt"}, 404, "model", "no model 'gpt'"),
]


@pytest.mark.parametrize(("change", "status", "param", "words"), BAD, ids=[str(case[0])[:40] for case in BAD])
def test_bad_input_is_refused_by_name(post, change, status, param, words):
    answer = post("embeddings", **{"model": "tiny", "input": "x", **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
