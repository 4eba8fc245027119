"""The figures of the engine alone, in this process: what it is compared with shares its threads and its weights.

All answers are greedy, in fp32, and the same token for token on both sides (`agreement.same_answers`).
"""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import torch

from llm.engine import Engine
from llm.sampling import SamplingParams
from llm.vocabulary import load_tokenizer
from tests.bench import peer, processes
from tests.bench.agreement import same_answers
from tests.bench.command import CPUS, Scale
from tests.bench.measure import Figure, Turn, compare
from tests.bench.served import FP32_GGUF, L4_256, MODELS, SMOLLM2, Model, loaded, prompts

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SLOTS = 32
NEW_TOKENS = 64
ARRIVALS, SHORTEST, LONGEST = 96, 16, 128
ARRIVING = 0.5  # of the time that static batches compute, all requests have come after
SYSTEM_TOKENS, SHARING = 200, 16
DECODED = 128  # tokens for one client
# Of transformers' continuous batching: (attention, tokens of a page, tokens of a forward pass)
SWEEP = [(attention, page, most) for attention in ("sdpa", "eager") for page in (32, 128) for most in (128, 512)]


class Request(NamedTuple):
    """at: seconds after the start at which it comes."""

    prompt: list[int]
    new_tokens: int
    at: float = 0.0


# The figures


def static(scale: Scale) -> Iterator[Figure]:
    """32 requests at once, equal lengths, against one batch of `generate`."""
    return (_static(model, scale) for model in MODELS)


def arrivals(scale: Scale) -> Iterator[Figure]:
    """Requests of unequal lengths that come over time, against static batches in the order in which they come."""
    return (_arrivals(model, scale) for model in MODELS)


def continuous(scale: Scale) -> Iterator[Figure]:
    """32 requests at once, equal lengths, against transformers' continuous batching at the best of `SWEEP`."""
    return (_continuous(model, scale) for model in MODELS)


def prefix(scale: Scale) -> list[Figure]:
    """Requests that begin with the same system prompt, against the same engine without sharing of prefixes."""
    requests = _sharing(SMOLLM2, scale)
    model = loaded(SMOLLM2)
    sharing, plain = (engine_of(SMOLLM2, model, requests, share_prefixes=share) for share in (True, False))
    turns = [partial(through_engine, engine, requests) for engine in (sharing, plain)]
    return [compare(f"prefix_{SMOLLM2.name}", 1.5, *turns, same_answers, scale.pairs)]


def one_client(scale: Scale) -> list[Figure]:
    """Decoding for one request, against llama.cpp with the same values in fp32, its cache in fp32 too."""
    request = Request(prompts(SMOLLM2, 1)[0], max(4, scale.of(DECODED)))
    engine = engine_of(SMOLLM2, loaded(SMOLLM2), [request])
    name = f"one_client_{SMOLLM2.name}"
    return [
        compare(name, 0.7, lambda: decoding(engine, request), lambda: llama_cpp(request), same_answers, scale.pairs)
    ]


def _static(model: Model, scale: Scale) -> Figure:
    requests = equal(model, scale)
    weights = loaded(model)
    engine = engine_of(model, weights, requests)
    return _timed(
        f"static_{model.name}", 0.9, engine, requests, lambda: in_batches(weights, requests, len(requests)), scale
    )


def _arrivals(model: Model, scale: Scale) -> Figure:
    slots = max(2, scale.of(SLOTS))
    weights = loaded(model)
    requests = over_time(_unequal(model, scale), weights, slots)
    engine = engine_of(model, weights, requests, slots=slots)
    theirs = lambda: in_batches(weights, requests, slots)  # noqa: E731
    figure = _timed(f"arrivals_{model.name}", 1.4, engine, requests, theirs, scale)
    figure.detail["arriving_s"] = requests[-1].at
    return figure


def _continuous(model: Model, scale: Scale) -> Figure:
    requests = equal(model, scale)
    engine = engine_of(model, loaded(model), requests)
    best, seconds = fastest(model, requests)
    bar = 3.0 if model == L4_256 else 1.5
    figure = _timed(f"continuous_{model.name}", bar, engine, requests, best, scale)
    figure.detail["sweep_seconds"] = seconds
    return figure


def _timed(
    name: str, bar: float, engine: Engine, requests: list[Request], theirs: Callable[[], Turn], scale: Scale
) -> Figure:
    figure = compare(name, bar, lambda: through_engine(engine, requests), theirs, same_answers, scale.pairs)
    figure.detail["tokens"] = sum(request.new_tokens for request in requests)
    return figure


# What is asked for


def equal(model: Model, scale: Scale) -> list[Request]:
    return [Request(prompt, max(4, scale.of(NEW_TOKENS))) for prompt in prompts(model, max(2, scale.of(SLOTS)))]


def over_time(requests: list[Request], model: PreTrainedModel, slots: int) -> list[Request]:
    """The same, the last of which comes after ARRIVING of the seconds that static batches of them compute."""
    in_batches(model, requests[:slots], slots)  # what happens once
    spread = ARRIVING * in_batches(model, requests, slots).seconds
    return [request._replace(at=spread * n / (len(requests) - 1)) for n, request in enumerate(requests)]


def _unequal(model: Model, scale: Scale) -> list[Request]:
    draw = Random(1)
    asked = prompts(model, max(4, scale.of(ARRIVALS)))
    return [Request(prompt, max(2, scale.of(draw.randint(SHORTEST, LONGEST)))) for prompt in asked]


