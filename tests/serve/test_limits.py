"""Budgets on clocks of the test's own, and against the rule itself under random requests."""

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serve.keys import Key
from serve.limits import DAY_S, Account, Accounts, Bucket, DayBudget
from serve.refusals import OverBudget, RequestError


class Clock:
    def __init__(self, now: float = 0.0):
        self.now = now

    def __call__(self) -> float:
        return self.now


def key(**limits) -> Key:
    return Key(name="a", sha256="0" * 64, created=datetime.now(UTC), **limits)


@pytest.fixture
def clock():
    return Clock(1000.0)


@pytest.fixture
def accounts(clock):
    return Accounts(clock, clock)


def retry_after(refusal: OverBudget) -> int:
    assert (refusal.status, refusal.code) == (429, "rate_limit_exceeded")
    return int(refusal.headers["Retry-After"])


def test_requests_a_minute_come_evenly_after_the_first_burst(accounts, clock):
    limited = key(requests_per_minute=6)
    for _ in range(6):
        accounts.open(limited).close()
    with pytest.raises(OverBudget) as refused:
        accounts.open(limited)
    assert retry_after(refused.value) == 10
    clock.now += 9.5
    with pytest.raises(OverBudget):
        accounts.open(limited)
    clock.now += 0.5  # what was refused took nothing
    accounts.open(limited)
    with pytest.raises(OverBudget):
        accounts.open(limited)


@given(st.lists(st.floats(0, 30), max_size=60), st.integers(1, 20))
def test_no_minute_admits_more_than_twice_the_rate(gaps, rate):
    """A full bucket and what flows in meanwhile; waiting as long as it says always helps."""
    clock = Clock()
    accounts, admitted = Accounts(clock, clock), []
    limited = key(requests_per_minute=rate)
    for gap in gaps:
        clock.now += gap
        try:
            accounts.open(limited).close()
        except OverBudget as refusal:
            clock.now += retry_after(refusal)
            accounts.open(limited).close()
        admitted.append(clock.now)
    for start in admitted:
        assert sum(start <= time < start + 60 for time in admitted) <= 2 * rate


def test_requests_at_once(accounts):
    limited = key(concurrent=2)
    first, _ = accounts.open(limited), accounts.open(limited)
    with pytest.raises(OverBudget) as refused:
        accounts.open(limited)
    assert retry_after(refused.value) == 1
    first.close()
    first.close()  # once is enough
    accounts.open(limited)
    with pytest.raises(OverBudget):
        accounts.open(limited)


def test_tokens_are_reserved_and_settled(accounts, clock):
    limited = key(tokens_per_minute=600)
    account = accounts.open(limited)
    account.reserve(100, 400)
    other = accounts.open(limited)
    with pytest.raises(OverBudget) as refused:
        other.reserve(50, 100)
    assert retry_after(refused.value) == 5  # 100 are left, ten come each second
    account.charge(100, 0)
    account.charge(0, 30)  # broke off
    account.close()
    other.reserve(50, 400)  # 470 are left
    with pytest.raises(OverBudget):
        accounts.open(limited).reserve(0, 21)
    other.close()  # refused or broken off before it began: nothing was charged
    accounts.open(limited).reserve(0, 470)


def test_what_can_never_be_admitted_is_no_429(accounts):
    with pytest.raises(RequestError, match="601 tokens, this key may use 600 a minute") as refused:
        accounts.open(key(tokens_per_minute=600)).reserve(1, 600)
    assert (refused.value.status, refused.value.param) == (400, "max_tokens")


def test_more_charged_than_reserved_is_a_debt(accounts, clock):
    limited = key(tokens_per_minute=60)
    account = accounts.open(limited)
    account.charge(60, 60)
    account.close()
    with pytest.raises(OverBudget) as refused:
        accounts.open(limited)
    assert retry_after(refused.value) == 61
    clock.now += 61
    accounts.open(limited)


def test_a_day_ends_at_midnight(accounts, clock):
    clock.now = 20 * DAY_S - 90.5
    limited = key(tokens_per_day=100)
    account = accounts.open(limited)
    account.reserve(50, 50)
    account.charge(50, 50)
    account.close()
    with pytest.raises(OverBudget) as refused:
        accounts.open(limited)
    assert retry_after(refused.value) == 91
    clock.now += 91
    accounts.open(limited).reserve(50, 50)


def test_both_budgets_of_tokens_count(accounts, clock):
    limited = key(tokens_per_minute=100, tokens_per_day=150)
    accounts.open(limited).reserve(0, 100)
    clock.now += 60
    with pytest.raises(OverBudget, match="150 a day"):
        accounts.open(limited).reserve(0, 51)
    accounts.open(limited).reserve(0, 50)


def test_keys_share_nothing(accounts):
    accounts.open(key(requests_per_minute=1))
    other = Key(name="b", sha256="1" * 64, created=datetime.now(UTC), requests_per_minute=1)
    accounts.open(other)


def test_an_account_without_a_key_only_counts():
    account = Account()
    account.reserve(10**9, 10**9)
    account.charge(3, 4)
    account.close()
    assert (account.prompt_tokens, account.completion_tokens, account.key) == (3, 4, None)
    assert account.allows("any")


def test_models():
    accounts = Accounts()
    assert accounts.open(key(models=("a", "b"))).allows("b")
    assert not accounts.open(key(models=("a", "b"))).allows("c")
    assert accounts.open(key()).allows("c")


@settings(max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 100), st.integers(-50, 120)), max_size=40))
def test_a_bucket_is_the_sum_of_its_inflow_and_takings(steps):
    clock = Clock()
    bucket, left = Bucket(100, 50, clock), 100.0
    for gap, amount in steps:
        clock.now += gap
        left = min(100.0, left + 2 * gap)
        assert bucket.left == pytest.approx(left, abs=1e-9)
        if amount > 100:
            assert bucket.wait_s(amount) == math.inf
        else:
            assert bucket.wait_s(amount) == pytest.approx(max(0.0, (amount - left) / 2), abs=1e-5)
        bucket.take(amount)
        left = min(100.0, left - amount)


def test_a_day_gives_back_what_it_has_taken_at_most():
    clock = Clock(DAY_S - 1.0)
    day = DayBudget(10, clock)
    day.take(10)
    clock.now += 2
    day.take(-10)  # settled on the next day
    assert day.wait_s(10) == 0
    day.take(10)
    assert day.wait_s(1) == DAY_S - 1
