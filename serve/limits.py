"""What a key has left: requests and tokens a minute, tokens a day, requests at once.

Kept in memory by each process that answers requests: it starts full, and two processes give a key twice its budgets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from serve.keys import Key
from serve.refusals import OverBudget, RequestError

DAY_S = 86_400
ROUNDING_S = 1e-6  # who waited as long as it was told is not refused for the last bit of a float
Clock = Callable[[], float]


class Bucket:
    """A budget of `size` in every `period_s`, that fills up evenly and is full at the start."""

    def __init__(self, size: int, period_s: float, clock: Clock):
        self.size, self._rate, self._clock = size, size / period_s, clock
        self._left, self._at = float(size), clock()

    @property
    def left(self) -> float:
        """What can be taken now; below zero if more was taken than there was."""
        now = self._clock()
        self._left, self._at = min(self.size, self._left + (now - self._at) * self._rate), now
        return self._left

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken; infinite if it never can."""
        if amount > self.size:
            return math.inf
        wait = (amount - self.left) / self._rate
        return wait if wait > ROUNDING_S else 0.0

    def take(self, amount: float) -> None:
        """Take `amount`, or give it back if negative."""
        self._left = min(self.size, self.left - amount)


class DayBudget:
    """A budget of `size` for each day of UTC. `clock` gives seconds since 1970."""

    def __init__(self, size: int, clock: Clock):
        self.size, self._clock = size, clock
        self._used, self._day = 0.0, int(clock() // DAY_S)

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` can be taken, midnight if not today; infinite if it never can."""
        self._turn()
        if amount > self.size:
            return math.inf
        return 0.0 if self._used + amount <= self.size else DAY_S - self._clock() % DAY_S

    def take(self, amount: float) -> None:
        """Take `amount`, or give it back if negative."""
        self._turn()
        self._used = max(0.0, self._used + amount)

    def _turn(self) -> None:
        if (day := int(self._clock() // DAY_S)) != self._day:
            self._used, self._day = 0.0, day


@dataclass
class Spending:
    """What the requests of one key share."""

    key: Key
    requests: Bucket | None
    tokens: dict[str, Bucket | DayBudget]  # by the period, as a sentence names it
    running: int = 0

    @classmethod
    def of(cls, key: Key, clock: Clock, wall_clock: Clock) -> Spending:
        tokens: dict[str, Bucket | DayBudget] = {}
        if key.tokens_per_minute:
            tokens["a minute"] = Bucket(key.tokens_per_minute, 60, clock)
        if key.tokens_per_day:
            tokens["a day"] = DayBudget(key.tokens_per_day, wall_clock)
        requests = Bucket(key.requests_per_minute, 60, clock) if key.requests_per_minute else None
        return cls(key, requests, tokens)

    def check(self) -> None:
        """OverBudget if the key can't have one more request now."""
        if self.key.concurrent and self.running >= self.key.concurrent:
            raise OverBudget(f"{self.running} requests of this key are running, the most is {self.key.concurrent}", 1)
        if self.requests and (wait := self.requests.wait_s(1)):
            raise OverBudget(f"this key may send {self.requests.size} requests a minute", wait)
        for period, budget in self.tokens.items():
            if wait := budget.wait_s(1):
                raise OverBudget(f"this key may use {budget.size} tokens {period}", wait)

    def check_tokens(self, tokens: int) -> None:
        """OverBudget if the key can't have that many tokens now; RequestError if it never can."""
        for period, budget in self.tokens.items():
            wait = budget.wait_s(tokens)
            said = f"the prompt and the longest answer have {tokens} tokens, this key may use {budget.size} {period}"
            if math.isinf(wait):
                raise RequestError(said, param="max_tokens", code="tokens_exceed_budget")
            if wait:
                raise OverBudget(said, wait)

    def take_tokens(self, tokens: int) -> None:
        for budget in self.tokens.values():
            budget.take(tokens)


class Account:
    """One request's share in what its key may use. Of a request without a key: no bounds, but it counts all the same.

    Tokens are reserved before any are made, so that the budget bounds what runs at once; `close` gives back what was
    reserved and not charged.
    """

    def __init__(self, spending: Spending | None = None):
        self._spending = spending
        self._reserved = 0
        self.key = spending.key if spending else None
        self.prompt_tokens = self.completion_tokens = 0

    def allows(self, model: str) -> bool:
        """Whether the key is for that model."""
        return self.key is None or self.key.models is None or model in self.key.models

    def reserve(self, prompt_tokens: int, max_new_tokens: int) -> None:
        """Claim the most tokens that the request can use. RequestError: 429 until there are so many, 400 if never."""
        tokens = prompt_tokens + max_new_tokens
        if self._spending:
            self._spending.check_tokens(tokens)
            self._spending.take_tokens(tokens)
        self._reserved += tokens

    def charge(self, prompt_tokens: int, completion_tokens: int) -> None:
        """Count tokens that were read and made; may be called again and again, for what came since."""
        self.prompt_tokens += prompt_tokens
        self.completion_tokens += completion_tokens

    def close(self) -> None:
        """The request has ended: settle what was reserved against what was charged."""
        if self._spending:
            self._spending.take_tokens(self.prompt_tokens + self.completion_tokens - self._reserved)
            self._spending.running -= 1
            self._spending = None


class Accounts:
    """Opens an account for each request. The clocks give seconds: one to measure with, one since 1970."""

    def __init__(self, clock: Clock = time.monotonic, wall_clock: Clock = time.time):
        self._clock, self._wall_clock = clock, wall_clock
        self._spendings: dict[str, Spending] = {}

    def open(self, key: Key) -> Account:
        """The account of a request with `key`, to be closed. OverBudget: none now, and nothing is taken."""
        spending = self._spending(key)
        spending.check()
        if spending.requests:
            spending.requests.take(1)
        spending.running += 1
        return Account(spending)

    def _spending(self, key: Key) -> Spending:
        known = self._spendings.get(key.sha256)
        if known is None or known.key != key:
            known = self._spendings[key.sha256] = Spending.of(key, self._clock, self._wall_clock)
        return known
