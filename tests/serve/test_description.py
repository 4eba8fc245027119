"""Several models in one service, how they are listed, and whether the API keeps to what it says of itself."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.generation import GenerationMode
from schemathesis.specs.openapi import checks

from tests.serve.local import local_service

NAMES = ["first", "org/second"]


@pytest.fixture(scope="module")
def run(tmp_path_factory, model_folder) -> Path:
    """The model folder of a run with a lineage."""
    run = tmp_path_factory.mktemp("run")
    shutil.copytree(model_folder, run / "sft" / "model")
    stages = {"pretrain": {"fingerprint": "a1", "settings": {}}, "sft": {"fingerprint": "b2", "settings": {}}}
    (run / "lineage.json").write_text(json.dumps({"schema_version": 1, "run": "small", "stages": stages}))
    return run / "sft" / "model"


@pytest.fixture(scope="module")
def several(run) -> Iterator[str]:
    with local_service(run, *NAMES, slots=8) as address:
        yield address


def test_models_are_listed_with_what_they_are(several):
    client = openai.OpenAI(base_url=several, api_key="none", max_retries=0)
    listed = list(client.models.list())
    assert [model.id for model in listed] == NAMES
    said = client.models.retrieve("org/second").model_dump()
    assert said == listed[1].model_dump()
    assert (said["max_model_len"], said["generates"], said["embeds"]) == (256, True, True)
    assert said["lineage"] == {"run": "small", "stage": "sft", "fingerprints": {"pretrain": "a1", "sft": "b2"}}
    with pytest.raises(openai.NotFoundError, match="there is 'first', 'org/second'"):
        client.models.retrieve("third")


def test_each_model_answers_under_its_name(several):
    client = openai.OpenAI(base_url=several, api_key="none", max_retries=0)
    for name in NAMES:
        assert client.completions.create(model=name, prompt="x", max_tokens=1).model == name
    with httpx.Client(base_url=several.removesuffix("/v1"), timeout=60) as beside:
        assert beside.get("/readyz").json() == {"status": "ready", "models": NAMES}
        assert beside.get("/healthz").json() == {"status": "up"}


def test_every_endpoint_is_described(several):
    said = httpx.get(f"{several.removesuffix('/v1')}/openapi.json", timeout=60).json()
    assert sorted(said["paths"]) == [
        "/detokenize",
        "/healthz",
        "/readyz",
        "/tokenize",
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/models",
        "/v1/models/{name}",
    ]
    for path in said["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
    described = said["components"]["schemas"]["CompletionRequest"]
    assert described["properties"]["model"]["enum"] == NAMES
    assert described["properties"]["suffix"]["enum"] == ["", None]


CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
    checks.unsupported_method,
]


FEW = settings(
    max_examples=15,
    derandomize=True,
    database=None,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda mode: mode.value)
def test_answers_are_as_described(several, mode):
    """Requests that fit the description, and ones that don't, made up from it."""
    schema = schemathesis.openapi.from_url(f"{several.removesuffix('/v1')}/openapi.json")
    asked = [name for name in map(checked(mode), schema.get_all_operations()) if name]
    posts = {"/v1/completions", "/v1/chat/completions", "/v1/embeddings", "/tokenize", "/detokenize"}
    assert posts <= set(asked)


def checked(mode: GenerationMode) -> Callable[[Any], str | None]:
    """Asks of an endpoint what is made up in `mode`; its path, or None if it takes nothing that could be wrong."""

    def ask(found: Any) -> str | None:
        operation = found.ok()
        if mode is GenerationMode.NEGATIVE and operation.method.upper() == "GET":
            return None

        @FEW
        @given(case=operation.as_strategy(generation_mode=mode))
        def each(case: Any) -> None:
            case.call_and_validate(checks=CHECKS, timeout=120)

        each()
        return operation.path

    return ask
