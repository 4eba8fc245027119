"""What a table of counts predicts: the unigram and bigram losses that a trained model has to beat."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm.packing import IGNORED


@dataclass(frozen=True)
class Counts:
    """Token and pair counts of training text. Pairs are stored as code = first * vocab_size + second, sorted."""

    unigrams: np.ndarray  # (vocab_size,)
    pair_codes: np.ndarray  # (distinct pairs,), sorted
    pair_counts: np.ndarray  # (distinct pairs,)

    @property
    def vocab_size(self) -> int:
        return len(self.unigrams)


def count(tokens: np.ndarray, vocab_size: int) -> Counts:
    """Counts over a flat sequence of ids."""
    codes, counts = np.unique(tokens[:-1].astype(np.int64) * vocab_size + tokens[1:], return_counts=True)
    return Counts(np.bincount(tokens, minlength=vocab_size), codes, counts)


def unigram_nats(counts: Counts, targets: np.ndarray) -> np.ndarray:
    """-log p(target) with add-one smoothing (Laplace). Same shape as `targets`."""
    return -np.log((counts.unigrams[targets] + 1) / (counts.unigrams.sum() + counts.vocab_size))


def bigram_nats(counts: Counts, before: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """-log p(target | token before), smoothed by Witten and Bell (1991).

    p(b | a) = (c(a, b) + N(a) p(b)) / (c(a) + N(a)), where N(a) is how many different tokens followed a.
    """
    followers = np.bincount(counts.pair_codes // counts.vocab_size, minlength=counts.vocab_size)
    seen = np.bincount(counts.pair_codes // counts.vocab_size, counts.pair_counts, minlength=counts.vocab_size)
    codes = before.astype(np.int64) * counts.vocab_size + targets
    found = np.minimum(np.searchsorted(counts.pair_codes, codes), len(counts.pair_codes) - 1)
    pairs = np.where(counts.pair_codes[found] == codes, counts.pair_counts[found], 0)
    fallback = np.exp(-unigram_nats(counts, targets))
    # A token never seen to be followed has c(a) = N(a) = 0: one imagined follower hands all to the unigram.
    weight = np.maximum(followers[before], 1)
    return -np.log((pairs + weight * fallback) / (seen[before] + weight))


def mean_nats(counts: Counts, input_ids: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Mean nats a target of both tables over rows (B, T), on the same targets that the model is scored on."""
    scored = labels[:, 1:] != IGNORED
    before, targets = input_ids[:, :-1][scored], labels[:, 1:][scored]
    return {
        "unigram": float(unigram_nats(counts, targets).mean()),
        "bigram": float(bigram_nats(counts, before, targets).mean()),
    }
