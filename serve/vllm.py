"""vLLM as what generates: a server of its own, spoken to over its OpenAI-compatible API, ids in and ids out.

It pins other versions of torch and transformers than ours, so it runs in an environment of its own, as a child of the
replica that speaks to it (`started`). Written after vLLM 0.33; here it ran against a server of the same protocol only.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import signal
import socket
import subprocess
from collections.abc import AsyncGenerator, Collection, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from llm.engine import FinishReason, Token
from llm.sampling import MAX_TOP_LOGPROBS, SamplingParams
from serve.backend import Load, ModelInfo, Overloaded, Request, Unavailable, check_prompt
from serve.options import VLLM, Options
from serve.queues import alarm, all_of, one_by_one

NAME = "model"  # the child's name for what it serves
LOOK_EVERY_S = 1.0
MISSED = 5  # looks in a row without an answer, after which the server is taken for dead
CONNECT_S = 10.0
MAX_REQUESTS = 512
REASONS: dict[str, FinishReason] = {"stop": "stop", "length": "length"}
ID = "token_id:"  # how vLLM spells a token that it was asked to name by its id


class Vllm:
    """Generates by a vLLM server. Its callers share one event loop."""

    def __init__(
        self,
        address: str,
        name: str,
        *,
        vocab_size: int,
        end_ids: Collection[int],
        slots: int,
        max_requests: int = MAX_REQUESTS,
        process: subprocess.Popen[bytes] | None = None,
    ):
        """Starts to wait for the server, from a running event loop.

        address: `http://HOST:PORT`. name: the model's there. process: the server, if it is a child of ours.
        """
        self.failure: str | None = None
        self.name = name
        self.process = process
        self._known = (vocab_size, frozenset(end_ids), slots)
        self._max_requests = max_requests
        self._info: ModelInfo | None = None
        self._changed = asyncio.Event()  # the server is there, or is taken for dead
        self._pending: dict[object, int] = {}  # tokens that a request has at most still to read and write
        self._begun: set[object] = set()
        # A request may wait for its first token for as long as its deadline lets it.
        timeout = httpx.Timeout(None, connect=CONNECT_S)
        self._client = httpx.AsyncClient(base_url=address, timeout=timeout, limits=httpx.Limits(max_connections=None))
        self._watcher = asyncio.create_task(self._watch())

    @property
    def ready(self) -> bool:
        return self._info is not None and self.failure is None

    @property
    def info(self) -> ModelInfo:
        """What never changes. Unavailable while the server isn't there."""
        if self.failure is not None:
            raise Unavailable(self.failure)
        if self._info is None:
            raise Unavailable("vLLM is still loading the model")
        return self._info

    async def describe(self) -> ModelInfo:
        """The model, once the server answers. Unavailable if it is taken for dead."""
        await self._changed.wait()
        return self.info

    async def failed(self) -> None:
        """Returns when the server is taken for dead."""
        await asyncio.wait([self._watcher])

    def check(self, requests: Sequence[Request]) -> None:
        """ValueError, Overloaded, Unavailable. What a grammar is worth the server says when it is asked."""
        for prompt_ids, params in requests:
            check_prompt(prompt_ids, params.max_new_tokens, self.info)
        if len(self._pending) + len(requests) > self._max_requests:
            raise Overloaded(f"{len(self._pending)} requests are running or waiting, the most is {self._max_requests}")

    def tokens(
        self, requests: Sequence[Request], *, deadline_s: float | None = None
    ) -> AsyncGenerator[tuple[int, Token], None]:
        """The tokens of all `requests` as they come, each with its request's index.

        Closing it closes the connections, at which vLLM drops the requests. Of tokens that came together the last
        carries their text. ValueError if the server refuses one, Unavailable if it fails, DeadlineExceeded.
        """
        return one_by_one(self.batches(requests, deadline_s=deadline_s))

    async def batches(
        self, requests: Sequence[Request], *, deadline_s: float | None = None
    ) -> AsyncGenerator[list[tuple[int, Token]], None]:
        """The same, with all that has come since the caller looked last at once."""
        self.check(requests)
        queue: asyncio.Queue[tuple[int, Token] | Exception] = asyncio.Queue()
        tasks = [asyncio.create_task(self._ask(index, one, queue)) for index, one in enumerate(requests)]
        ending = alarm(queue, deadline_s)
        unfinished = len(requests)
        try:
            while unfinished:
                batch = await all_of(queue)
                unfinished -= sum(token.finish_reason is not None for _, token in batch)
                yield batch
        finally:
            if ending:
                ending.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def embed(self, prompts: list[list[int]]) -> list[list[float]]:
        """ValueError: a vLLM server that generates doesn't embed."""
        raise ValueError(f"{self.name} is served by vLLM for generation, which gives no embeddings")

    def load(self) -> Load:
        """What this process has asked for. Whether a request holds a slot is known once it has a token."""
        running = len(self._begun)
        return Load(
            replicas=1,
            running=running,
            waiting=len(self._pending) - running,
            queued_tokens=sum(self._pending.values()),
        )

    async def close(self) -> None:
        """End the watch, the connections and the server, if it is a child."""
        self._watcher.cancel()
        await self._client.aclose()
        if self.process is not None:
            self.process.terminate()
            await asyncio.to_thread(self.process.wait)

    async def _ask(self, index: int, request: Request, queue: asyncio.Queue[tuple[int, Token] | Exception]) -> None:
        """Put one request's tokens into the queue, or the exception that ends it."""
        key, (prompt_ids, params) = object(), request
        self._pending[key] = len(prompt_ids) + params.max_new_tokens
        try:
            async for token in self._stream(str(index), prompt_ids, params):
                self._pending[key] -= 1 if key in self._begun else len(prompt_ids) + 1
                self._begun.add(key)
                queue.put_nowait((index, token))
        except httpx.HTTPError as error:
            queue.put_nowait(Unavailable(f"vLLM can't be reached: {type(error).__name__} {error}"))
        except Exception as error:
            queue.put_nowait(error)
        finally:
            del self._pending[key]
            self._begun.discard(key)

    async def _stream(self, name: str, prompt_ids: list[int], params: SamplingParams) -> AsyncGenerator[Token, None]:
        asked = body(self.name, prompt_ids, params, self.info.end_ids)
        async with self._client.stream("POST", "/v1/completions", json=asked) as response:
            if response.status_code != httpx.codes.OK:
                raise refusal(response.status_code, await response.aread())
            async for line in response.aiter_lines():
                if not line.startswith("data:") or line == "data: [DONE]":
                    continue
                for token in read(name, json.loads(line.removeprefix("data:")), params.top_logprobs):
                    yield token
                    if token.finish_reason:
                        return
        raise Unavailable("vLLM's stream ended before the answer did")

    async def _watch(self) -> None:
        """Wait until the server answers, then look whether it still does."""
        missed = 0
        while self.failure is None:
            if self.process is not None and self.process.poll() is not None:
                self.failure = f"vLLM ended with exit status {self.process.returncode}"
            elif await self._healthy():
                missed = 0
                self._info = self._info or await self._described()
            elif self._info is not None and (missed := missed + 1) == MISSED:
                self.failure = f"vLLM did not answer {MISSED} times in a row"
            if self._info or self.failure:
                self._changed.set()
            await asyncio.sleep(LOOK_EVERY_S)

    async def _healthy(self) -> bool:
        with suppress(httpx.HTTPError):
            return (await self._client.get("/health", timeout=CONNECT_S)).status_code == httpx.codes.OK
        return False

    async def _described(self) -> ModelInfo | None:
        """None if the server has just gone again."""
        vocab_size, end_ids, slots = self._known
        try:
            models = (await self._client.get("/v1/models", timeout=CONNECT_S)).raise_for_status().json()["data"]
        except httpx.HTTPError:
            return None
        found = next((model for model in models if model["id"] == self.name), None)
        if found is None:
            self.failure = f"the vLLM server has {[model['id'] for model in models]}, not {self.name!r}"
            return None
        return ModelInfo(found["max_model_len"], vocab_size, end_ids, generates=True, embeds=False, slots=slots)


