"""How the next token is chosen: a request's settings, the distribution that they make of the logits, and the draw."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm.grammar import Grammar, Matcher

MAX_STOPS = 16
MAX_STOP_IDS = 64
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 100
WIDTHS = (64, 1024)  # how many of the likeliest tokens are ranked before the whole vocabulary is
GREEDY_BELOW = 1e-5  # a temperature under which fp32 tells no second token from the likeliest


@dataclass(frozen=True)
class SamplingParams:
    """One request's settings. ValueError names the setting, its bounds and the value that was given.

    The logits are changed by the penalties, then by `logit_bias`; what may not come (an end before `min_new_tokens`,
    what `grammar` forbids) is taken out. They are divided by `temperature`, then cut by top-k, top-p and min-p in that
    order, each over what the one before it left.
    """

    max_new_tokens: int = 256
    min_new_tokens: int = (
        0  # no end of text and none of `stop_ids` before so many tokens, unless a grammar is finished
    )
    temperature: float = 1.0  # 0 (below 1e-5) takes the likeliest token every time
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens up to this mass (arXiv 1904.09751); 1 keeps all
    min_p: float = 0.0  # keep tokens with at least this share of the likeliest one's mass (arXiv 2407.01082); 0: all
    seed: int | None = None  # the same seed and prompt give the same tokens; None draws a fresh seed
    stop: tuple[str, ...] = ()  # generation ends before the first of these strings; none is ever part of the text
    stop_ids: tuple[int, ...] = ()  # ids that end the answer as an end of text does
    top_logprobs: int = 0  # how many of the likeliest tokens are reported with each token
    repetition_penalty: float = 1.0  # divides positive, multiplies negative logits of ids in prompt or answer (HF's)
    presence_penalty: float = 0.0  # taken off the logits of ids that are in the answer (OpenAI's)
    frequency_penalty: float = 0.0  # taken off once for each time that an id is in the answer (OpenAI's)
    # Added to the logits of ids: a mapping, kept as `biases` are, which can be hashed.
    logit_bias: Mapping[int, float] | tuple[tuple[int, float], ...] = ()
    grammar: Grammar | None = None  # what the answer's text must match

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, None)
        _check_int("min_new_tokens", self.min_new_tokens, 0, self.max_new_tokens)
        _check_float("temperature", self.temperature, 0, 100)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ValueError("top_p must be above 0 (1 keeps every token), got 0")
        _check_float("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_stop(self.stop)
        _check_ids("stop_ids", self.stop_ids, MAX_STOP_IDS)
        _check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)
        _check_float("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _check_float("presence_penalty", self.presence_penalty, -2, 2)
        _check_float("frequency_penalty", self.frequency_penalty, -2, 2)
        object.__setattr__(self, "logit_bias", _checked_bias(self.logit_bias))
        if self.grammar is not None and not isinstance(self.grammar, Grammar):
            raise ValueError(f"grammar must be a Grammar, got {self.grammar!r}")

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def biases(self) -> tuple[tuple[int, float], ...]:
        """What is added to the logits of which ids, in order of id."""
        assert isinstance(self.logit_bias, tuple)
        return self.logit_bias

    @property
    def penalises(self) -> bool:
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0

    def check_vocabulary(self, vocab_size: int) -> None:
        """ValueError if `logit_bias` or `stop_ids` name an id that a vocabulary of `vocab_size` hasn't."""
        for name, ids in (("logit_bias", [token for token, _ in self.biases]), ("stop_ids", self.stop_ids)):
            outside = [token for token in ids if token >= vocab_size]
            if outside:
                raise ValueError(f"{name} has id {outside[0]}, outside the vocabulary of {vocab_size}")


def generator_for(params: SamplingParams) -> torch.Generator:
    """A request's own source of randomness: seeded with its seed, or by the operating system."""
    generator = torch.Generator()
    if params.seed is None:
        generator.seed()
    else:
        generator.manual_seed(params.seed)
    return generator


def distribution(logits: Tensor, params: SamplingParams) -> Tensor:
    """The probabilities (V,), fp32, that the next token is drawn from, given its logits (V,)."""
    return distributions(logits[None], [params])[0]


