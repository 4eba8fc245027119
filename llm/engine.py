"""The generation engine: continuous batching over any Hugging Face causal language model.

Requests join and leave the running batch at token granularity. Each has one row of a fixed key-value cache
(`llm.kv_cache`), so memory is bounded by slots x context; prompts are prefilled in chunks between decode steps, so a
long prompt delays nobody by more than one chunk. One owner drives an engine: it is not thread-safe.
"""

from __future__ import annotations

import inspect
import itertools
import operator
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llm.grammar import Grammars
from llm.kv_cache import Plan, SlotCache, plan_decode, plan_prefill
from llm.sampling import Sampler, SamplingParams, choose
from llm.text_stream import TextStream
from llm.vocabulary import END_OF_TURN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FinishReason = Literal["stop", "length", "error"]


@dataclass(frozen=True)
class Token:
    """One generated token.

    `text` is what can be shown because of it: joined over an answer it is the answer's text, without end-of-text
    tokens and stop strings. `logprob` and `top` are of the model's own distribution, the log-softmax of its logits in
    fp32 before temperature and truncation: what a forward pass over the same ids gives, and what policy gradients
    need at temperature 1 without truncation, where it is also the distribution sampled from.
    """

    request_id: str
    id: int
    text: str
    logprob: float
    top: list[tuple[int, float]]  # the likeliest ids with their log-probabilities, `params.top_logprobs` of them
    finish_reason: (
        FinishReason | None
    )  # "stop": end of text or a stop string; "length": max_new_tokens; "error": its grammar failed


@dataclass(frozen=True)
class Completion:
    """One whole answer. Its tokens include the end-of-text token or the stop string's, where one ended it."""

    request_id: str
    prompt_ids: list[int]
    tokens: list[Token]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.tokens[-1].finish_reason


@dataclass(eq=False)
class _Request:
    id: str
    prompt_ids: list[int]
    params: SamplingParams
    sampler: Sampler
    text: TextStream
    computed: int = 0  # positions whose keys and values are in the cache
    new_ids: list[int] = field(default_factory=list)

    @property
    def decoding(self) -> bool:
        return self.computed >= len(self.prompt_ids)


