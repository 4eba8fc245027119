"""To which replica a request goes: one that has read the beginning of its prompt before, unless that one is too busy.

Ray Serve carries this module to wherever requests are routed, by its source: it may import nothing else of ours.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter

BLOCK = 32  # tokens that are compared at once
LONGEST = 64  # blocks of a prompt that are looked at
REMEMBERED = 65536  # beginnings, each a block longer than another


class Prefixes:
    """Which replicas have read which beginnings of prompts, as far as requests were sent there from here."""

    def __init__(self, remembered: int = REMEMBERED):
        self._remembered = remembered
        self._holders: OrderedDict[int, set[Hashable]] = OrderedDict()  # by a beginning's hash; the oldest first

    def record(self, prompt: Sequence[int], replica: Hashable) -> None:
        """`replica` reads `prompt` now."""
        for key in _beginnings(prompt):
            self._holders.setdefault(key, set()).add(replica)
            self._holders.move_to_end(key)
        while len(self._holders) > self._remembered:
            self._holders.popitem(last=False)

    def holders(self, prompt: Sequence[int], among: Mapping[Any, int]) -> set[Any]:
        """Those of `among` that have read the most of the beginning of `prompt`; none if none has read a block."""
        found: set[Any] = set()
        for key in _beginnings(prompt):
            longer = self._holders.get(key, set()) & among.keys()
            if not longer:
                break
            found = longer
        return found


def choose(prompt: Sequence[int], loads: Mapping[Any, int], prefixes: Prefixes, slack: int) -> Any:
    """The replica for `prompt`: the least busy that knows most of it, or of all, if that has `slack` requests more.

    `loads`: requests that each replica has, at least one.
    """
    idlest = min(loads, key=loads.__getitem__)
    holders = prefixes.holders(prompt, loads)
    if not holders:
        return idlest
    best = min(holders, key=loads.__getitem__)
    return best if loads[best] <= loads[idlest] + slack else idlest


def _beginnings(prompt: Sequence[int]) -> list[int]:
    """A hash for each beginning of `prompt` of whole blocks, the shortest first."""
    hashes, last = [], 0
    for start in range(0, min(len(prompt) // BLOCK, LONGEST) * BLOCK, BLOCK):
        last = hash((last, *prompt[start : start + BLOCK]))
        hashes.append(last)
    return hashes


class PrefixRouter(RequestRouter):
    """Routes the calls of a method `generate`, whose first argument is a list of (prompt, settings), by the first
    prompt; others to the least busy replica. `slack`: how many requests more the better one may have."""

    def initialize_state(self, slack: int) -> None:
        self._slack = slack
        self._prefixes = Prefixes()

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        """The best of the candidates, then all of them: Ray Serve takes the next if the first has no room."""
        if pending_request is None or not candidate_replicas:
            return [candidate_replicas]
        # Else Ray Serve asks again at once for as long as nobody has room, and its loop gets to do nothing else.
        pending_request.routing_context.should_backoff = True
        cache = self.replica_queue_len_cache
        loads = {replica.replica_id: cache.get(replica.replica_id) or 0 for replica in candidate_replicas}
        chosen = choose(_prompt(pending_request), loads, self._prefixes, self._slack)
        return [[each for each in candidate_replicas if each.replica_id == chosen], candidate_replicas]

    def on_request_routed(self, pending_request: PendingRequest, replica_id: Any, result: Any) -> None:
        """Remember what the replica has read."""
        self._prefixes.record(_prompt(pending_request), replica_id)


def _prompt(request: PendingRequest) -> Sequence[int]:
    return request.args[0][0][0] if request.metadata.call_method == "generate" else ()