# What travels


def body(name: str, prompt_ids: list[int], params: SamplingParams, end_ids: Collection[int]) -> dict[str, Any]:
    """What is asked of vLLM's `/v1/completions`.

    All ids that end an answer are named: which of them vLLM finds by itself depends on how it was started.
    """
    asked: dict[str, Any] = {
        "model": name,
        "prompt": prompt_ids,
        "stream": True,
        "max_tokens": params.max_new_tokens,
        "min_tokens": params.min_new_tokens,
        "temperature": 0.0 if params.greedy else params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "stop": list(params.stop),
        "stop_token_ids": sorted({*end_ids, *params.stop_ids}),
        "repetition_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "logprobs": params.top_logprobs,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        "spaces_between_special_tokens": False,
    }
    if params.seed is not None:
        asked["seed"] = params.seed
    if params.logit_bias:
        asked["logit_bias"] = {str(token): bias for token, bias in dict(params.logit_bias).items()}
    if params.grammar is not None:
        asked["structured_outputs"] = structure(params.grammar.kind, params.grammar.text)
    return asked


def structure(kind: str, text: str) -> dict[str, Any]:
    """A grammar as vLLM's `structured_outputs`."""
    if kind == "json_object":
        return {"json_object": True}
    return {{"json_schema": "json", "regex": "regex", "lark": "grammar"}[kind]: text}


