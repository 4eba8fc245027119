"""Completions as OpenAI's client sees them, with the API alone."""

from __future__ import annotations

import json

import httpx
import openai
import pytest

from llm.sampling import SamplingParams
from llm.vocabulary import encode_text

PROMPT = "The cat"


@pytest.fixture
def complete(client):
    def create(**settings):
        return client.completions.create(
            **{"model": "tiny", "prompt": PROMPT, "max_tokens": 24, "seed": 5, **settings}
        )

    return create


def expected(engine, prompt: str | list[int] = PROMPT, **settings):
    params = SamplingParams(**{"max_new_tokens": 24, "seed": 5, **settings})
    ids = encode_text(engine.tokenizer, prompt) if isinstance(prompt, str) else prompt
    return engine.generate([ids], params)[0]


def test_an_answer_is_the_engines(complete, engine):
    answer = complete(logprobs=3)
    own, choice = expected(engine, top_logprobs=3), answer.choices[0]
    assert (choice.text, choice.finish_reason) == (own.text, own.finish_reason)
    assert choice.logprobs.token_logprobs == pytest.approx(own.logprobs, abs=1e-4)
    assert all(len(top) == 3 for top in choice.logprobs.top_logprobs)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(own.prompt_ids), len(own.ids))


def test_a_stream_is_the_same_answer(complete, engine):
    *events, last = list(complete(stream=True, stream_options={"include_usage": True}))
    own = expected(engine)
    assert "".join(event.choices[0].text for event in events) == own.text
    assert events[-1].choices[0].finish_reason == own.finish_reason
    assert len({event.id for event in events}) == 1
    assert (last.choices, last.usage.completion_tokens) == ([], len(own.ids))


def test_prompts_as_text_and_as_ids(complete, engine):
    texts = [PROMPT, "def add"]
    ids = [encode_text(engine.tokenizer, text) for text in texts]
    own = [expected(engine, text, seed=seed).text for text in texts for seed in (5, 6)]
    for prompts in (texts, ids):
        answer = complete(prompt=prompts, n=2)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert [choice.text for choice in answer.choices] == own
        assert answer.usage.prompt_tokens == sum(map(len, ids))
    assert complete(prompt=ids[0]).choices[0].text == own[0]
    assert complete(prompt="a<|end|>", max_tokens=1).usage.prompt_tokens > 3


def test_an_answer_that_matches(complete):
    choice = complete(extra_body={"guided_regex": "(?:ab){2}c"}).choices[0]
    assert (choice.text, choice.finish_reason) == ("ababc", "stop")
    answer = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes", "no"]}}}
    assert json.loads(complete(extra_body={"response_format": answer}).choices[0].text) in ("yes", "no")


BAD = [
    ({"prompt": ""}, 400, "prompt", "empty"),
    ({"prompt": []}, 400, "prompt", "empty"),
    ({"prompt": [""]}, 400, "prompt", "empty"),
    ({"prompt": [[]]}, 400, "prompt", "empty"),
    ({"prompt": [[60], "a"]}, 400, "prompt", "prompt"),
    ({"prompt": None}, 400, "prompt", "required"),
    ({"prompt": [1, 320]}, 400, "prompt", "id 320, outside the vocabulary of 320"),
    ({"prompt": [[60], [1, -1]]}, 400, "prompt", "id -1"),
    ({"prompt": [60] * 250}, 400, "prompt", "250 tokens and max_new_tokens=16 make 266, more than the context of 256"),
    ({"prompt": ["x"] * 65, "n": 2}, 400, "n", "at most 128"),
    ({"max_tokens": 0}, 400, "max_tokens", "got 0"),
    ({"max_tokens": 10**9}, 400, "prompt", "context of 256"),
    ({"n": 1_000_000}, 400, "n", "got 1000000"),
    ({"logprobs": 10**6}, 400, "logprobs", "got 1000000"),
    ({"echo": True}, 400, "echo", "unsupported fields: echo"),
    ({"best_of": 3, "suffix": "x"}, 400, "best_of", "unsupported fields: best_of, suffix"),
    ({"prompt_embeds": "AAAA"}, 400, "prompt_embeds", "unsupported fields: prompt_embeds"),
    ({"guided_regex": "(a"}, 400, "guided_regex", "guided_regex: "),
    ({"model": "gpt"}, 404, "model", "no model 'gpt' here; there is 'tiny'"),
    ({"model": None}, 400, "model", "required"),
]


@pytest.mark.parametrize(("change", "status", "param", "words"), BAD, ids=[str(case[0])[:40] for case in BAD])
def test_bad_input_is_refused_by_name(post, change, status, param, words):
    answer = post("completions", **{"model": "tiny", "prompt": PROMPT, **change})
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (status, param), error
    assert words in error["message"]
    assert set(error) == {"message", "type", "param", "code"}


def test_the_client_raises_its_own_errors(complete, client):
    with pytest.raises(openai.NotFoundError) as missing:
        complete(model="gpt")
    assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.BadRequestError):
        complete(max_tokens=0)
    with pytest.raises(openai.NotFoundError):
        client.get("/nothing", cast_to=httpx.Response)


def test_texts_as_ids_and_back(post, engine):
    text = "naïve <|end|> café"
    ids = encode_text(engine.tokenizer, text)
    asked = post("/tokenize", model="tiny", prompt=text, return_token_strs=True).json()
    assert (asked["tokens"], asked["count"], asked["max_model_len"]) == (ids, len(ids), 256)
    assert len(asked["token_strs"]) == len(ids)
    assert post("/detokenize", model="tiny", tokens=ids).json() == {"prompt": text}
    turns = [{"role": "user", "content": text}]
    user, end, assistant = engine.tokenizer.convert_tokens_to_ids(["<|user|>", "<|end|>", "<|assistant|>"])
    assert post("/tokenize", model="tiny", messages=turns).json()["tokens"] == [user, *ids, end, assistant]
    for body, param, words in [
        ({"prompt": "a", "messages": turns}, "prompt", "not both"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"messages": []}, "messages", "empty"),
        ({"messages": turns, "chat_template": "x"}, "chat_template", "unsupported"),
    ]:
        error = post("/tokenize", model="tiny", **body).json()["error"]
        assert (error["param"], words in error["message"]) == (param, True), error
    outside = post("/detokenize", model="tiny", tokens=[0, 320])
    assert (outside.status_code, outside.json()["error"]["param"]) == (400, "tokens")
