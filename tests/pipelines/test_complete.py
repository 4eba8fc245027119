from __future__ import annotations

import json

import pytest

from cluster.errors import BadInput
from llm.loading import load
from llm.sampling import SamplingParams
from llm.vocabulary import encode_text
from pipelines.complete import complete
from tests.models import save_tiny_model

PROMPT = "The cat <|end|>"
PARAMS = SamplingParams(max_new_tokens=8, seed=4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def test_the_text_is_the_prompt_and_what_the_engine_says(folder, capsys):
    answer = complete(folder, PROMPT, params=PARAMS, top=0, as_json=False)
    engine = load(folder)
    own = engine.generate([encode_text(engine.tokenizer, PROMPT)], PARAMS)[0]
    assert answer["text"] == own.text
    assert [token["id"] for token in answer["tokens"]] == own.ids
    assert capsys.readouterr().out == PROMPT + own.text + "\n"


def test_json_is_one_object_with_the_distribution(folder, capsys):
    answer = complete(folder, PROMPT, params=PARAMS, top=3, as_json=True)
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(answer))
    assert set(answer) == {"prompt", "text", "tokens", "finish_reason"}
    for token in answer["tokens"]:
        assert set(token) == {"id", "text", "logprob", "top"}
        logprobs = [likely["logprob"] for likely in token["top"]]
        assert len(logprobs) == 3
        assert logprobs == sorted(logprobs, reverse=True)


def test_the_taken_token_is_marked_even_if_it_is_unlikely(folder, capsys):
    answer = complete(folder, PROMPT, params=PARAMS, top=2, as_json=False)
    marked = [line for line in capsys.readouterr().out.splitlines() if line.startswith("▶")]
    assert [int(line.split()[-1]) for line in marked] == [token["id"] for token in answer["tokens"]]


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ("", PARAMS, "the prompt is empty"),
        ("\ud800", PARAMS, "isn't valid Unicode"),
        ("The cat", SamplingParams(max_new_tokens=300), "more than the context of 256"),
    ],
)
def test_bad_prompts_are_refused(folder, prompt, params, message):
    with pytest.raises(BadInput, match=message):
        complete(folder, prompt, params=params, top=0, as_json=True)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(BadInput, match=r"no config\.json"):
        complete(tmp_path, PROMPT, params=PARAMS, top=0, as_json=True)
