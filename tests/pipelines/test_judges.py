"""Judges: scores worked out by hand."""

import pytest

from pipelines.judges import asks_back, rank, score_task

TWELVE = "one two three four five six seven eight nine ten eleven twelve"


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("I'm fine, how are you?", 1.0),
        ("What's up with you?  ", 1.0),
        ("I am fine.", 0.0),
        ("You?", 0.0),  # too short to count as a question
        ("?", -1.0),
        ("", -1.0),
        (" \n", -1.0),
        ("very very very well", -0.5 * 2 / 4),
        ("Really? Really?", -0.5 * 1 / 2),
        (TWELVE + "?", 1.0),
        (TWELVE + " thirteen fourteen?", 0.9),
    ],
)
def test_asks_back(text, score):
    assert asks_back(text, "stop") == pytest.approx(score)


def test_an_answer_that_was_cut_off_counts_as_nothing():
    assert asks_back("How are you?", "length") == -1.0


@pytest.mark.parametrize(
    ("scores", "ranks"),
    [([0.5, 1.0, -1.0], [2, 1, 3]), ([1.0, 0.0, 1.0, 0.0], [1, 3, 1, 3]), ([0.0, 0.0], [1, 1])],
)
def test_ranks_begin_at_one_and_ties_share_them(scores, ranks):
    assert rank(scores) == ranks


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("7 + 5 = 12.", True),
        ("7 + 5 = 12, not 13", True),
        ("It is 12", True),
        ("12.0", True),
        ("7 + 5 = 13.", False),
        ("12 = 7", False),
        ("7 + 5 = -12", False),
        ("120", False),
        ("12, I think, or 13", False),
        ("12 = ", False),
        ("twelve", False),
        ("", False),
    ],
)
def test_a_task_is_solved_by_the_number_after_the_equals_sign_or_the_last(text, right):
    assert score_task(text, {"answer": "12"}) is right


def test_a_negative_answer():
    assert score_task("3 - 5 = -2.", {"answer": "-2"})