def _sharing(model: Model, scale: Scale) -> list[Request]:
    """A system prompt of 200 tokens, 8 to 60 more of each request's own, 16 to 64 to answer."""
    draw = Random(2)
    system = prompts(model, 1, SYSTEM_TOKENS, seed=1)[0]
    own = prompts(model, max(2, scale.of(SHARING)), 60)
    return [Request(system + one[: draw.randint(8, 60)], max(2, scale.of(draw.randint(16, 64)))) for one in own]


# The arms


def engine_of(model: Model, weights: PreTrainedModel, requests: Sequence[Request], **options: bool | int) -> Engine:
    """An engine with a slot for each request, unless fewer are wanted, and no more context than the longest needs."""
    longest = max(len(request.prompt) + request.new_tokens for request in requests)
    settings = {"slots": len(requests), "context": longest, **options}
    return Engine(weights, load_tokenizer(model.folder), **settings)


def through_engine(engine: Engine, requests: Sequence[Request]) -> Turn:
    """Each request is added when it comes; nothing of an earlier turn's prompts is known any more."""
    answers: list[list[int]] = [[] for _ in requests]
    coming = deque(enumerate(requests))
    engine.drop_prefixes()
    begun = time.perf_counter()
    while coming or engine.has_work:
        while coming and coming[0][1].at <= time.perf_counter() - begun:
            number, request = coming.popleft()
            engine.add(request.prompt, greedy(request.new_tokens), str(number))
        if not engine.has_work:
            time.sleep(max(0.0, begun + coming[0][1].at - time.perf_counter()))
            continue
        for token in engine.step():
            answers[int(token.request_id)].append(token.id)
    return Turn(time.perf_counter() - begun, {"answers": answers})


def in_batches(model: PreTrainedModel, requests: Sequence[Request], size: int) -> Turn:
    """Batches of `size` by `generate`, in order of arrival: each begins when its last has come, and lasts as long as
    its longest. Their prompts have one length, so that nothing is padded."""
    answers: list[list[int]] = []
    begun = time.perf_counter()
    for start in range(0, len(requests), size):
        batch = requests[start : start + size]
        time.sleep(max(0.0, begun + batch[-1].at - time.perf_counter()))
        answers += _generated(model, batch)
    return Turn(time.perf_counter() - begun, {"answers": answers})


def greedy(new_tokens: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=new_tokens, temperature=0)


def decoding(engine: Engine, request: Request) -> Turn:
    """Seconds from the first token to the last."""
    engine.drop_prefixes()
    ids, times = [], []
    for token in engine.stream(request.prompt, greedy(request.new_tokens)):
        ids.append(token.id)
        times.append(time.perf_counter())
    return Turn(times[-1] - times[0], {"answers": [ids]})


def llama_cpp(request: Request) -> Turn:
    """The same of llama.cpp, in a process of its own."""
    order = {"model": FP32_GGUF, "prompt": request.prompt, "new_tokens": request.new_tokens, "threads": CPUS}
    words = [str(peer.python("llama_cpp")), str(Path(__file__).with_name("llama_cpp_decode.py"))]
    said = processes.answer([*words, json.dumps(order, default=str)], peer.environment())
    return Turn(said["seconds"], {"answers": [said["ids"]]})


def fastest(model: Model, requests: list[Request]) -> tuple[Callable[[], Turn], dict[str, float]]:
    """transformers' continuous batching at the best of `SWEEP`, and the seconds of each, the second turn's."""
    weights = {attention: loaded(model, attn_implementation=attention) for attention, _, _ in SWEEP}
    arms = {setting: _Batching(weights[setting[0]], requests, *setting[1:]) for setting in SWEEP}
    seconds = {}
    for setting, arm in arms.items():
        arm()
        seconds[setting] = arm().seconds
    best = min(seconds, key=lambda setting: seconds[setting])
    return arms[best], {" ".join(map(str, setting)): took for setting, took in seconds.items()}


class _Batching:
    """A turn of transformers' continuous batching; not timed are the start and the end of its thread."""

    def __init__(self, model: PreTrainedModel, requests: list[Request], page: int, most: int):
        from transformers import ContinuousBatchingConfig, GenerationConfig

        self.model = model
        self.requests = requests
        blocks = sum(-(-(len(one.prompt) + one.new_tokens) // page) for one in requests)
        self.batching = ContinuousBatchingConfig(
            page_size=page, num_blocks=2 * blocks, max_batch_tokens=most, max_requests_per_batch=len(requests)
        )
        self.generation = GenerationConfig(do_sample=False, max_new_tokens=requests[0].new_tokens, eos_token_id=-1)

    def __call__(self) -> Turn:
        answers: dict[str, list[int]] = {}
        given = {"generation_config": self.generation, "continuous_batching_config": self.batching, "warmup": False}
        with self.model.continuous_batching_context_manager(**given) as manager:
            begun = time.perf_counter()
            for number, request in enumerate(self.requests):
                manager.add_request(request.prompt, request_id=str(number), max_new_tokens=request.new_tokens)
            while len(answers) < len(self.requests) and manager.is_running():
                done = manager.get_result(timeout=1)
                if done is not None and done.is_finished():
                    answers[done.request_id] = list(done.generated_tokens)
            seconds = time.perf_counter() - begun
        return Turn(seconds, {"answers": [answers.get(str(number), []) for number in range(len(self.requests))]})


@torch.inference_mode()
def _generated(model: PreTrainedModel, batch: Sequence[Request]) -> list[list[int]]:
    ids = torch.tensor([request.prompt for request in batch])
    most = max(request.new_tokens for request in batch)
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=most, do_sample=False)
    rows = made[:, ids.shape[1] :].tolist()
    return [row[: request.new_tokens] for row, request in zip(rows, batch, strict=True)]
