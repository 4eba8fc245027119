"""Rules: each just inside and just outside its bound, the order, other bounds, and the counts against plain ones."""

import random
import time
from collections import Counter
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.corpus.quality import DEFAULT_SETS, RULE_SETS, RULES, WORD, Features, c4_lines, judge, ngrams

NAMED = {rule.name: rule for rule in RULES}
PROSE = """The clock in the hall has been silent since my uncle went to sea. Nobody winds it now.

In spring the river rises and takes a little of the meadow with it, and each year we put up the fence again.

She would have told him, had he only asked! But who asks about such things?

They set out before the sun was up, four of them to one horse, and came home with nothing to show for it."""


def numbered(count: int, form: str = "{}") -> list[str]:
    return [form.format(number) for number in range(count)]


def padded(text: str, length: int) -> str:
    """`text` made `length` characters long by one more word."""
    return text + " " + "z" * (length - len(text) - 1)


def twice(letters: int, words: int) -> str:
    """A phrase of so many letters and words, two times."""
    phrase = ["a" * (letters - words + 1), *"bcdefghijk"[: words - 1]]
    return " ".join(phrase * 2)


A29 = 29 * "a"
INSIDE_AND_OUTSIDE = [
    # Words, of which symbols are none.
    ("gopher-min-words", "word ! " * 50, 50, "word ! " * 49, 49),
    ("gopher-max-words", "word ! " * 100_000, 100_000, "word " * 100_001, 100_001),
    ("gopher-min-word-length", "abc ! abc", 3, "abc abc ab", 8 / 3),
    ("gopher-max-word-length", "abcdefghij . abcdefghij", 10, "abcdefghij abcdefghijk", 10.5),
    ("gopher-hashes", "# " + "word " * 9, 1 / 10, "# # " + "word " * 17, 2 / 19),
    ("gopher-ellipses", "... " + "word " * 9, 1 / 10, "word\u2026 " + "word " * 7, 1 / 9),
    ("gopher-bullet-lines", "- a\n" * 5 + " \u2022 a\n" * 4 + "a", 9 / 10, "- a\n" * 10 + "a", 10 / 11),
    ("gopher-ellipsis-lines", "a...\nb\u2026 \na...\n" + "a\n" * 7, 3 / 10, "a...\n" * 4 + "a\n" * 6, 4 / 10),
    ("gopher-letters", "one b2 three four 5", 4 / 5, "one two three !", 3 / 4),
    ("gopher-stop-words", "of the people", 2, "the The the people Of", 1),
    # Repeated: not the first time, but every later one.
    ("gopher-paragraphs", "\n\n".join(numbered(7) + ["0"] * 3), 0.3, "\n\n\n".join(numbered(6) + ["0"] * 4), 0.4),
    ("gopher-paragraph-characters", "aa\n\naa\n\nbb", 2 / 10, "aa\n\naa\n\nb", 2 / 9),
    ("gopher-lines", "\n".join(numbered(7) + ["0"] * 3), 0.3, "\n\n".join(numbered(6) + ["0"] * 4), 0.4),
    ("gopher-line-characters", "aa\naa\nbbbb", 2 / 10, "aa\naa\nbbb", 2 / 9),
    # Both times: 'ab cd', 'abc de fg' and 'a b c de', with their spaces.
    ("gopher-top-2-gram", padded("ab cd ab cd", 50), 10 / 50, padded("ab cd ab cd", 49), 10 / 49),
    ("gopher-top-3-gram", padded("abc de fg abc de fg", 100), 18 / 100, padded("abc de fg abc de fg", 99), 18 / 99),
    ("gopher-top-4-gram", padded("a b c de a b c de", 100), 16 / 100, padded("a b c de a b c de", 99), 16 / 99),
    # The second time, without spaces.
    *(
        (f"gopher-{n}-grams", padded(twice(x, n), 100), x / 100, padded(twice(x, n), 99), x / 99)
        for n, x in zip(range(5, 11), range(15, 9, -1), strict=True)
    ),
    ("c4-lorem-ipsum", "lorem, ipsum", 0, "Lorem Ipsum dolor", 1),
    ("c4-curly-brackets", "a } b", 0, "a { b", 1),
    ("c4-sentences", "One. Two! Three? (Four.) Five", 5, "One. At 3.5 p.m.\nThree... four. Five. ", 4),
    # Lines, but for blank ones.
    ("fineweb-line-ends", "b?\nc!\nd\u3002 \n\n" * 4 + "g\n" * 88, 0.12, "a.\n" * 11 + "b\n" * 89, 0.11),
    ("fineweb-short-lines", f"{A29}\n" * 67 + f"{A29}a\n\n" * 33, 0.67, f"{A29}\n" * 68 + f"{A29}a\n" * 32, 0.68),
    ("fineweb-line-characters", f"{A29}\n\n" * 2 + "b" * 232, 29 / 290, f"{A29}\n" * 2 + "b" * 231, 29 / 289),
    ("fineweb-newlines", "a b c\n" * 3 + "d", 3 / 10, "a b c\n" * 3, 3 / 9),
]  # fmt: skip