def distributions(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Row by row, `distribution` of logits (B, V) under B requests' settings: (B, V), fp32."""
    logits = logits.float()
    # Less its maximum first: divided by a small temperature, the logits themselves could overflow to inf - inf.
    shifted = logits - logits.amax(-1, keepdim=True)
    probabilities = torch.softmax(shifted / _column(logits, [1.0 if p.greedy else p.temperature for p in params]), -1)
    greedy = [row for row, p in enumerate(params) if p.greedy]
    if greedy:
        likeliest = logits[greedy].argmax(-1)
        probabilities[greedy] = torch.zeros_like(probabilities[greedy]).scatter_(-1, likeliest[:, None], 1.0)
    cut = [row for row, p in enumerate(params) if p.truncates and not p.greedy]
    if cut:
        probabilities[cut] = _truncate(probabilities[cut], [params[row] for row in cut])
    return probabilities


def _truncate(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities (B, V) with what top-k, top-p and min-p leave out set to 0, summing to 1 again.

    Equal probabilities rank by id, so top-k keeps exactly k. The likeliest token is always kept. As few tokens are
    ranked as a row's own settings allow: a sort of the whole vocabulary takes ten times as long as all the rest.
    """
    truncated = torch.zeros_like(probabilities)
    left = list(range(len(params)))
    vocab_size = probabilities.shape[-1]
    for width in [*(width for width in WIDTHS if width < vocab_size), vocab_size]:
        rows = [row for row in left if params[row].top_k <= width or width == vocab_size]
        if not rows:
            continue
        ranked, ids = _ranked(probabilities[rows], width)
        kept = _kept(ranked, [params[row] for row in rows])
        ranked = ranked * kept
        # Its last partial sum, not sum(): that one rounds otherwise in a batch than in a row alone.
        ranked = ranked / ranked.cumsum(-1)[:, -1:]
        truncated[rows] = torch.zeros_like(probabilities[rows]).scatter_(-1, ids, ranked)
        enough = (~kept[:, -1]).tolist()
        settled = {row for row, cut in zip(rows, enough, strict=True) if cut or 0 < params[row].top_k <= width}
        left = [row for row in left if row not in settled]
    return truncated


def _ranked(probabilities: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """The `width` largest probabilities of each row of (B, V) and their ids, both (B, width); equal ones by id."""
    if width == probabilities.shape[-1]:
        ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        return ranked, ids
    values, ids = probabilities.topk(width, dim=-1)
    last = values[:, -1:]
    # Of the tokens that are as likely as the last, topk takes any; of impossible ones it doesn't matter which.
    tied = ((probabilities >= last).sum(-1) > width) & (last[:, 0] > 0)
    if tied.any():
        ids[tied] = probabilities[tied].sort(dim=-1, descending=True, stable=True).indices[:, :width]
    ids = ids.sort(dim=-1).values
    ranked, order = probabilities.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return ranked, ids.gather(-1, order)


def _kept(ranked: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Which of ranked probabilities (B, width) stay, the first ones of each row: bool (B, width)."""
    width = ranked.shape[-1]
    top_k = _column(ranked, [min(p.top_k or width, width) for p in params]).long()
    kept = torch.arange(width, device=ranked.device) < top_k
    mass = (ranked * kept).cumsum(-1)
    # Without top-k the mass of all is 1, of which the first `width` may be a part.
    whole = torch.where(_column(ranked, [p.top_k for p in params]) > 0, mass[:, -1:], 1.0)
    mass_before = torch.nn.functional.pad(mass[:, :-1], (1, 0)) / whole
    top_p = _column(ranked, [p.top_p for p in params])
    # A sum in fp32 can reach 1 early: top_p = 1 must not cut the tail for that.
    kept &= (mass_before < top_p) | (top_p == 1)
    kept &= ranked >= _column(ranked, [p.min_p for p in params]) * ranked[:, :1]
    kept[:, 0] = True
    return kept


def draw(probabilities: Tensor, generator: torch.Generator) -> int:
    """An id drawn from probabilities (V,) with one number of `generator`."""
    return int(draws(probabilities[None], [generator])[0])


def draws(probabilities: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Ids (B,), one for each row of probabilities (B, V), by inverse CDF in id order.

    Each row takes one number of its own generator, so what a request gets doesn't depend on who shares its batch.
    """
    # In float64 u < 1 keeps u * total < total, and with right=True the id found has more than zero mass.
    cumulative = probabilities.double().cumsum(-1)
    u = torch.cat([torch.rand(1, dtype=torch.float64, generator=generator) for generator in generators])
    threshold = u.to(cumulative.device)[:, None] * cumulative[:, -1:]
    return torch.searchsorted(cumulative, threshold, right=True)[:, 0]


class Sampler:
    """One request's sampling state: its generator, the ids that penalties count, its place in the grammar.

    `prompt_ids` and `end_ids` are of a vocabulary of `vocab_size`; `matcher` comes from `Grammars.matcher` where
    `params.grammar` is set. ValueError if `params` names ids outside the vocabulary.

    `error` says why the grammar failed, None while it hasn't: what `choose` gives such a request means nothing.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        *,
        vocab_size: int,
        end_ids: Collection[int],
        matcher: Matcher | None = None,
    ):
        params.check_vocabulary(vocab_size)
        if (params.grammar is None) != (matcher is None):
            raise ValueError("a request with a grammar needs a matcher, and one without takes none")
        self.params = params
        self.generator = generator_for(params)
        self.made = 0  # tokens of the answer so far
        self.matcher = matcher
        self.error: str | None = None
        self.endings = sorted({*end_ids, *params.stop_ids})
        prompt = prompt_ids if params.repetition_penalty != 1 else ()
        self.counted = _Counts(prompt, min(params.max_new_tokens, vocab_size)) if params.penalises else None

    @property
    def finished(self) -> bool:
        """Whether the grammar is fulfilled and lets nothing follow but the end."""
        return self.matcher is not None and self.error is None and self.matcher.finished

    @property
    def too_short(self) -> bool:
        """Whether the answer may not end yet."""
        return self.made < self.params.min_new_tokens

    def accept(self, token: int) -> None:
        """Count `token` as the answer's next, and move on in the grammar."""
        self.made += 1
        if self.counted is not None:
            self.counted.add(token)
        if self.matcher is not None and self.error is None:
            self.error = self.matcher.accept(token)


class _Counts:
    """How often each of the ids that matter is in an answer: ids and counts side by side, in the order first met."""

    def __init__(self, prompt_ids: Sequence[int], room: int):
        """Begins with the ids of the prompt, none of them counted; at most `room` more will come."""
        self._place = {token: place for place, token in enumerate(dict.fromkeys(prompt_ids))}
        size = len(self._place)
        self._ids = np.zeros(size + room, dtype=np.int64)
        self._ids[:size] = list(self._place)
        self._counts = np.zeros(size + room, dtype=np.float32)

    def __len__(self) -> int:
        return len(self._place)

    @property
    def ids(self) -> np.ndarray:
        return self._ids[: len(self)]

    @property
    def counts(self) -> np.ndarray:
        return self._counts[: len(self)]

    def add(self, token: int) -> None:
        place = self._place.setdefault(token, len(self._place))
        self._ids[place] = token
        self._counts[place] += 1


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """The next ids (B,) of B requests with logits (B, V), which are left as they are.

    What a request gets doesn't depend on who shares its batch.
    """
    logits = adjusted(logits, samplers)
    drawing = [row for row, sampler in enumerate(samplers) if not sampler.params.greedy]
    if len(drawing) == len(samplers):
        return _drawn(logits, samplers)
    ids = logits.argmax(-1)
    if drawing:
        ids[drawing] = _drawn(logits[drawing], [samplers[row] for row in drawing])
    return ids


def _drawn(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    probabilities = distributions(logits, [sampler.params for sampler in samplers])
    return draws(probabilities, [sampler.generator for sampler in samplers])


def adjusted(logits: Tensor, samplers: Sequence[Sampler]) -> Tensor:
    """Logits (B, V) with penalties, biases and what may not come; the tensor itself where nobody asks for any."""
    penalised = [row for row, sampler in enumerate(samplers) if sampler.counted]
    biased = [row for row, sampler in enumerate(samplers) if sampler.params.logit_bias]
    held = [row for row, sampler in enumerate(samplers) if sampler.too_short]
    matched = [row for row, sampler in enumerate(samplers) if sampler.matcher is not None]
    if not (penalised or biased or held or matched):
        return logits
    logits = logits.to(torch.float32, copy=True)
    if penalised:
        _penalise(logits, samplers, penalised)
    if biased:
        _bias(logits, samplers, biased)
    if matched:
        _match(logits, samplers, matched)
    if held:
        _hold(logits, samplers, held)
    return logits


def _penalise(logits: Tensor, samplers: Sequence[Sampler], rows: list[int]) -> None:
    params = [samplers[row].params for row in rows]
    counted = [counted for counted in (samplers[row].counted for row in rows) if counted is not None]
    lengths = [len(one) for one in counted]

    def spread(values: list[float]) -> Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=np.float32), lengths)).to(logits.device)

    where = torch.from_numpy(np.repeat(rows, lengths)).to(logits.device)
    ids = torch.from_numpy(np.concatenate([one.ids for one in counted])).to(logits.device)
    counts = torch.from_numpy(np.concatenate([one.counts for one in counted])).to(logits.device)
    repetition = spread([p.repetition_penalty for p in params])
    values = logits[where, ids]
    values = torch.where(values > 0, values / repetition, values * repetition)
    values -= spread([p.presence_penalty for p in params]) * (counts > 0)
    values -= spread([p.frequency_penalty for p in params]) * counts
    logits[where, ids] = values