def read(name: str, event: dict[str, Any], top: int) -> Iterator[Token]:
    """The tokens of one event of the stream; name: their request's. Unavailable if vLLM gave the request up."""
    if "error" in event:
        raise Unavailable(f"vLLM failed: {_message(event)}")
    for choice in event["choices"]:
        ids, reason = choice.get("token_ids") or [], choice.get("finish_reason")
        if reason is not None and (reason not in REASONS or not ids):
            raise Unavailable(f"vLLM gave the answer up: {reason}")
        said = choice["logprobs"] if ids else {}
        for place, token in enumerate(ids):
            last = place == len(ids) - 1
            yield Token(
                request_id=name,
                id=token,
                text=choice["text"] if last else "",
                logprob=said["token_logprobs"][place],
                top=_likeliest(said["top_logprobs"][place], top),
                finish_reason=REASONS[reason] if last and reason is not None else None,
            )


def refusal(status: int, content: bytes) -> Exception:
    """What an answer other than 200 means."""
    try:
        message = _message(json.loads(content))
    except ValueError:
        message = content[:500].decode(errors="replace")
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return Overloaded(f"vLLM has enough to do: {message}")
    if 400 <= status < 500:
        return ValueError(message)
    return Unavailable(f"vLLM answered {status}: {message}")


def _message(said: Any) -> str:
    """Of OpenAI's error object; older servers have its fields at the top."""
    error = said.get("error", said) if isinstance(said, dict) else said
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


def _likeliest(logprobs: dict[str, float], number: int) -> list[tuple[int, float]]:
    """vLLM adds the token that was drawn to the likeliest ones, whatever its place."""
    pairs = [(int(spelt.removeprefix(ID)), logprob) for spelt, logprob in logprobs.items()]
    return sorted(pairs, key=lambda pair: -pair[1])[:number]


# The server as a child


def command(folder: Path, port: int, options: Options) -> list[str]:
    """The words that start `vllm serve` for a model folder, for this machine alone.

    Log-probabilities are to be the model's own, as our engine's are; nothing is to be taken from the folder's
    generation_config.json that a request doesn't say; grammars are read by the library that ours are read by.
    """
    return [
        os.environ.get(VLLM, "vllm"), "serve", str(folder),
        "--served-model-name", NAME,
        "--host", "127.0.0.1",
        "--port", str(port),
        "--max-num-seqs", str(options.slots),
        "--tensor-parallel-size", str(max(1, int(options.gpus))),
        "--dtype", options.dtype or "auto",
        "--max-logprobs", str(MAX_TOP_LOGPROBS),
        "--logprobs-mode", "raw_logprobs",
        "--generation-config", "vllm",
        "--structured-outputs-config.backend", "guidance",
    ]  # fmt: skip


def started(folder: Path, options: Options) -> Vllm:
    """Start `vllm serve` as a child that ends with this process, and speak to it. Call it in a running event loop.

    Its command is `vllm` on the PATH, or what the environment variable HEADWATER_VLLM names: in a virtual environment
    of its own, or in the image's.
    """
    from llm.vocabulary import load_tokenizer

    port = _free_port()
    process = subprocess.Popen(command(folder, port, options), preexec_fn=_end_with_parent)
    return Vllm(
        f"http://127.0.0.1:{port}",
        NAME,
        vocab_size=json.loads((folder / "config.json").read_text())["vocab_size"],
        end_ids=end_ids(folder, load_tokenizer(folder)),
        slots=options.slots,
        max_requests=options.max_requests,
        process=process,
    )


def end_ids(folder: Path, tokenizer: Any) -> frozenset[int]:
    """The ids that end an answer, as our engine finds them (`llm.engine.end_ids`), without the model."""
    from llm.vocabulary import END_OF_TURN

    settings = folder / "generation_config.json"
    listed = json.loads(settings.read_text()).get("eos_token_id") if settings.is_file() else None
    ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get(END_OF_TURN)}
    ids.update(listed if isinstance(listed, list) else [listed])
    return frozenset(ids - {None})


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _end_with_parent() -> None:
    """Linux: a replica that is killed would leave a server behind, and its GPU taken."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGTERM)
