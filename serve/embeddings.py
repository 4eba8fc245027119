"""OpenAI's embeddings: the body of `POST /v1/embeddings` and the object that answers it."""

from __future__ import annotations

import base64
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from serve.completions import as_list
from serve.protocol import Strict, check_text

MAX_INPUTS = 2048
MAX_INPUT_TOKENS = 65_536  # of one request's inputs together


class EmbeddingRequest(Strict):
    """Inputs as text or ids, each of which gets one vector: the mean over its tokens of the model's last layer."""

    model: str
    input: str | list[str] | list[int] | list[list[int]]
    encoding_format: Literal["float", "base64"] = "float"
    user: str | None = None  # who asks, in the client's words; nothing depends on it

    @model_validator(mode="after")
    def _check_inputs(self) -> EmbeddingRequest:
        inputs = self.inputs()
        if not inputs:
            raise ValueError("input is empty: it needs at least one token")
        if len(inputs) > MAX_INPUTS:
            raise ValueError(f"input takes at most {MAX_INPUTS} texts, got {len(inputs)}")
        for text in inputs:
            if isinstance(text, str):
                check_text("input", text)
        return self

    def inputs(self) -> list[str] | list[list[int]]:
        """Each input, as text or ids."""
        return as_list(self.input)


class Embedding(BaseModel):
    """`embedding` is a list of numbers, or the base64 of them as little-endian fp32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int


class EmbeddingResponse(BaseModel):
    object: Literal["list"] = "list"
    model: str
    data: list[Embedding] = Field(description="in the order of the inputs")
    usage: EmbeddingUsage


def embedding_response(request: EmbeddingRequest, vectors: list[list[float]], tokens: int) -> EmbeddingResponse:
    """The answer to `request`, whose inputs have `tokens` tokens together."""
    said = [_base64(vector) if request.encoding_format == "base64" else vector for vector in vectors]
    data = [Embedding(index=index, embedding=vector) for index, vector in enumerate(said)]
    usage = EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens)
    return EmbeddingResponse(model=request.model, data=data, usage=usage)


def _base64(vector: list[float]) -> str:
    return base64.b64encode(np.asarray(vector, dtype="<f4").tobytes()).decode()
