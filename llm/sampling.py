"""How the next token is chosen: a request's settings, the distribution that they make of the logits, and the draw."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 100
GREEDY_BELOW = 1e-5  # a temperature under which fp32 tells no second token from the likeliest


@dataclass(frozen=True)
class SamplingParams:
    """One request's settings. ValueError names the setting, its bounds and the value that was given.

    The logits are divided by `temperature`, then cut by top-k, top-p and min-p in that order, each over what the one
    before it left.
    """

    max_new_tokens: int = 256
    temperature: float = 1.0  # 0 (below 1e-5) takes the likeliest token every time
    top_k: int = 0  # keep the k likeliest tokens; 0 keeps all
    top_p: float = 1.0  # keep the likeliest tokens up to this mass (arXiv 1904.09751); 1 keeps all
    min_p: float = 0.0  # keep tokens with at least this share of the likeliest one's mass (arXiv 2407.01082); 0: all
    seed: int | None = None  # the same seed and prompt give the same tokens; None draws a fresh seed
    stop: tuple[str, ...] = ()  # generation ends before the first of these strings; none is ever part of the text
    top_logprobs: int = 0  # how many of the likeliest tokens are reported with each token

    def __post_init__(self) -> None:
        _check_int("max_new_tokens", self.max_new_tokens, 1, None)
        _check_float("temperature", self.temperature, 0, 100)
        _check_int("top_k", self.top_k, 0, None)
        _check_float("top_p", self.top_p, 0, 1)
        if self.top_p == 0:
            raise ValueError("top_p must be above 0 (1 keeps every token), got 0")
        _check_float("min_p", self.min_p, 0, 1)
        if self.seed is not None:
            _check_int("seed", self.seed, -(2**63), 2**63 - 1)
        _check_stop(self.stop)
        _check_int("top_logprobs", self.top_logprobs, 0, MAX_TOP_LOGPROBS)

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW

    @property
    def truncates(self) -> bool:
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0


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
        probabilities[greedy] = torch.nn.functional.one_hot(likeliest, logits.shape[-1]).to(probabilities)
    cut = [row for row, p in enumerate(params) if p.truncates and not p.greedy]
    if cut:
        probabilities[cut] = _truncate(probabilities[cut], [params[row] for row in cut])
    return probabilities


def _truncate(probabilities: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Probabilities (B, V) with what top-k, top-p and min-p leave out set to 0, summing to 1 again.

    Equal probabilities rank by id, so top-k keeps exactly k. The likeliest token is always kept.
    """
    ranked, ids = probabilities.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    ranked = ranked * (rank < _column(ranked, [p.top_k or ranked.shape[-1] for p in params]))
    ranked = ranked / ranked.sum(-1, keepdim=True)
    mass_before = ranked.cumsum(-1) - ranked
    top_p = _column(ranked, [p.top_p for p in params])
    # A sum in fp32 can reach 1 early: top_p = 1 must not cut the tail for that.
    kept = (mass_before < top_p) | (top_p == 1)
    kept &= ranked >= _column(ranked, [p.min_p for p in params]) * ranked[:, :1]
    kept[:, 0] = True
    ranked = ranked * kept
    return torch.zeros_like(ranked).scatter_(-1, ids, ranked / ranked.sum(-1, keepdim=True))


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


def choose(logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator]) -> Tensor:
    """The next ids (B,) of B requests with logits (B, V)."""
    if all(p.greedy for p in params):
        return logits.argmax(-1)
    return draws(distributions(logits, params), generators)


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


def _check_stop(stop: object) -> None:
    if not isinstance(stop, tuple) or not all(isinstance(text, str) for text in stop):
        raise ValueError(f"stop must be a tuple of strings, got {stop!r}")
    if len(stop) > MAX_STOPS:
        raise ValueError(f"stop takes at most {MAX_STOPS} strings, got {len(stop)}")
    if "" in stop:
        raise ValueError("stop must not contain the empty string: it would end every answer at once")
