"""The generation engine: continuous batching over any Hugging Face causal language model.

Requests join and leave the running batch at token granularity, as the cache of keys and values has room for them
(`llm.scheduling`, `llm.kv_cache`); prompts are prefilled in chunks between decode steps, so a long prompt delays
nobody by more than one chunk, and what several have in common at their beginning is read once (`llm.prefixes`). One
owner drives an engine: it is not thread-safe.
"""

from __future__ import annotations

import inspect
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from llm.attention_masks import AttentionMasks
from llm.grammar import Grammars
from llm.kv_cache import BLOCK, Plan, SlotCache, plan_decode, plan_prefill
from llm.prefixes import Chain, Prefixes
from llm.sampling import Sampler, SamplingParams, choose
from llm.scheduling import Request, Scheduler, positions_of
from llm.text_stream import TextStream
from llm.vocabulary import END_OF_TURN

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FinishReason = Literal["stop", "length", "error"]
PREFIX_TOKENS = 512  # positions for each slot, at most, in which prefixes are kept
IDLE_PREFILL = 4  # how many chunks are read at once while nobody waits for the next token


@dataclass(frozen=True)
class Token:
    """One generated token.

    `text` is what can be shown because of it: joined over an answer it is the answer's text, without end-of-text
    tokens and stop strings. `logprob` and `top` are of the model's own distribution, the log-softmax of its logits in
    fp32 before temperature and truncation: what a forward pass over the same ids gives, and what policy gradients
    need at temperature 1 without truncation, where it is also the distribution sampled from.

    `finish_reason` is "stop" after an end of text, a stop string or id, or a grammar's end; "length" at
    max_new_tokens; None while the answer goes on. It is "error" if the request failed (its grammar, or numbers that
    aren't finite): such a token has the id -1, no text and log-probability 0, and `error` says what happened.
    """

    request_id: str
    id: int
    text: str
    logprob: float
    top: list[tuple[int, float]]  # the likeliest ids with their log-probabilities, `params.top_logprobs` of them
    finish_reason: FinishReason | None
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """One whole answer. Its tokens include the end-of-text token or the stop string's, where one ended it.

    `ids` and `logprobs` are of what was generated: a request that failed has one token more.
    """

    request_id: str
    prompt_ids: list[int]
    tokens: list[Token]

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens if token.error is None]

    @property
    def text(self) -> str:
        return "".join(token.text for token in self.tokens)

    @property
    def logprobs(self) -> list[float]:
        return [token.logprob for token in self.tokens if token.error is None]

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.tokens[-1].finish_reason