@pytest.mark.parametrize(("name", "inside", "value", "outside", "other"), INSIDE_AND_OUTSIDE)
def test_a_rule_is_kept_at_its_bound_and_broken_beyond(name, inside, value, outside, other):
    rule = NAMED[name]
    assert rule.measure(Features(inside)) == pytest.approx(value, rel=1e-12)
    assert rule.low <= rule.measure(Features(inside)) <= rule.high
    assert rule.measure(Features(outside)) == pytest.approx(other, rel=1e-12)
    assert not rule.low <= rule.measure(Features(outside)) <= rule.high


def test_every_rule_is_tested_at_its_bound():
    assert [case[0] for case in INSIDE_AND_OUTSIDE] == [rule.name for rule in RULES]


def test_names_of_rules_differ_and_sets_come_in_their_order():
    assert len(NAMED) == len(RULES)
    assert tuple(dict.fromkeys(rule.rule_set for rule in RULES)) == RULE_SETS
    assert all(set(chosen) <= set(RULE_SETS) for chosen in DEFAULT_SETS.values())


# Judging


def test_prose_keeps_all_rules_and_loses_its_blank_lines_to_c4():
    assert judge(PROSE, RULE_SETS) == (PROSE.replace("\n\n", "\n"), None, None)
    assert judge(PROSE, DEFAULT_SETS["article"]) == (PROSE, None, None)


def test_the_first_rule_broken_is_told_with_its_value_and_the_whole_text():
    text = "Now see {this}.\nok\n" + "A line of three words.\n" * 20
    assert judge(text, ("c4",)) == (text, "c4-curly-brackets", 1.0)
    assert judge(text, RULE_SETS).broken == "gopher-stop-words"
    assert judge(text, ("c4", "gopher-repetition")).broken == "gopher-lines"


def test_fineweb_sees_what_c4_leaves():
    text = "Menu\n" * 12 + PROSE
    assert judge(text, ("fineweb",)).broken == "fineweb-short-lines"
    assert judge(text, ("c4", "fineweb")).broken is None


def test_no_rules_keep_everything():
    assert judge("x {", ()) == judge("x {", DEFAULT_SETS["code"]) == ("x {", None, None)


def test_a_threshold_takes_the_place_of_a_bound_above_or_below():
    assert judge("a b c", ("gopher-quality",)) == ("a b c", "gopher-min-words", 3.0)
    assert judge("a b c", ("gopher-quality",), {"gopher-min-words": 3}).broken == "gopher-min-word-length"
    assert judge(PROSE, ("gopher-quality",), {"gopher-max-words": 10}).broken == "gopher-max-words"
    assert judge(PROSE, ("gopher-quality",)).broken is None


def test_unknown_names_are_refused_with_the_nearest():
    with pytest.raises(ValueError, match="unknown rule 'gopher-minwords', the nearest is 'gopher-min-words'"):
        judge("a", (), {"gopher-minwords": 1})
    with pytest.raises(ValueError, match="unknown set of rules 'gopher', the nearest is 'gopher-quality'"):
        judge("a", ("gopher",))