class Engine:
    """Generates for many requests at once; `add` them, then call `step` until `has_work` is false.

    `slots`: how many requests run together, the rest wait in order. `context`: positions per slot, by default (and at
    most) the model's. `prefill_tokens`: prompt tokens computed in one step.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        slots: int = 32,
        context: int | None = None,
        prefill_tokens: int = 512,
    ):
        if slots < 1 or prefill_tokens < 1:
            raise ValueError(f"slots and prefill_tokens must be at least 1, got {slots} and {prefill_tokens}")
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots
        self.context = usable_context(model, context)
        self.vocab_size = model.config.vocab_size
        self.prefill_tokens = prefill_tokens
        self.end_ids = end_ids(model, tokenizer)
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._cache = SlotCache(model.config.num_hidden_layers, slots, self.context)
        self._requests: dict[str, _Request] = {}  # running and waiting
        self._rows: list[_Request] = []  # row i of the cache belongs to request i: no holes, so a batch is a view
        self._waiting: deque[_Request] = deque()
        self._numbers = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot."""
        return len(self._waiting)

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The prompt as a list of ids; ValueError, with the numbers, if such a request could never run."""
        prompt = [operator.index(token) for token in prompt_ids]
        if not prompt:
            raise ValueError("the prompt is empty: it needs at least one token")
        outside = [token for token in prompt if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"the prompt has id {outside[0]}, outside the vocabulary of {self.vocab_size}")
        total = len(prompt) + params.max_new_tokens
        if total > self.context:
            raise ValueError(
                f"the prompt's {len(prompt)} tokens and max_new_tokens={params.max_new_tokens} make {total}, "
                f"more than the context of {self.context}: shorten either"
            )
        params.check_vocabulary(self.vocab_size)
        if params.grammar is not None:
            self._grammars.check(params.grammar)
        return prompt

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocab_size, self.end_ids)

    def add(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None) -> str:
        """Queue a request; return its id. ValueError if it could never run, or if the id is in use."""
        prompt = self.check(prompt_ids, params)
        if request_id is None:
            request_id = f"request-{next(self._numbers)}"
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is already running or waiting")
        text = TextStream(self._decode_text, params.stop)
        matcher = self._grammars.matcher(params.grammar) if params.grammar is not None else None
        sampler = Sampler(params, prompt, vocab_size=self.vocab_size, end_ids=self.end_ids, matcher=matcher)
        request = _Request(request_id, prompt, params, sampler, text)
        self._requests[request_id] = request
        self._waiting.append(request)
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its slot at once. False if it is unknown or already finished."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        if request in self._rows:
            self._release(request)
        else:
            self._waiting.remove(request)
            del self._requests[request_id]
        return True

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One token for every request that is past its prompt, then one chunk of the prompts that are not.

        Returns the new tokens, at most one a request; none while prompts are still being read.
        """
        if self.model.training:
            raise RuntimeError("the model is in training mode, where dropout changes what it says: call model.eval()")
        while self._waiting and len(self._rows) < self.slots:
            self._rows.append(self._waiting.popleft())
        reading = [request for request in self._rows if not request.decoding]
        return self._decode_step() + self._prefill_step(reading)

    def stream(self, prompt_ids: Sequence[int], params: SamplingParams) -> Iterator[Token]:
        """The tokens of one request on an otherwise idle engine, as they come. Closing the iterator cancels it."""
        self._check_idle()
        request_id = self.add(prompt_ids, params)
        try:
            while self.has_work:
                yield from self.step()
        finally:
            self.cancel(request_id)

    def generate(
        self, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
    ) -> list[Completion]:
        """Answers to `prompts` in their order, on an otherwise idle engine; `params` for all, or one for each."""
        self._check_idle()
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else list(params)
        if len(each) != len(prompts):
            raise ValueError(f"params must be one, or one for each prompt: got {len(each)} for {len(prompts)} prompts")
        for prompt, settings in zip(prompts, each, strict=True):
            self.check(prompt, settings)  # all of them, before any is queued
        answers: dict[str, Completion] = {}
        for prompt, settings in zip(prompts, each, strict=True):
            request_id = self.add(prompt, settings)
            answers[request_id] = Completion(request_id, list(prompt), [])
        while self.has_work:
            for token in self.step():
                answers[token.request_id].tokens.append(token)
        return list(answers.values())

    def _check_idle(self) -> None:
        if self.has_work:
            raise RuntimeError("the engine has other requests: drive it with add() and step()")

    def _decode_text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _decode_step(self) -> list[Token]:
        """Feed every decoding row its last token and sample the next."""
        decoding = [row for row, request in enumerate(self._rows) if request.decoding]
        if not decoding:
            return []
        # Rows that are still reading ride along, so that the batch stays a view of the cache: what they write at
        # their next position is overwritten by their next chunk.
        last = [request.new_ids[-1] if request.decoding else 0 for request in self._rows]
        positions = [request.computed for request in self._rows]
        plan = plan_decode(positions, self.model.device)
        logits = self._forward(plan, self._tensor(last)[:, None], self._tensor(positions)[:, None], [0] * len(last))
        requests = [self._rows[row] for row in decoding]
        for request in requests:
            request.computed += 1
        return self._sample(requests, logits if len(decoding) == len(last) else logits[decoding])

    def _prefill_step(self, reading: list[_Request]) -> list[Token]:
        """Compute one chunk of the prompts being read; those that end in it get their first token."""
        chunks = self._chunks(reading)
        if not chunks:
            return []
        starts = [request.computed for request, _ in chunks]
        lengths = [length for _, length in chunks]
        plan = plan_prefill([self._rows.index(request) for request, _ in chunks], starts, lengths, self.model.device)
        logits = self._forward(plan, *self._padded(chunks), [length - 1 for length in lengths])
        for request, length in chunks:
            request.computed += length
        done = [index for index, (request, _) in enumerate(chunks) if request.decoding]
        return self._sample([chunks[index][0] for index in done], logits[done]) if done else []

    def _chunks(self, reading: list[_Request]) -> list[tuple[_Request, int]]:
        """Which requests read how many prompt tokens now: those that fit the budget side by side, the first always."""
        chunks: list[tuple[_Request, int]] = []
        width = 0
        for request in reading:
            length = min(len(request.prompt_ids) - request.computed, self.prefill_tokens)
            width = max(width, length)
            if chunks and width * (len(chunks) + 1) > self.prefill_tokens:
                break
            chunks.append((request, length))
        return chunks

    def _padded(self, chunks: list[tuple[_Request, int]]) -> tuple[Tensor, Tensor]:
        """Ids and positions (n, q) of the chunks; padding repeats the last ones, and nothing reads what it gives."""
        width = max(length for _, length in chunks)
        ids, positions = [], []
        for request, length in chunks:
            start, end = request.computed, request.computed + length
            padding = width - length
            ids.append(request.prompt_ids[start:end] + [request.prompt_ids[end - 1]] * padding)
            positions.append([*range(start, end), *[end - 1] * padding])
        return self._tensor(ids), self._tensor(positions)

    def _forward(self, plan: Plan, ids: Tensor, positions: Tensor, last: list[int]) -> Tensor:
        """Logits (n, V) after query `last[i]` of each row of ids (n, q), whose keys and values go into the cache."""
        self._cache.plan = plan
        future = torch.arange(plan.longest, device=ids.device) > positions[:, None, :, None]  # (n, 1, q, longest)
        # Added to the scores, as every attention implementation takes it; a boolean mask only some do.
        mask = torch.zeros(future.shape, dtype=self.model.dtype, device=ids.device)
        mask.masked_fill_(future, torch.finfo(mask.dtype).min)
        keep = self._tensor(last)[:, None]
        slicing = {"logits_to_keep": keep} if self._slices_logits else {}
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **slicing,
        )
        return output.logits[:, 0] if slicing else output.logits.take_along_dim(keep[..., None], 1)[:, 0]

    def _sample(self, requests: list[_Request], logits: Tensor) -> list[Token]:
        """The next token of each request from its row of logits (n, V); finished requests leave the batch."""
        params = [request.params for request in requests]
        ids = choose(logits, [request.sampler for request in requests])
        logprobs = torch.log_softmax(logits.float(), dim=-1)
        chosen = logprobs.gather(-1, ids[:, None])[:, 0].tolist()
        tops = _likeliest(logprobs, params)
        tokens = [
            self._accept(request, token, logprob, top)
            for request, token, logprob, top in zip(requests, ids.tolist(), chosen, tops, strict=True)
        ]
        for request, token in zip(requests, tokens, strict=True):
            if token.finish_reason:
                self._release(request)
        return tokens

    def _accept(self, request: _Request, token: int, logprob: float, top: list[tuple[int, float]]) -> Token:
        """Append a sampled id to its request, with the text that it makes certain and whether it is the last."""
        if request.sampler.error is not None:
            return Token(request.id, token, request.text.finish(), logprob, top, "error")
        request.new_ids.append(token)
        request.sampler.accept(token)
        reason: FinishReason | None = None
        if token in self.end_ids or token in request.params.stop_ids:
            text, reason = request.text.finish(), "stop"
        else:
            text = request.text.push(token)
            if len(request.new_ids) == request.params.max_new_tokens and not request.text.stopped:
                text, reason = text + request.text.finish(), "length"
            if request.text.stopped:
                reason = "stop"
        return Token(request.id, token, text, logprob, top, reason)

    def _release(self, request: _Request) -> None:
        """Forget the request and free its row; the last row takes its place."""
        del self._requests[request.id]
        row = self._rows.index(request)
        moved = self._rows.pop()
        if moved is not request:
            self._rows[row] = moved
            self._cache.move(len(self._rows), row, moved.computed)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.model.device)


