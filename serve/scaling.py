"""How many replicas a model should have: by the tokens that are to do, and how long first tokens take to come.

Ray Serve carries this module to its controller by its source: it may import nothing else of ours.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

QUEUED_TOKENS = "queued_tokens"
FIRST_TOKEN_S = "first_token_s"
CALM = 0.5  # share of the longest wait that counts as short


def decide(
    replicas: int,
    *,
    queued_tokens: float,
    first_token_s: float,
    waiting_requests: float,
    target_tokens: float,
    target_wait_s: float,
) -> int:
    """The replicas that the load calls for, of which `replicas` run now; the caller knows how few and many may be.

    `queued_tokens`: to read and to write, in all replicas. `first_token_s`: the longest wait for a first token of
    late. `waiting_requests`: those that no replica has taken. `target_tokens`, `target_wait_s`: what is enough for
    one replica, and what is too long.
    """
    if not replicas:
        return 1 if waiting_requests > 0 else 0
    wanted = math.ceil(queued_tokens / target_tokens)
    if first_token_s > target_wait_s:
        return max(wanted, replicas + 1)
    busy = queued_tokens > 0 or waiting_requests > 0
    # Fewer would make waits longer: there must be room for that.
    enough = replicas if busy and first_token_s > CALM * target_wait_s else int(busy)
    return max(wanted, enough)


class Policy:
    """`decide` as Ray Serve's autoscaling asks for it; delays and bounds are Ray Serve's."""

    def __init__(self, target_tokens: float, target_wait_s: float):
        self.target_tokens, self.target_wait_s = target_tokens, target_wait_s

    def __call__(self, context: Any) -> tuple[int, dict[str, Any]]:
        wanted = decide(
            context.current_num_replicas,
            queued_tokens=sum(_newest(context, QUEUED_TOKENS)),
            first_token_s=max(_newest(context, FIRST_TOKEN_S), default=0.0),
            waiting_requests=context.total_queued_requests or 0,
            target_tokens=self.target_tokens,
            target_wait_s=self.target_wait_s,
        )
        return wanted, {}


def _newest(context: Any, name: str) -> list[float]:
    """The newest value of each replica that has reported the figure `name`."""
    series: Mapping[Any, Any] = (context.raw_metrics or {}).get(name, {})
    return [points[-1].value for points in series.values() if points]