class Engine:
    """Generates for many requests at once; `add` them, then call `step` until `has_work` is false."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerFast,
        *,
        slots: int = 32,
        context: int | None = None,
        cache_tokens: int | None = None,
        prefill_tokens: int = 512,
        share_prefixes: bool = True,
    ):
        """`slots`: how many requests run together at most; the rest wait in order.

        `context`: positions of one request at most, by default (and at most) the model's. `cache_tokens`: positions of
        all together, in memory that is taken as it is needed; a request starts when its prompt and its longest answer
        have room. By default slots x context. `prefill_tokens`: prompt tokens computed in one step.
        `share_prefixes`: whether what requests have in common at their beginning is kept and read once; then the
        engine must hear of new weights (`load_weights`, `drop_prefixes`).
        """
        if slots < 1 or prefill_tokens < 1:
            raise ValueError(f"slots and prefill_tokens must be at least 1, got {slots} and {prefill_tokens}")
        self.model = model
        self.tokenizer = tokenizer
        self.slots = slots
        self.context = usable_context(model, context)
        self.cache_tokens = slots * positions_of(self.context) if cache_tokens is None else cache_tokens
        if self.cache_tokens < 2 * BLOCK:
            raise ValueError(f"cache_tokens must be at least {2 * BLOCK}, got {cache_tokens}")
        self.prefill_tokens = prefill_tokens
        self.end_ids = end_ids(model, tokenizer)
        config = model.config.get_text_config()
        self.vocab_size = config.vocab_size
        self.prefix_hit_tokens = 0  # prompt tokens that nobody had to read again
        self._slices_logits = "logits_to_keep" in inspect.signature(model.forward).parameters
        self._masks = AttentionMasks(config)
        self._cache = SlotCache(config.num_hidden_layers, slots, self.cache_tokens, model.device)
        kept = min(self.cache_tokens // 4, PREFIX_TOKENS * slots) if share_prefixes else 0
        self._prefixes = Prefixes(self._cache, kept // BLOCK)
        self._scheduler = Scheduler(slots, self.cache_tokens)
        self._requests: dict[str, Request] = {}  # running and waiting
        self._numbers = itertools.count()

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def running(self) -> int:
        """Requests that hold a slot."""
        return self._scheduler.running

    @property
    def waiting(self) -> int:
        """Requests that wait for a slot, or for room in the cache."""
        return len(self._scheduler.waiting)

    @property
    def queued_tokens(self) -> int:
        """Tokens between now and the end of all requests, at most: prompts to read and answers to make."""
        return sum(request.queued_tokens for request in list(self._requests.values()))

    def check(self, prompt_ids: Sequence[int], params: SamplingParams) -> list[int]:
        """The prompt as a list of ids; ValueError, with the numbers, if such a request could never run."""
        prompt = [operator.index(token) for token in prompt_ids]
        if not prompt:
            raise ValueError("the prompt is empty: it needs at least one token")
        outside = [token for token in prompt if not 0 <= token < self.vocab_size]
        if outside:
            raise ValueError(f"the prompt has id {outside[0]}, outside the vocabulary of {self.vocab_size}")
        self._check_room(len(prompt), params.max_new_tokens)
        params.check_vocabulary(self.vocab_size)
        if params.grammar is not None:
            self._grammars.check(params.grammar)
        return prompt

    def _check_room(self, prompt: int, answer: int) -> None:
        total = prompt + answer
        makes = f"the prompt's {prompt} tokens and max_new_tokens={answer} make {total}"
        if total > self.context:
            raise ValueError(f"{makes}, more than the context of {self.context}: shorten either")
        if positions_of(total) > self.cache_tokens:
            raise ValueError(
                f"{makes}, more than the {self.cache_tokens} positions of the cache, of which requests take whole "
                f"blocks of {BLOCK}: shorten either, or give the engine more cache_tokens"
            )

    def add(self, prompt_ids: Sequence[int], params: SamplingParams, request_id: str | None = None) -> str:
        """Queue a request; return its id. ValueError if it could never run, or if the id is in use."""
        prompt = self.check(prompt_ids, params)
        number = next(self._numbers)
        if request_id is None:
            request_id = f"request-{number}"
        if request_id in self._requests:
            raise ValueError(f"request id {request_id!r} is already running or waiting")
        matcher = self._grammars.matcher(params.grammar) if params.grammar is not None else None
        sampler = Sampler(params, prompt, vocab_size=self.vocab_size, end_ids=self.end_ids, matcher=matcher)
        text = TextStream(self._decode_text, params.stop)
        request = Request(request_id, number, prompt, params, sampler, text, self._prefixes.chain(prompt))
        self._requests[request_id] = request
        self._scheduler.waiting.append(request)
        return request_id

    def cancel(self, request_id: str) -> bool:
        """Drop a request and free its slot at once. False if it is unknown or already finished."""
        request = self._requests.pop(request_id, None)
        if request is None:
            return False
        if request.row < 0:
            self._scheduler.waiting.remove(request)
        else:
            self._scheduler.release(request)
        return True

    @torch.inference_mode()
    def step(self) -> list[Token]:
        """One token for every request that is past its prompt, then one chunk of the prompts that are not.

        Returns the new tokens, at most one a request; none while prompts are still being read.
        """
        if self.model.training:
            raise RuntimeError("the model is in training mode, where dropout changes what it says: call model.eval()")
        self._admit()
        return self._decode_step() + self._prefill_step()

    def load_weights(self, weights: Mapping[str, Tensor] | Callable[[PreTrainedModel], object]) -> None:
        """Replace the model's weights between two steps: by name, or by a function that changes the model in place.

        Prefixes are dropped, and requests on their way read what they have again, so that from here on every token and
        log-probability is of the new weights. ValueError, before anything changes, if names or shapes differ.
        """
        if not callable(weights):
            _check_weights(self.model, weights)
        try:
            with torch.no_grad():
                weights(self.model) if callable(weights) else self.model.load_state_dict(weights, strict=False)
        finally:
            self.drop_prefixes()

    def drop_prefixes(self) -> None:
        """Forget all that was read with the weights of before, which requests on their way read again.

        Whoever changes the weights behind the engine's back, as an optimizer does, has to call this.
        """
        self._prefixes.drop()
        for request in self._scheduler:
            request.computed = 0

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

    @cached_property
    def _grammars(self) -> Grammars:
        return Grammars(self.tokenizer, self.vocab_size, self.end_ids)

    def _decode_text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _admit(self) -> None:
        """Start requests that wait and have room, in rows side by side."""
        admitted = self._scheduler.admit()
        for source, target, length in self._scheduler.close_gaps():
            self._cache.move(source, target, length)
        if admitted:
            rows, width = len(self._scheduler.rows), self._scheduler.widest
            self._prefixes.leave(rows * width)
            self._cache.reserve(rows, width, max(request.computed for request in self._scheduler))

    def _decode_step(self) -> list[Token]:
        """Feed every decoding row its last token and sample the next."""
        batch = list(self._scheduler)
        decoding = [row for row, request in enumerate(batch) if request.decoding]
        if not decoding:
            return []
        # Rows that are still reading ride along, so that the batch stays a view of the cache: what they write at
        # their next position is overwritten by their next chunk.
        last = [request.new_ids[-1] if request.decoding else 0 for request in batch]
        computed = [request.computed for request in batch]
        positions = self._tensor(computed)
        plan = plan_decode(positions, max(computed) + 1)
        logits = self._forward(plan, self._tensor(last)[:, None], positions[:, None], None)
        requests = [batch[row] for row in decoding]
        for request in requests:
            request.computed += 1
        return self._sample(requests, logits if len(decoding) == len(batch) else logits[decoding])

    def _prefill_step(self) -> list[Token]:
        """Compute one chunk of the prompts being read; those that end in it get their first token."""
        chunks = self._chunks(self._readers())
        if not chunks:
            return []
        starts = [request.computed for request, _ in chunks]
        lengths = [length for _, length in chunks]
        plan = plan_prefill([request.row for request, _ in chunks], starts, lengths, self.model.device)
        logits = self._forward(plan, *self._padded(chunks), [length - 1 for length in lengths])
        for request, length in chunks:
            request.computed += length
        self._prefixes.keep((request.row, request.chain[: request.computed // BLOCK]) for request, _ in chunks)
        done = [index for index, (request, _) in enumerate(chunks) if request.unread == 0]
        return self._sample([chunks[index][0] for index in done], logits[done]) if done else []

    def _readers(self) -> list[Request]:
        """Requests with prompts to read on, the oldest first; what others have read of them is copied.

        A prompt that begins like one that is being read waits for it, and is spared that much.
        """
        unread = sorted((r for r in self._scheduler if not r.decoding), key=lambda request: request.number)
        coming = {block for r in unread if r.computed for block in r.chain[r.computed // BLOCK :]}
        readers, found = [request for request in unread if request.computed], []
        for request in unread:
            if request.computed:
                continue
            chain = request.chain[: (request.unread - 1) // BLOCK]  # its last token is always read, for the next one
            held = self._prefixes.held(chain)
            if held < len(chain) and chain[held] in coming:
                continue
            found.append((request, chain[:held]))
            coming.update(request.chain[held:])
        self._restore(found)
        return readers + [request for request, _ in found]

    def _restore(self, found: list[tuple[Request, Chain]]) -> None:
        self._prefixes.restore((request.row, chain) for request, chain in found if chain)
        for request, chain in found:
            request.computed = len(chain) * BLOCK
            self.prefix_hit_tokens += request.computed

    def _chunks(self, readers: list[Request]) -> list[tuple[Request, int]]:
        """Which requests read how many tokens now: those that fit the budget side by side, the first always."""
        busy = any(request.decoding for request in self._scheduler)
        budget = self.prefill_tokens * (1 if busy else IDLE_PREFILL)
        chunks: list[tuple[Request, int]] = []
        width = 0
        for request in readers:
            length = min(request.unread, self.prefill_tokens)
            width = max(width, length)
            if chunks and width * (len(chunks) + 1) > budget:
                break
            chunks.append((request, length))
        return chunks

    def _padded(self, chunks: list[tuple[Request, int]]) -> tuple[Tensor, Tensor]:
        """Ids and positions (n, q) of the chunks; padding repeats the last ones, and nothing reads what it gives."""
        width = max(length for _, length in chunks)
        ids, positions = [], []
        for request, length in chunks:
            start, end = request.computed, request.computed + length
            padding = width - length
            known = request.known(start, end)
            ids.append(known + known[-1:] * padding)
            positions.append([*range(start, end), *[end - 1] * padding])
        return self._tensor(ids), self._tensor(positions)

    def _forward(self, plan: Plan, ids: Tensor, positions: Tensor, last: list[int] | None) -> Tensor:
        """Logits (n, V) after query `last[i]` of each row of ids (n, q), whose keys and values go into the cache.

        None: the rows have one query each.
        """
        self._cache.plan = plan
        keep = None if last is None else self._tensor(last)[:, None]
        slicing = {"logits_to_keep": keep} if keep is not None and self._slices_logits else {}
        output = self.model(
            input_ids=ids,
            attention_mask=self._masks.build(positions, plan.longest, self.model.dtype),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            **slicing,
        )
        if keep is None or slicing:
            return output.logits[:, 0]
        return output.logits.take_along_dim(keep[..., None], 1)[:, 0]

    def _sample(self, requests: list[Request], logits: Tensor) -> list[Token]:
        """The next token of each request from its row of logits (n, V); finished requests leave the batch."""
        logits = logits.float()
        totals = logits.logsumexp(-1)
        if not (finite := totals.isfinite()).all():
            logits = logits.where(finite[:, None], 0.0)  # only for `choose`: those requests end here
        ids = choose(logits, [request.sampler for request in requests])
        chosen = (logits.gather(-1, ids[:, None])[:, 0] - totals).tolist()
        tops = _likeliest(logits, totals, [request.params for request in requests])
        tokens = [
            self._accept(request, token, logprob, top)
            for request, token, logprob, top in zip(requests, ids.tolist(), chosen, tops, strict=True)
        ]
        self._release([request for request, token in zip(requests, tokens, strict=True) if token.finish_reason])
        return tokens

    def _accept(self, request: Request, token: int, logprob: float, top: list[tuple[int, float]]) -> Token:
        """Append a sampled id to its request, with the text that it makes certain and whether it is the last."""
        if not math.isfinite(logprob):
            return self._failed(request, "the model's numbers are not finite")
        try:
            text, reason = self._advance(request, token)
        except Exception as error:  # whatever one request's text or grammar runs into must not end the others
            return self._failed(request, f"{type(error).__name__}: {error}")
        if request.sampler.error is not None:
            return self._failed(request, request.sampler.error)
        return Token(request.id, token, text, logprob, top, reason)

    def _advance(self, request: Request, token: int) -> tuple[str, FinishReason | None]:
        params, stream = request.params, request.text
        request.sampler.accept(token)
        request.new_ids.append(token)
        if token in self.end_ids or token in params.stop_ids:
            return stream.finish(), "stop"
        text = stream.push(token)
        if stream.stopped:
            return text, "stop"
        full = len(request.new_ids) == params.max_new_tokens
        if not full and not request.sampler.finished:
            return text, None
        text += stream.finish()
        return text, "stop" if stream.stopped or request.sampler.finished else "length"

    def _failed(self, request: Request, error: str) -> Token:
        self._cache.clear(request.row)
        request.computed = 0
        return Token(request.id, -1, "", 0.0, [], "error", error)

    def _release(self, requests: list[Request]) -> None:
        """Forget requests that have finished and free their rows; what they hold is kept for a next turn."""
        ended = [request for request in requests if request.computed]
        self._prefixes.keep((request.row, self._whole_chain(request)) for request in ended)
        for request in requests:
            del self._requests[request.id]
            self._scheduler.release(request)

    def _whole_chain(self, request: Request) -> Chain:
        return self._prefixes.chain(request.known(0, request.computed), request.chain)

    def _tensor(self, values: list) -> Tensor:
        return torch.tensor(values, device=self.model.device)


def usable_context(model: PreTrainedModel, wanted: int | None) -> int:
    """Positions of one request; ValueError if the model can't be told its positions, or has fewer than `wanted`."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if "position_ids" not in inspect.signature(model.forward).parameters or longest is None:
        raise ValueError(f"{type(model).__name__} takes no position ids or names no context: the engine can't run it")
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


def _check_weights(model: PreTrainedModel, weights: Mapping[str, Tensor]) -> None:
    """ValueError unless `weights` are all of the model's, by name and shape; tied ones may be left out."""
    own = model.state_dict()
    given = {own[name].data_ptr() for name in weights if name in own}
    wrong = [name for name in weights if name not in own or own[name].shape != weights[name].shape]
    wrong += [name for name, weight in own.items() if name not in weights and weight.data_ptr() not in given]
    if wrong:
        raise ValueError(f"not this model's weights: {len(wrong)} differ in name or shape, {wrong[0]} among them")


def _likeliest(logits: Tensor, totals: Tensor, params: list[SamplingParams]) -> list[list[tuple[int, float]]]:
    """As many (id, log-probability) pairs as each request asks for, from logits (n, V) and their logsumexps (n,)."""
    most = min(max(p.top_logprobs for p in params), logits.shape[-1])
    if most == 0:
        return [[] for _ in params]
    values, ids = logits.topk(most, dim=-1)
    values = values - totals[:, None]
    pairs = [list(zip(*row, strict=True)) for row in zip(ids.tolist(), values.tolist(), strict=True)]
    return [row[: p.top_logprobs] for row, p in zip(pairs, params, strict=True)]