def usable_context(model: PreTrainedModel, wanted: int | None) -> int:
    """Positions per slot at which plain attention gives the model's own results; ValueError if `wanted` is more."""
    config = model.config
    longest = getattr(config, "max_position_embeddings", None)
    if "position_ids" not in inspect.signature(model.forward).parameters or longest is None:
        raise ValueError(f"{type(model).__name__} takes no position ids or names no context: the engine can't run it")
    unusual = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if unusual:
        kinds = ", ".join(sorted(unusual))
        raise ValueError(f"{type(model).__name__} has {kinds} layers: the engine runs attention only")
    # Inside its window, sliding attention is full attention.
    longest = min(longest, getattr(config, "sliding_window", None) or longest)
    if wanted is not None and not 1 < wanted <= longest:
        raise ValueError(f"context must be from 2 to the model's {longest}, got {wanted}")
    return wanted or longest


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> frozenset[int]:
    """The ids that end an answer: the tokenizer's and the model's end of text, and the end of a turn."""
    settings = model.generation_config
    listed = settings.eos_token_id if settings is not None else None
    ids = {tokenizer.eos_token_id, tokenizer.get_vocab().get(END_OF_TURN)}
    ids.update(listed if isinstance(listed, list) else [listed])
    return frozenset(ids - {None})


def _likeliest(logprobs: Tensor, params: list[SamplingParams]) -> list[list[tuple[int, float]]]:
    """For each row of log-probabilities (n, V), as many (id, log-probability) pairs as its request asks for."""
    most = min(max(p.top_logprobs for p in params), logprobs.shape[-1])
    if most == 0:
        return [[] for _ in params]
    values, ids = logprobs.topk(most, dim=-1)
    pairs = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [row[: p.top_logprobs] for row, p in zip(pairs, params, strict=True)]
