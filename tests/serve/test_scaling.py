from __future__ import annotations

from types import SimpleNamespace

import pytest
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy

from serve.options import Options
from serve.scaling import FIRST_TOKEN_S, QUEUED_TOKENS, Policy, decide

TARGETS = {"target_tokens": 100, "target_wait_s": 2.0}


@pytest.mark.parametrize(
    ("replicas", "tokens", "wait", "waiting", "wanted"),
    [
        (0, 0, 0, 0, 0),  # none, and nobody asks
        (0, 0, 0, 1, 1),  # one is woken
        (1, 0, 0, 0, 0),  # the last one may go
        (1, 0, 0, 3, 1),  # not while requests wait for it
        (1, 1, 0, 0, 1),
        (1, 100, 0, 0, 1),
        (1, 101, 0, 0, 2),
        (1, 950, 0, 0, 10),
        (1, 1, 2.1, 0, 2),  # few tokens, but first ones come late
        (3, 1, 2.1, 0, 4),
        (3, 1, 1.5, 0, 3),  # not so calm that fewer would do
        (3, 1, 0.9, 0, 1),
        (3, 0, 1.5, 0, 0),  # late once, but all is done
        (2, 950, 2.1, 0, 10),
    ],
)
def test_replicas_follow_tokens_and_waits(replicas, tokens, wait, waiting, wanted):
    decided = decide(replicas, queued_tokens=tokens, first_token_s=wait, waiting_requests=waiting, **TARGETS)
    assert decided == wanted


def points(*values: float) -> list[SimpleNamespace]:
    return [SimpleNamespace(timestamp=number, value=value) for number, value in enumerate(values)]


def test_the_policy_takes_the_newest_figures_of_all_replicas():
    raw = {QUEUED_TOKENS: {"a": points(900, 150), "b": points(150)}, FIRST_TOKEN_S: {"a": points(9, 0.1), "b": []}}
    context = SimpleNamespace(current_num_replicas=2, raw_metrics=raw, total_queued_requests=0)
    assert Policy(**TARGETS)(context) == (3, {})
    new = SimpleNamespace(current_num_replicas=1, raw_metrics=None, total_queued_requests=None)
    assert Policy(**TARGETS)(new) == (0, {})


def test_ray_serve_takes_the_policy_with_its_targets():
    policy = AutoscalingPolicy(policy_function=Policy, policy_kwargs=TARGETS)
    config = AutoscalingConfig(min_replicas=0, max_replicas=2, policy=policy)
    carried = config.policy.get_policy()(**config.policy.policy_kwargs)
    assert carried.target_tokens == 100
    assert carried(SimpleNamespace(current_num_replicas=0, raw_metrics={}, total_queued_requests=1))[0] == 1


def test_options_say_how_many_replicas_there_may_be():
    assert (Options().most, Options().scales) == (1, False)
    assert (Options(replicas=0).most, Options(replicas=0).scales) == (1, True)
    assert (Options(replicas=2, max_replicas=2).most, Options(replicas=2, max_replicas=2).scales) == (2, False)
    assert Options(replicas=1, max_replicas=4).scales
    with pytest.raises(ValueError, match=r"max_replicas \(1\) is below replicas \(2\)"):
        Options(replicas=2, max_replicas=1)
