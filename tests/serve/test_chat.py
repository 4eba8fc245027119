"""Chat completions as OpenAI's client sees them: all with the API alone, the marked ones on Ray Serve as well."""

from __future__ import annotations

import asyncio
import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import httpx
import openai
import pytest
from pydantic import BaseModel

from llm.chat import DROPPED_TURNS, render_turns
from llm.sampling import SamplingParams
from serve.replica import MAX_REQUESTS

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The cat <|end|>?"},
]
ON_BOTH = pytest.mark.parametrize("address", ["local", pytest.param("ray", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture
def chat(client):
    def create(**settings):
        return client.chat.completions.create(
            **{"model": "tiny", "messages": MESSAGES, "max_tokens": 24, "seed": 5, **settings}
        )

    return create


@pytest.fixture
def ask(post):
    def send(**body) -> httpx.Response:
        return post("chat/completions", **{"model": "tiny", "messages": MESSAGES, "max_tokens": 4, "seed": 5, **body})

    return send


def expected(engine, messages=MESSAGES, **settings):
    params = SamplingParams(**{"max_new_tokens": 24, "seed": 5, **settings})
    return engine.generate([render_turns(engine.tokenizer, messages)], params)[0]


def events(response: httpx.Response) -> list[dict]:
    *data, done = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    assert done == "[DONE]"
    return [json.loads(line) for line in data]


@ON_BOTH
def test_an_answer_is_the_engines(chat, engine):
    answer = chat(logprobs=True, top_logprobs=3)
    own = expected(engine, top_logprobs=3)
    choice = answer.choices[0]
    assert (answer.object, answer.id[:9], answer.model) == ("chat.completion", "chatcmpl-", "tiny")
    assert (choice.message.role, choice.message.content) == ("assistant", own.text)
    assert choice.finish_reason == own.finish_reason
    assert [token.logprob for token in choice.logprobs.content] == pytest.approx(own.logprobs, abs=1e-4)
    assert all(len(token.top_logprobs) == 3 for token in choice.logprobs.content)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (len(own.prompt_ids), len(own.ids))
    assert answer.usage.total_tokens == len(own.prompt_ids) + len(own.ids)


@ON_BOTH
def test_a_stream_is_the_same_answer(chat, engine):
    first, *middle, last, usage = list(chat(stream=True, stream_options={"include_usage": True}))
    own = expected(engine)
    assert (first.choices[0].delta.role, first.choices[0].delta.content) == ("assistant", "")
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == own.text
    assert (last.choices[0].finish_reason, last.choices[0].delta.content) == (own.finish_reason, None)
    assert (usage.choices, usage.usage.completion_tokens) == ([], len(own.ids))
    assert {(chunk.id, chunk.object) for chunk in middle} == {(first.id, "chat.completion.chunk")}


@ON_BOTH
def test_several_answers_have_seeds_of_their_own(chat, engine):
    texts = [expected(engine, seed=seed).text for seed in (5, 6)]
    answer = chat(n=2)
    assert [choice.message.content for choice in answer.choices] == texts
    assert answer.usage.prompt_tokens == len(render_turns(engine.tokenizer, MESSAGES))
    streamed = ["", ""]
    for chunk in chat(n=2, stream=True):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == texts


@ON_BOTH
def test_the_oldest_turns_make_room(ask, engine):
    past = [{"role": role, "content": "The cat sat on the mat."} for _ in range(20) for role in ("user", "assistant")]
    reply = ask(messages=[MESSAGES[0], *past, MESSAGES[1]], seed=5)
    dropped = int(reply.headers[DROPPED_TURNS])
    kept = [MESSAGES[0], *past[dropped:], MESSAGES[1]]
    assert 0 < dropped < len(past)
    assert reply.json()["usage"]["prompt_tokens"] == len(render_turns(engine.tokenizer, kept)) <= 252
    assert reply.json()["choices"][0]["message"]["content"] == expected(engine, kept, max_new_tokens=4).text
    assert ask(stream=True).headers[DROPPED_TURNS] == "0"


def test_every_chunk_has_the_documented_fields(ask):
    first, *middle, last = events(ask(stream=True))
    assert set(first) == {"id", "object", "created", "model", "choices"}
    no_more = {"logprobs": None, "finish_reason": None}
    assert first["choices"] == [{"index": 0, "delta": {"role": "assistant", "content": ""}, **no_more}]
    assert all(set(chunk["choices"][0]["delta"]) == {"content"} for chunk in middle)
    assert last["choices"] == [{"index": 0, "delta": {}, "logprobs": None, "finish_reason": "length"}]
    *chunks, usage = events(ask(stream=True, stream_options={"include_usage": True}))
    assert [chunk["usage"] for chunk in chunks] == [None] * len(chunks)
    assert usage["choices"] == []


def test_streamed_logprobs_are_the_whole_answers(chat):
    whole = chat(logprobs=True, top_logprobs=2).choices[0]
    chunks = [chunk.choices[0] for chunk in chat(logprobs=True, top_logprobs=2, stream=True)]
    streamed = [token for choice in chunks if choice.logprobs for token in choice.logprobs.content]
    assert streamed == whole.logprobs.content
    for token in streamed:
        text = bytes(token.bytes).decode(errors="replace")
        assert token.token == text or token.token.startswith("bytes:")
        assert max(likely.logprob for likely in token.top_logprobs) >= token.logprob
    assert chat(logprobs=True, max_tokens=1).choices[0].logprobs.content[0].top_logprobs == []


def test_settings_reach_the_engine(chat, engine):
    assert chat(temperature=0).choices[0].message.content == expected(engine, temperature=0).text
    own = expected(engine, top_k=20, min_p=0.01, top_p=0.9)
    stop = own.text[4:6]
    answer = chat(top_p=0.9, stop=["never said", stop], extra_body={"top_k": 20, "min_p": 0.01}).choices[0]
    assert (answer.message.content, answer.finish_reason) == (own.text[: own.text.index(stop)], "stop")


def test_an_answer_of_no_given_length_may_fill_the_context(chat, engine):
    room = 256 - len(render_turns(engine.tokenizer, MESSAGES))
    own = expected(engine, max_new_tokens=room)
    answer = chat(max_tokens=None)
    assert (answer.choices[0].message.content, answer.usage.completion_tokens) == (own.text, len(own.ids))
    assert chat(max_tokens=None, max_completion_tokens=3).usage.completion_tokens == 3


def test_parts_are_joined_and_a_tools_turn_is_read(chat, engine):
    parts = [{"type": "text", "text": "The "}, {"type": "text", "text": "cat"}]
    messages = [{"role": "user", "content": parts}, {"role": "tool", "content": "42", "tool_call_id": "call_1"}]
    plain = [{"role": "user", "content": "The cat"}, {"role": "tool", "content": "42"}]
    assert chat(messages=messages).choices[0].message.content == expected(engine, plain).text


def test_an_answer_can_be_sent_back_as_it_came(chat):
    said = chat().choices[0].message
    assert chat(messages=[*MESSAGES, said.model_dump(), MESSAGES[1]]).choices


def test_what_clients_send_without_meaning_it_is_accepted(ask):
    neutral = {"tools": [], "tool_choice": "auto", "response_format": {"type": "text"}, "store": False, "audio": None}
    assert ask(**neutral, stop=None, user="me").status_code == 200


def message(content="x", **fields):
    return {"messages": [{"role": "user", "content": content, **fields}]}


def schema(of_answer: dict):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": of_answer}}}


BAD = [
    ({"messages": []}, 400, "messages", "empty"),
    ({"messages": None}, 400, "messages", "required"),
    ({"messages": "hi"}, 400, "messages", "valid list"),
    ({"messages": ["hi"]}, 400, "messages[0]", "valid dictionary"),
    ({"messages": [MESSAGES[0]] * 4097}, 400, "messages", "at most 4096"),
    (message(role="wizard"), 400, "messages[0].role", "one of system, user, assistant, tool, got 'wizard'"),
    (message(role=None), 400, "messages[0].role", "required"),
    (message(None), 400, "messages[0].content", "required"),
    (message(3), 400, "messages[0].content", "valid string, got 3"),
    (message("\ud800"), 400, None, "surrogate"),
    (
        message([{"type": "image_url", "image_url": {"url": "http://169.254.169.254"}}]),
        400,
        "messages[0].content",
        "text",
    ),
    (message([{"type": "text", "text": "x", "more": 1}]), 400, "messages[0].content", "text parts only"),
    (message("x" * 1_000_001), 400, "messages", "at most 1000000 characters"),
    (message("the cat" * 200), 400, "messages", "more than the context of 256"),
    (message(name="Ann"), 400, "messages[0].name", "unsupported fields: messages[0].name"),
    ({"messages": [*MESSAGES, {"role": "assistant", "content": "Yes."}]}, 400, "messages", "assistant's own turn"),
    ({"max_tokens": 0}, 400, "max_tokens", "got 0"),
    ({"max_tokens": 10**9}, 400, "messages", "a reply of 1000000000"),
    ({"max_completion_tokens": 5}, 400, "max_tokens", "give one of them"),
    ({"max_tokens": None, "max_completion_tokens": -1}, 400, "max_completion_tokens", "got -1"),
    ({"n": 0}, 400, "n", "got 0"),
    ({"n": 1_000_000}, 400, "n", "got 1000000"),
    ({"n": True}, 400, "n", "got True"),
    ({"temperature": float("nan")}, 400, None, "NaN is not a JSON number"),
    ({"temperature": -1}, 400, "temperature", "-1"),
    ({"top_p": 0}, 400, "top_p", "above 0"),
    ({"top_k": -3}, 400, "top_k", "got -3"),
    ({"min_p": 1.5}, 400, "min_p", "1.5"),
    ({"seed": 2**64}, 400, "seed", "seed"),
    ({"stop": [""]}, 400, "stop", "empty string"),
    ({"stop": ["x"] * 1000}, 400, "stop", "at most 16"),
    ({"logprobs": 3}, 400, "logprobs", "boolean, got 3"),
    ({"logprobs": True, "top_logprobs": 10**6}, 400, "top_logprobs", "got 1000000"),
    ({"top_logprobs": 2}, 400, "top_logprobs", "logprobs=true"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true"),
    ({"stream": True, "stream_options": {"x": 1}}, 400, "stream_options.x", "unsupported fields: stream_options.x"),
    ({"functions": [], "prompt": "x"}, 400, "functions", "unsupported fields: functions, prompt"),
    ({"logit_bias": {"320": 5}}, 400, "logit_bias", "id 320, outside the vocabulary of 320"),
    ({"logit_bias": {"-1": 5}}, 400, "logit_bias", "token ids as its keys, got '-1'"),
    ({"logit_bias": {"1": 101}}, 400, "logit_bias", "101"),
    ({"presence_penalty": 2.5}, 400, "presence_penalty", "2.5"),
    ({"frequency_penalty": -3}, 400, "frequency_penalty", "-3"),
    ({"repetition_penalty": 0}, 400, "repetition_penalty", "0"),
    ({"min_tokens": 5}, 400, "min_tokens", "from 0 to 4, got 5"),
    ({"stop_token_ids": [320]}, 400, "stop_token_ids", "id 320, outside the vocabulary of 320"),
    ({"chat_template": "{{ 1 }}"}, 400, "chat_template", "unsupported fields: chat_template"),
    ({"chat_template_kwargs": {"tokenize": False}}, 400, "chat_template_kwargs", "unsupported fields"),
    ({"response_format": {"type": "xml"}}, 400, "response_format.type", "'xml'"),
    ({"response_format": {"type": "json_schema"}}, 400, "response_format", "json_schema must be given"),
    (schema({"type": "strange"}), 400, "response_format", "response_format: "),
    (schema({"pattern": "("}), 400, "response_format", "response_format: "),
    (schema({"$ref": "http://169.254.169.254/x"}), 400, "response_format", "response_format: "),
    ({"guided_regex": "("}, 400, "guided_regex", "guided_regex: "),
    ({"guided_regex": "a", "response_format": {"type": "json_object"}}, 400, "guided_regex", "give one of them"),
    ({"model": "gpt"}, 404, "model", "no model 'gpt' here; there is 'tiny'"),
]


@pytest.mark.parametrize(("change", "status", "param", "words"), BAD, ids=[str(case[0])[:50] for case in BAD])
def test_bad_input_is_refused_by_name(ask, change, status, param, words):
    for stream in ({}, {"stream": True}) if "stream_options" not in change else ({},):
        answer = ask(**{**stream, **change})
        error = answer.json()["error"]
        assert (answer.status_code, error["param"]) == (status, param), error
        assert words in error["message"]
        assert set(error) == {"message", "type", "param", "code"}


def test_bodies_that_are_no_request(address):
    for content, words in [(b"{not json}", "valid JSON"), (b"[]", "JSON object"), (b"", "valid JSON")]:
        headers = {"Content-Type": "application/json"}
        answer = httpx.post(f"{address}/chat/completions", content=content, headers=headers, timeout=60)
        assert (answer.status_code, words in answer.json()["error"]["message"]) == (400, True)
    assert httpx.get(f"{address}/chat/completions", timeout=60).status_code == 405


def test_a_client_that_disconnects_leaves_its_slots_to_others(address, ask):
    """Were they kept until their answers end, there would soon be more than may wait."""
    body = {"model": "tiny", "messages": MESSAGES, "n": 128, "stream": True}
    for _ in range(2 * MAX_REQUESTS // 128):
        with httpx.stream("POST", f"{address}/chat/completions", json=body, timeout=60) as response:
            assert response.status_code == 200
            next(response.iter_lines())
    assert ask(max_tokens=1).status_code == 200


def test_a_long_text_delays_nobody_else(address, ask):
    longest = {"messages": [{"role": "user", "content": "The cat sat on the mat. " * 20_000}]}
    others = 0
    with ThreadPoolExecutor() as threads:
        answer = threads.submit(ask, **longest)
        while not answer.done():
            others += httpx.get(f"{address}/models", timeout=60).status_code == 200
    assert answer.result().status_code == 400
    assert others > 3


def test_the_asynchronous_client(address, engine):
    async def main() -> None:
        async with openai.AsyncOpenAI(base_url=address, api_key="none", max_retries=0) as client:
            settings = {"model": "tiny", "messages": MESSAGES, "max_tokens": 24}
            whole, stream = await asyncio.gather(
                client.chat.completions.create(**settings, seed=5),
                client.chat.completions.create(**settings, seed=6, stream=True),
            )
            assert whole.choices[0].message.content == expected(engine).text
            pieces = [chunk.choices[0].delta.content or "" async for chunk in stream]
            assert "".join(pieces) == expected(engine, seed=6).text

    asyncio.run(main())


def test_penalties_biases_and_least_lengths_reach_the_engine(chat, engine):
    for asked, own in [
        ({"presence_penalty": 1.5, "frequency_penalty": -0.5}, {"presence_penalty": 1.5, "frequency_penalty": -0.5}),
        ({"logit_bias": {"60": 100}}, {"logit_bias": {60: 100}}),
        ({"extra_body": {"repetition_penalty": 1.3}}, {"repetition_penalty": 1.3}),
        (
            {"extra_body": {"min_tokens": 20, "stop_token_ids": [60, 70]}},
            {"min_new_tokens": 20, "stop_ids": (60, 70)},
        ),
    ]:
        assert chat(**asked).choices[0].message.content == expected(engine, **own).text


class Verdict(BaseModel):
    good: bool
    unit: Literal["m", "s"]


def test_an_answer_of_a_schema(client, chat, engine):
    # White space is allowed between the parts of an object, and an untrained model likes it.
    blank = [token for token in range(320) if engine.tokenizer.decode([token]).isspace()]
    settings = {"model": "tiny", "messages": MESSAGES, "seed": 5, "logit_bias": {str(token): -100 for token in blank}}
    answer = client.chat.completions.parse(**settings, response_format=Verdict).choices[0]
    assert isinstance(answer.message.parsed, Verdict)
    assert answer.finish_reason == "stop"
    chunks = list(chat(**{**settings, **schema(Verdict.model_json_schema())}, max_tokens=None, stream=True))
    Verdict.model_validate_json("".join(chunk.choices[0].delta.content or "" for chunk in chunks))


def test_an_answer_that_is_json_or_matches(chat):
    anything = chat(response_format={"type": "json_object"}).choices[0].message.content
    assert anything.lstrip().startswith("{")
    matched = chat(n=4, extra_body={"guided_regex": "[a-c]{3}(?:x|y)"}).choices
    assert all(re.fullmatch("[a-c]{3}(?:x|y)", choice.message.content) for choice in matched)


def test_a_developers_turn_is_a_systems(chat, engine):
    turns = [{**MESSAGES[0], "role": "developer"}, MESSAGES[1]]
    assert chat(messages=turns).choices[0].message.content == expected(engine).text
