"""Scripted judges: stated rules that score an answer, where no person is there to rank."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

WORD = re.compile(r"\w+(?:'\w+)*")
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")

FEWEST_WORDS = 3  # of a question: "?" alone must not win
MOST_WORDS = 12


@dataclass(frozen=True)
class Judge:
    """A rule in words, as reports print it, and as a function of an answer's text and its finish reason."""

    rule: str
    score: Callable[[str, str], float]


def asks_back(text: str, finish_reason: str) -> float:
    """What a good host would say: from 1 downwards, -1 for nothing."""
    words = WORD.findall(text.lower())
    if not words or finish_reason == "length":
        return -1.0
    asks = len(words) >= FEWEST_WORDS and text.rstrip().endswith("?")
    beyond = max(0, len(words) - MOST_WORDS)
    repeated = 1 - len(set(words)) / len(words)
    return asks - 0.05 * beyond - 0.5 * repeated


JUDGES = {
    "asks-back": Judge(
        "A good host asks back, briefly: 1 point if the answer has at least three words and ends in a question mark, "
        "less 0.05 for each word beyond twelve and half the share of its words that were said before. "
        "An answer that says nothing or is cut off gets -1.",
        asks_back,
    ),
}


def rank(scores: Sequence[float]) -> list[int]:
    """The rank of each score: 1 plus how many are better, so the best have 1 and ties share a rank."""
    return [1 + sum(other > score for other in scores) for score in scores]


def score_task(text: str, task: dict[str, Any]) -> bool:
    """Whether the number after the last '=' in `text`, or its last number if there is none, is the task's answer."""
    _, equals, result = text.rpartition("=")
    numbers = NUMBER.findall(result)
    if not numbers:
        return False
    return float(numbers[0 if equals else -1]) == float(task["answer"])