def _bias(logits: Tensor, samplers: Sequence[Sampler], rows: list[int]) -> None:
    triples = [(row, token, bias) for row in rows for token, bias in samplers[row].params.biases]
    where, ids, biases = (torch.tensor(column, device=logits.device) for column in zip(*triples, strict=True))
    logits[where, ids] += biases


def _match(logits: Tensor, samplers: Sequence[Sampler], rows: list[int]) -> None:
    """Take out what each row's grammar forbids; a matcher that fails takes out nothing and marks its own sampler."""
    words = np.full((len(rows), -(-logits.shape[-1] // 32)), -1, dtype=np.int32)
    for index, row in enumerate(rows):
        sampler = samplers[row]
        assert sampler.matcher is not None
        if sampler.error is None:
            sampler.error = sampler.matcher.mask(words[index])
        if sampler.error is not None:
            words[index] = -1
    allowed = np.unpackbits(words.view(np.uint8), axis=-1, bitorder="little")[:, : logits.shape[-1]]
    forbidden = torch.from_numpy(allowed == 0).to(logits.device)
    logits[rows] = logits[rows].masked_fill(forbidden, -math.inf)


def _hold(logits: Tensor, samplers: Sequence[Sampler], rows: list[int]) -> None:
    """Take out the ends of answers that are too short, but where nothing else is left."""
    for row in rows:
        held = logits[row].index_fill(0, torch.tensor(samplers[row].endings, device=logits.device), -math.inf)
        if not torch.isneginf(held.amax()):
            logits[row] = held


def _column(like: Tensor, values: Sequence[float]) -> Tensor:
    """One number for each row of `like`, shape (B, 1)."""
    return torch.tensor(values, dtype=torch.float32, device=like.device)[:, None]


def _check_int(name: str, value: object, low: int, high: int | None) -> None:
    bounds = f"at least {low}" if high is None else f"from {low} to {high}"
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        raise ValueError(f"{name} must be a whole number {bounds}, got {value!r}")


def _check_float(name: str, value: object, low: float, high: float) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    # NaN fails every comparison, so it is refused here too.
    if not number or not low <= value <= high or math.isinf(value):  # type: ignore[operator, arg-type]
        raise ValueError(f"{name} must be a number from {low} to {high}, got {value!r}")


def _check_ids(name: str, ids: object, most: int) -> None:
    if not isinstance(ids, tuple):
        raise ValueError(f"{name} must be a tuple of ids, got {ids!r}")
    if len(ids) > most:
        raise ValueError(f"{name} takes at most {most} ids, got {len(ids)}")
    for token in ids:
        _check_int(f"{name}: an id", token, 0, None)


def _checked_bias(bias: object) -> tuple[tuple[int, float], ...]:
    """The biases as pairs in order of id; ValueError unless they are from -100 to 100, of ids that come once."""
    pairs = list(bias.items()) if isinstance(bias, Mapping) else bias
    if not isinstance(pairs, list | tuple) or not all(isinstance(pair, tuple) and len(pair) == 2 for pair in pairs):
        raise ValueError(f"logit_bias must map ids to numbers, got {bias!r}")
    _check_ids("logit_bias", tuple(token for token, _ in pairs), MAX_LOGIT_BIASES)
    for token, value in pairs:
        _check_float(f"logit_bias of id {token}", value, -100, 100)
    if len(dict(pairs)) < len(pairs):
        raise ValueError("logit_bias has an id twice")
    return tuple(sorted((token, float(value)) for token, value in pairs))


def _check_stop(stop: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(text, str) for text in stop):
        raise ValueError(f"stop must be a tuple of strings, got {stop!r}")
    if len(stop) > MAX_STOPS:
        raise ValueError(f"stop takes at most {MAX_STOPS} strings, got {len(stop)}")
    if "" in stop:
        raise ValueError("stop must not contain the empty string: it would end every answer at once")
