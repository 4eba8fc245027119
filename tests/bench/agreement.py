"""Whether both sides of a benchmark did the same work."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from typing import Any

import numpy as np

from tests.bench.measure import Invalid

HIGH, LOW = 0.8, 0.5  # Jaccard similarities: what has to be found, and what nobody may take for a duplicate
WRONG_AT_MOST = 0.01  # of the documents without a near-duplicate, dropped all the same
SAME_DECISIONS = 0.8  # of the pages, for the two sides to be about the same work
COMPARED = 6  # losses, of the first steps: later ones drift apart by rounding
LOSSES_WITHIN = {"fp32": 1e-5, "bf16": 2e-2}  # nats; bf16 rounds elsewhere in autocast than in weights of bf16


def digest(documents_of_ids: Iterable[np.ndarray]) -> dict[str, Any]:
    """What documents hold, whatever their order: their number, their tokens, and the sum of their hashes."""
    lengths, total = [], 0
    for ids in documents_of_ids:
        lengths.append(len(ids))
        total += int.from_bytes(hashlib.sha256(ids.astype("<u4").tobytes()).digest()[:16], "little")
    return {"documents": len(lengths), "tokens": sum(lengths), "digest": f"{total % 2**128:032x}"}


def text_digest(text: str) -> str:
    return hashlib.sha256(text.strip().encode()).hexdigest()[:32]


def same_tokens(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """The ids of every document are equal, or Invalid."""
    if mine != other:
        raise Invalid(f"other ids: ours {mine}, theirs {other}")
    return mine


def same_doubles(
    mine: dict[str, Any], other: dict[str, Any], known: dict[str, str], pairs: list[tuple[str, str, float]]
) -> dict[str, Any]:
    """Recall of either side; Invalid if one keeps texts that nobody gave it, or drops many that are no duplicates.

    known: from the digest of each text to its id. pairs: ids of an original and its copy, and their similarity.
    """
    kept = {"our": {known.get(text, "") for text in mine["texts"]}, "their": set(other["kept"])}
    paired = {name for one, two, _ in pairs for name in (one, two)}
    high = [(one, two) for one, two, similarity in pairs if similarity >= HIGH]
    facts: dict[str, Any] = {"pairs": len(high), "given": len(known)}
    for side, names in kept.items():
        if not names <= set(known.values()):
            raise Invalid(f"{side} side changed the texts")
        wrong = len(set(known.values()) - paired - names) / max(1, len(known) - len(paired))
        if wrong > WRONG_AT_MOST:
            raise Invalid(f"{side} side drops {wrong:.1%} of the documents that have no near-duplicate")
        found = sum(not {one, two} <= names for one, two in high)
        facts |= {f"{side}_kept": len(names), f"{side}_recall": found / max(1, len(high)), f"{side}_wrong": wrong}
    return facts


def same_pages(mine: dict[str, Any], other: dict[str, Any], urls: set[str]) -> dict[str, Any]:
    """Share of the pages that both keep or both drop, Invalid if it is low or nothing is kept."""
    ours_kept, theirs_kept = set(mine["urls"]), set(other["kept"])
    same = 1 - len(ours_kept ^ theirs_kept) / max(1, len(urls))
    if same < SAME_DECISIONS or not ours_kept or not theirs_kept:
        raise Invalid(f"ours keeps {len(ours_kept)}, theirs {len(theirs_kept)} of {len(urls)} pages, {same:.0%} alike")
    return {"pages": len(urls), "our_pages": len(ours_kept), "their_pages": len(theirs_kept), "same_decisions": same}


def same_losses(mine: dict[str, Any], other: dict[str, Any], dtype: str) -> dict[str, Any]:
    """The largest difference of the first steps' losses, or Invalid if rounding in `dtype` doesn't explain it."""
    pairs = list(zip(mine["losses"], other["losses"], strict=False))[:COMPARED]
    apart = [abs(one - two) for one, two in pairs]
    if not apart or not all(one <= LOSSES_WITHIN[dtype] for one in apart):  # of NaN neither is true
        raise Invalid(f"losses of the first steps in {dtype} are not the same: {pairs}")
    return {"largest_loss_difference": max(apart)}


def same_answers(mine: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """How many answers and tokens there are, or Invalid, naming the first difference, if an answer isn't the same.

    Of either side `answers`: a list of ids, or a text, for each request.
    """
    if len(mine["answers"]) != len(other["answers"]):
        raise Invalid(f"ours has {len(mine['answers'])} answers, theirs {len(other['answers'])}")
    for number, (one, two) in enumerate(zip(mine["answers"], other["answers"], strict=True)):
        if one != two:
            at = next(
                (at for at, pair in enumerate(zip(one, two, strict=False)) if pair[0] != pair[1]),
                min(len(one), len(two)),
            )
            raise Invalid(
                f"answer {number} differs from place {at} on: ours {one[at:][:8]!r}, theirs {two[at:][:8]!r}"
            )
    return {"answers": len(mine["answers"]), "length": sum(map(len, mine["answers"]))}
