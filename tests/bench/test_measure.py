"""Figures: what is compared, how it is told, and when a comparison counts for nothing."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.bench import memory, peer
from tests.bench.agreement import digest, same_doubles, same_pages, same_tokens
from tests.bench.measure import Figure, Invalid, Turn, at_most, compare, ratio, report

SECONDS = st.floats(0.01, 1000)


def arm(name, seconds, order, made=None):
    def run():
        order.append(name)
        return Turn(seconds.pop(0), made or {"same": 1})

    return run


def test_arms_are_warmed_up_and_take_turns_in_going_first():
    order: list[str] = []
    compare("f", 1, arm("o", [9, 1, 2, 3], order), arm("t", [9, 2, 6, 3], order), lambda a, b: a, pairs=3)
    assert order == ["o", "t", "o", "t", "t", "o", "o", "t"]


def test_a_figure_is_the_ratio_of_the_medians_without_the_warm_up():
    figure = compare("f", 1.4, arm("o", [100, 1, 2, 3], []), arm("t", [1, 2, 6, 3], []), lambda a, b: a, pairs=3)
    assert (figure.value, figure.low, figure.high) == (1.5, 1, 3)
    assert figure.detail == {"same": 1, "our_seconds": [1, 2, 3], "their_seconds": [2, 6, 3]}
    assert figure.line() == "BENCH f 1.5 [1, 3] bar 1.4 met"


def test_a_figure_below_its_bar_is_short():
    assert Figure("g", 0.89, 0.8, 0.95, 0.9).line() == "BENCH g 0.89 [0.8, 0.95] bar 0.9 short"


@given(st.lists(st.tuples(SECONDS, SECONDS), min_size=1, max_size=9))
def test_the_interval_holds_the_value(pairs):
    value, low, high = ratio([mine for mine, _ in pairs], [other for _, other in pairs])
    assert low * (1 - 1e-9) <= value <= high * (1 + 1e-9)


def test_a_figure_that_has_to_stay_low_is_turned_over():
    assert at_most("m", 1 << 30, 2 << 30, {}).value == 2
    assert at_most("m", 1 << 30, 2 << 30, {}).met
    assert not at_most("m", 3 << 30, 2 << 30, {}).met


def test_work_that_differs_in_any_pair_is_no_comparison():
    made = [{"tokens": 1}, {"tokens": 1}, {"tokens": 2}]
    with pytest.raises(Invalid, match="other ids"):
        compare("f", 1, lambda: Turn(1, made.pop(0)), lambda: Turn(1, {"tokens": 1}), same_tokens, pairs=2)


def test_the_report_is_json_with_every_figure(tmp_path):
    report([Figure("g", 0.5, 0.4, 0.6, 0.9, {"tokens": 7})], {"text": "plays"}, tmp_path / "new" / "data.json")
    said = json.loads((tmp_path / "new" / "data.json").read_text())
    assert said["text"] == "plays"
    assert said["figures"] == [
        {"name": "g", "value": 0.5, "low": 0.4, "high": 0.6, "bar": 0.9, "detail": {"tokens": 7}, "met": False}
    ]


# Whether both did the same


def test_a_digest_is_that_of_the_documents_whatever_their_order_and_type():
    one, two = np.array([1, 2, 3], np.uint16), np.array([4], np.uint32)
    assert digest([one, two]) == digest([two.astype(np.uint16), one.astype(np.int64)])
    assert digest([one, two]) != digest([np.array([1, 2]), np.array([3, 4])])
    assert digest([one, one, two]) != digest([one, two])
    assert (digest([one, two])["documents"], digest([one, two])["tokens"]) == (2, 4)


KNOWN = {f"digest{number}": str(number) for number in range(10)}
PAIRS = [("0", "1", 0.95), ("2", "3", 0.85), ("4", "5", 0.6)]


def kept(*dropped):
    return {"texts": [text for text, name in KNOWN.items() if name not in dropped]}


def kept_there(*dropped):
    return {"kept": [name for name in KNOWN.values() if name not in dropped]}


def test_recall_counts_pairs_of_which_one_is_dropped_whichever_it_is():
    facts = same_doubles(kept("0", "3"), kept_there("1"), KNOWN, PAIRS)
    assert (facts["our_recall"], facts["their_recall"]) == (1, 0.5)
    assert (facts["our_kept"], facts["their_kept"], facts["pairs"]) == (8, 9, 2)


def test_a_side_that_drops_what_is_no_duplicate_or_changes_texts_makes_it_invalid():
    with pytest.raises(Invalid, match="their side drops"):
        same_doubles(kept("1"), kept_there("9"), KNOWN, PAIRS)
    with pytest.raises(Invalid, match="changed the texts"):
        same_doubles({"texts": ["unheard of"]}, kept_there(), KNOWN, PAIRS)


def test_pages_are_compared_by_what_either_side_keeps():
    urls = set("abcdefghij")
    facts = same_pages({"urls": list("abc")}, {"kept": list("abd")}, urls)
    assert facts == {"pages": 10, "our_pages": 3, "their_pages": 3, "same_decisions": 0.8}
    with pytest.raises(Invalid, match="ours keeps 3, theirs 4 of 10 pages, 70% alike"):
        same_pages({"urls": list("abc")}, {"kept": list("abde")}, urls)
    with pytest.raises(Invalid):
        same_pages({"urls": []}, {"kept": []}, urls)


# Memory, and the peer


def test_peak_memory_counts_children_and_shared_pages_once(tmp_path):
    code = (
        "import os, time; data = bytearray(os.urandom(1)) * 150_000_000\n"
        "child = os.fork(); time.sleep(2.5); child or os._exit(0); os.wait()"
    )
    most = memory.peak([sys.executable, "-c", code], tmp_path / "log")
    assert 150e6 < most < 200e6


def test_a_command_that_fails_has_no_peak(tmp_path):
    with pytest.raises(memory.Failed, match="ended with 3"):
        memory.peak([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")


def test_what_is_gone_holds_nothing():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert memory.held(process.pid) == 0
    assert memory.held(os.getpid()) > 1e6


def test_a_peer_that_fails_makes_it_invalid(monkeypatch):
    monkeypatch.setenv(peer.PYTHONS["datatrove"], sys.executable)  # ours, which has no datatrove
    with pytest.raises(Invalid, match="No module named 'datatrove'"):
        peer.run("tokenize", work="nowhere")


@pytest.mark.parametrize(("name", "package"), [("datatrove", "datatrove"), ("hf_trainer", "transformers")])
def test_every_requirement_of_a_peer_is_pinned(name, package):
    lines = [line for line in peer.requirements(name).read_text().splitlines() if line and not line.startswith("#")]
    assert all("==" in line for line in lines)
    assert any(line.startswith(package) for line in lines)
