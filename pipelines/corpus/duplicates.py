"""Documents that say the same: which of them go, decided on the cluster, by steps whose tasks are all of bounded size.

1. Every part leaves the keys of its documents, sorted (`write_keys`; `pipelines.corpus.minhash`).
2. `edges`: a task takes a range of keys from all parts; documents that share a key are joined to the first of them.
3. `star-N`: connected components by turns of large-star and small-star (Kiveris et al. 2014, "Connected components in
   MapReduce and beyond") until every document is joined to the least of its component, and to nothing else.
4. `losers`: of each component one document is kept: of the source named first in the recipe, there the longest, among
   equals the one with the least id. All others are dropped.

Which documents go depends on the documents alone: not on the number of workers, nor on how files fall into parts, nor
on the order of files inside a source. A task holds at most about KEYS_PER_TASK keys of 12 bytes, or as many edges of
16, and some copies of them while it sorts.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipelines.corpus.minhash import Keys
from pipelines.partitions import Step, Summary, Work, gather, in_range, ranges, read_columns, write_table

KEYS_PER_TASK = 4 << 20
# Nodes of the graph are addresses times an odd number: spread over all uint64, and back again by its inverse.
SPREAD = 0x9E3779B97F4A7C15
BACK = pow(SPREAD, -1, 1 << 64)
MOST_ROUNDS = 64  # far more than the logarithm of any number of documents


def write_keys(
    step: Step, number: int, keys: Keys, ids: list[str], lengths: list[int], priority: int, exact: bool = True
) -> int:
    """What a part of documents leaves for this: NNNNN.keys.arrow, sorted by key, and NNNNN.facts.arrow, a row each.

    `priority`: place of the part's source in the recipe. `exact`: whether documents of the same words meet by those.
    Returns the number of keys.
    """
    every = np.concatenate([keys.exact[:, None], keys.bands], axis=1) if exact else keys.bands
    key, row = every.ravel(), np.repeat(np.arange(len(every), dtype=np.uint32), every.shape[1])
    order = np.argsort(key, kind="stable")
    order = order[np.searchsorted(key[order], np.uint64(1)) :]  # 0 stands for a text without words
    write_table(step.file(number, "keys.arrow"), key=key[order], row=row[order])
    write_table(
        step.file(number, "facts.arrow"),
        id=np.array([int(one, 16) for one in ids], dtype=np.uint64),
        length=np.array(lengths, dtype=np.uint32),
        priority=np.full(len(ids), priority, dtype=np.uint16),
        exact=keys.exact,
    )
    return len(order)


def find(work: Work, read: Step, parts: int, keys: int) -> Step | None:
    """Find the documents to drop among `parts` parts with `keys` keys in all, left in the step `read`.

    None if there are none; else the step whose files `losers_of` reads.
    """
    found = work.each("edges", ranges(1 + keys // KEYS_PER_TASK), partial(_edges, read=read, parts=parts))
    number = sum(summary["edges"] for summary in found)
    if not number:
        return None
    tasks = ranges(1 + 2 * number // KEYS_PER_TASK)
    stars = _components(work, len(found), tasks)
    work.each("losers", tasks, partial(_losers, stars=stars, count=len(tasks), read=read))
    return work.step("losers")


def losers_of(part: int, losers: Step) -> dict[str, np.ndarray]:
    """The documents of `part` to drop: `row`, `kept` (id of the one that stays), `size` of the component, `exact`."""
    paths = losers.files()
    found = gather(paths, "address", part << 32, (part + 1) << 32)
    order = np.argsort(found["address"], kind="stable")
    columns = {name: values[order] for name, values in found.items()}
    return {"row": (columns["address"] & np.uint64(0xFFFFFFFF)).astype(np.int64), **columns}


# Edges


def _edges(number: int, item: dict[str, Any], step: Step, read: Step, parts: int) -> Summary:
    """Join the documents that share a key in this range: each to the first of them."""
    low, high = int(item["low"]), int(item["high"])
    found = [in_range(read.file(part, "keys.arrow"), "key", low, high) for part in range(parts)]
    key = np.concatenate([one["key"] for one in found])
    address = np.concatenate([one["row"] + (np.uint64(part) << np.uint64(32)) for part, one in enumerate(found)])
    order = np.argsort(key, kind="stable")
    key, node = key[order], (address * np.uint64(SPREAD))[order]
    starts = np.flatnonzero(np.diff(key, prepend=~key[:1]) != 0)
    first = np.repeat(node[starts], np.diff(starts, append=len(key)))
    return {"edges": _write_edges(step, number, node, first)}


def _write_edges(step: Step, number: int, one: np.ndarray, other: np.ndarray) -> int:
    """Write the edges both ways round, each once, sorted; returns how many there are, both ways counted."""
    apart = one != other
    pairs = [np.concatenate([one[apart], other[apart]]), np.concatenate([other[apart], one[apart]])]
    order = np.lexsort(pairs[::-1])
    pairs = [values[order] for values in pairs]
    new = np.ones(len(order), dtype=bool)
    new[1:] = (np.diff(pairs[0]) != 0) | (np.diff(pairs[1]) != 0)
    write_table(step.file(number, "arrow"), node=pairs[0][new], neighbour=pairs[1][new])
    return int(new.sum())


# Components


def _components(work: Work, files: int, tasks: list[dict[str, Any]]) -> Step:
    """Turn the graph of the step `edges` into stars: every node joined to the least of its component alone."""
    before, quiet = work.step("edges"), 0
    for turn in range(MOST_ROUNDS):
        star = _small_star if turn % 2 else _large_star
        name = f"star-{turn:02d}"
        changed = work.each(name, tasks, partial(_star, star=star, before=before, files=files))
        before, files = work.step(name), len(tasks)
        quiet = 0 if any(summary["changed"] for summary in changed) else quiet + 1
        if quiet == 2:
            return before
    raise RuntimeError(f"components were not found in {MOST_ROUNDS} rounds")


def _star(number: int, item: dict[str, Any], step: Step, star: Any, before: Step, files: int) -> Summary:
    """One turn for the nodes of a range."""
    paths = [before.file(file, "arrow") for file in range(files)]
    found = gather(paths, "node", int(item["low"]), int(item["high"]))
    order = np.argsort(found["node"], kind="stable")
    one, other, changed = star(found["node"][order], found["neighbour"][order])
    return {"changed": int(changed), "edges": _write_edges(step, number, one, other)}


def _large_star(node: np.ndarray, neighbour: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Join every greater neighbour of a node to the least of the node and its neighbours."""
    least = _least(node, neighbour)
    greater = neighbour > node
    return neighbour[greater], least[greater], int((least[greater] != node[greater]).sum())