def test_a_short_entry_is_no_repetition():
    assert judge("CAT, n. A soft automaton.", DEFAULT_SETS["article"]).broken is None


@settings(deadline=None)
@given(st.text(st.characters() | st.sampled_from("a b.\n#-{")))
def test_any_text_is_kept_or_breaks_a_rule_at_a_value_beyond_its_bound(text):
    for rule_set in RULE_SETS:
        kept, broken, value = judge(text, (rule_set,))
        if broken is None:
            assert kept == (c4_lines(text) if rule_set == "c4" else text)
        else:
            assert kept == text
            assert not NAMED[broken].low <= value <= NAMED[broken].high


@pytest.mark.parametrize("piece", ["@", "a(", "=", "[", '!")', "a ", "ab", "! \t"])
def test_time_grows_with_the_text_not_with_its_square(piece):
    start = time.process_time()
    for rule_set in RULE_SETS:
        judge(piece * 100_000, (rule_set,))
    assert time.process_time() - start < 10


# Lines of C4


def test_c4_takes_out_short_lines_and_those_about_the_page():
    lines = [
        "  Only this line stays.  ",
        "two words",
        "",
        "Please enable JavaScript to see this page.",
        "By going on you accept our Privacy Policy.",
        "This site uses cookies to please you.",
        "a long word " + "w" * 1001,
        "three short words",
        "a long word " + "w" * 1000,
    ]
    assert c4_lines("\n".join(lines)).split("\n") == ["Only this line stays.", "three short words", lines[-1]]


def test_c4_takes_out_citations_after_it_counted_words():
    assert (
        c4_lines("It is so.[12][citation needed]\nEarly life [edit]\nA [b] c[] d")
        == "It is so.\nEarly life \nA [b] c d"
    )


# Words and n-grams


def test_words_are_told_apart():
    text = (
        "Don't pay $3.50, Mr. O'Neill's well-known ... see https://a.example/x?y=1&z (or --all): f(x) either/or 10:30!"
    )
    assert WORD.findall(text) == [
        *("Don", "'t", "pay", "$", "3.50", ",", "Mr", ".", "O'Neill", "'s", "well", "-", "known", "...", "see"),
        *("https://a.example/x?y=1&z", "(", "or", "--all", ")", ":", "f(x", ")", "either", "/", "or", "10:30", "!"),
    ]  # fmt: skip


def plain_top(words: list[str], n: int) -> int:
    grams = Counter(zip(*(words[start:] for start in range(n)), strict=False))
    gram, count = max(grams.items(), key=lambda item: item[1], default=((), 0))
    return count * len(" ".join(gram)) if count > 1 else 0


def plain_repeated(words: list[str], n: int) -> int:
    seen, total, place = set(), 0, 0
    while place + n <= len(words):
        gram = tuple(words[place : place + n])
        if gram in seen:
            total, place = total + sum(map(len, gram)), place + n
        else:
            seen.add(gram)
            place += 1
    return total


@settings(deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dddd"]), max_size=60))
def test_ngrams_are_counted_as_by_hand_in_short_texts(words):
    found = ngrams(words)
    assert found.top == {n: plain_top(words, n) for n in (2, 3, 4)}
    assert found.repeated == {n: plain_repeated(words, n) for n in range(5, 11)}


def test_ngrams_are_counted_as_by_hand_in_a_long_text():
    dice = random.Random(1)
    pages = [[dice.choice("abcdefghijklmnopqrstuvwxyz") * dice.randint(1, 9) for _ in range(40)] for _ in range(20)]
    words = [word for _ in range(60) for word in dice.choice(pages)[: dice.randint(1, 40)]]
    found = ngrams(words)
    assert found.top == {n: plain_top(words, n) for n in (2, 3, 4)}
    assert found.repeated == {n: plain_repeated(words, n) for n in range(5, 11)}
    assert all(short >= 0.5 * long > 0 for short, long in pairwise(found.repeated.values()))