def _small_star(node: np.ndarray, neighbour: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """Join a node and its smaller neighbours to the least of them."""
    smaller = neighbour < node
    node, neighbour = node[smaller], neighbour[smaller]
    least = _least(node, neighbour)
    moved = int((least != neighbour).sum())
    return np.concatenate([neighbour, node]), np.concatenate([least, least]), moved


def _least(node: np.ndarray, neighbour: np.ndarray) -> np.ndarray:
    """For each edge the least of its node and all that node's neighbours. `node` is sorted."""
    if not len(node):
        return node
    starts = np.flatnonzero(np.diff(node, prepend=~node[:1]) != 0)
    least = np.minimum(np.minimum.reduceat(neighbour, starts), node[starts])
    return np.repeat(least, np.diff(starts, append=len(node)))


# Who stays


def _losers(number: int, item: dict[str, Any], step: Step, stars: Step, count: int, read: Step) -> Summary:
    """Of each component whose least node is in this range, all but the one that is kept."""
    paths = [stars.file(file, "arrow") for file in range(count)]
    edges = gather(paths, "node", int(item["low"]), int(item["high"]))
    below = edges["neighbour"] > edges["node"]
    root, leaf = _each_once(edges["node"][below], edges["neighbour"][below])
    roots = np.unique(root)
    component = np.concatenate([roots, root])
    address = np.concatenate([roots, leaf]) * np.uint64(BACK)
    facts = _facts(address, read)
    order = np.lexsort([address, facts["id"], ~facts["length"], facts["priority"], component])
    starts = np.flatnonzero(np.diff(component[order], prepend=~component[order][:1]) != 0)
    sizes = np.diff(starts, append=len(order))
    kept = np.repeat(order[starts], sizes)
    lost = np.ones(len(order), dtype=bool)
    lost[starts] = False
    gone, stays = order[lost], kept[lost]
    by_address = np.argsort(address[gone], kind="stable")
    gone, stays = gone[by_address], stays[by_address]
    write_table(
        step.file(number, "arrow"),
        address=address[gone],
        kept=facts["id"][stays],
        size=np.repeat(sizes, sizes)[lost][by_address].astype(np.uint32),
        exact=(facts["exact"][gone] == facts["exact"][stays]).astype(np.uint8),
    )
    return {"lost": len(gone), "components": len(roots)}


def _each_once(node: np.ndarray, neighbour: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.lexsort([neighbour, node])
    node, neighbour = node[order], neighbour[order]
    new = np.ones(len(node), dtype=bool)
    new[1:] = (np.diff(node) != 0) | (np.diff(neighbour) != 0)
    return node[new], neighbour[new]


def _facts(address: np.ndarray, read: Step) -> dict[str, np.ndarray]:
    """What the parts say of the documents at those addresses."""
    part = (address >> np.uint64(32)).astype(np.int64)
    order = np.argsort(part, kind="stable")
    found: dict[str, np.ndarray] = {}
    for group in np.split(order, np.flatnonzero(np.diff(part[order])) + 1) if len(order) else []:
        own = read_columns(Path(read.file(int(part[group[0]]), "facts.arrow")))
        rows = (address[group] & np.uint64(0xFFFFFFFF)).astype(np.int64)
        for name, values in own.items():
            found.setdefault(name, np.empty(len(address), values.dtype))[group] = values[rows]
    return found or {name: np.empty(0, np.uint64) for name in ("id", "length", "priority", "exact")}
