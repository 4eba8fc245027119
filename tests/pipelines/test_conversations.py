"""Demonstrations: what the rules make, what small talk is cut into, and every fault of a user's file."""

import json
import re
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cluster.errors import BadInput, StageFailed
from pipelines import conversations
from pipelines.alignment import ConversationSource
from pipelines.conversations import Conversation, LeftOut, load, message, read, write
from pipelines.documents import is_held_out
from pipelines.judges import score_task

TALK = [message("user", "Hi"), message("assistant", "Hello!")]


def source(path, **settings) -> ConversationSource:
    return ConversationSource(name="own", path=str(path), licence="MIT", **settings)


def jsonl(path, *rows):
    path.write_text("\n".join(row if isinstance(row, str) else json.dumps(row) for row in rows), encoding="utf-8")
    return path


def messages(path) -> list:
    return [one.messages for one in read(source(path))]


# Arithmetic


@pytest.fixture(scope="module")
def sums() -> list[Conversation]:
    return list(read(source("arithmetic:")))


def test_every_shown_answer_is_right(sums):
    assert all(score_task(one.messages[1]["content"], one.task) for one in sums)


def test_every_question_is_asked_once_and_every_wording_of_every_pair(sums):
    questions = [one.messages[0]["content"] for one in sums]
    assert len(set(questions)) == len(questions) == 100 * 24
    wordings = Counter(re.sub(r"\d+", "_", question) for question in questions)
    assert set(wordings.values()) == {100}


def test_a_held_out_question_is_not_trained_on_but_its_sum_is_in_other_words(sums):
    questions, terms = {}, {}
    for kept in (True, False):
        part = [one.messages[0]["content"] for one in sums if is_held_out(one.id, 0.12) == kept]
        questions[kept] = set(part)
        terms[kept] = {tuple(re.findall(r"\d", question)) for question in part}
    assert questions[True]
    assert not questions[True] & questions[False]
    assert terms[True] <= terms[False]


def test_a_limit_takes_the_first(sums):
    assert list(read(source("arithmetic:", max_conversations=5))) == sums[:5]


# Small talk


def said(*texts: str) -> list[str]:
    return list(texts)


def contents(found) -> list:
    return [item if isinstance(item, LeftOut) else [turn["content"] for turn in item] for item in found]


def test_utterances_of_one_speaker_are_joined_and_cleaned():
    groups = [
        [{"sender": "a", "text": "<em>Hi</em>  there"}, {"sender": "a", "text": "I <3 https://example.org/x it"}],
        [{"sender": "b", "text": "Oh"}],
        [{"sender": "b", "text": "nice"}],
    ]
    assert conversations._spoken(groups) == ["Hi there I <3 it", "Oh nice"]


def test_exchanges_have_one_two_and_three_turns_in_rotation():
    spoken = [letter for pair in zip("abcdefg", "ABCDEFG", strict=True) for letter in pair]
    exchanges = contents(conversations._exchanges(spoken, "own"))
    assert exchanges == [["a", "A"], ["b", "B", "c", "C"], ["d", "D", "e", "E", "f", "F"], ["g", "G"]]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 101, "turn of more than 100 characters"),
        ("...", "turn without words"),
        ("write to a@b.org", "turn with personal data"),
        ("I am @somebody there", "turn with personal data"),
        ("call 801-555-1234", "turn with personal data"),
    ],
)
def test_an_unusable_turn_ends_the_exchange_and_is_counted(text, reason):
    spoken = said("a", "A", "b", "B", "c", text, "d", "D")
    assert contents(conversations._exchanges(spoken, "own")) == [
        ["a", "A"],
        ["b", "B"],
        LeftOut("own", reason),
        ["d", "D"],
    ]


def test_a_last_turn_without_an_answer_is_counted():
    assert contents(conversations._exchanges(said("a", "A", "b"), "own")) == [
        ["a", "A"],
        LeftOut("own", "turn without an answer"),
    ]


def test_a_conversation_is_held_out_whole():
    ids = {conversations._made(source("x"), "talk-1", [message("user", text)]).id for text in ("a", "b")}
    assert len(ids) == 2
    assert len({one[:8] for one in ids}) == 1


def test_the_package_gives_short_talk_without_personal_data():
    pytest.importorskip("chitchat_dataset")
    found = list(read(source("chitchat:", max_conversations=300)))
    talk = [one for one in found if isinstance(one, Conversation)]
    assert len(talk) == 300
    assert {tuple(turn["role"] for turn in one.messages[:2]) for one in talk} == {("user", "assistant")}
    assert max(len(turn["content"]) for one in talk for turn in one.messages) <= conversations.LONGEST_TURN
    assert all(one.task is None and one.licence == "MIT" for one in talk)


# A user's files


def test_both_forms_of_row_are_read(tmp_path):
    rows = [{"messages": TALK}, {"prompt": "Hi", "completion": "Hello!"}, {"prompt": TALK[:1], "completion": TALK[1:]}]
    assert messages(jsonl(tmp_path / "a.jsonl", *rows)) == [TALK, TALK, TALK]


def test_a_folder_of_parquet_and_jsonl_is_read_in_order_of_name(tmp_path):
    jsonl(tmp_path / "b.jsonl", {"prompt": "2 + 3?", "completion": "5", "task": {"answer": 5}})
    pq.write_table(pa.table({"messages": [TALK]}), tmp_path / "a.parquet")
    (tmp_path / "README.md").write_text("not read")
    first, second = read(source(tmp_path))
    assert (first.messages, first.task) == (TALK, None)
    assert second.task == {"answer": "5"}


FAULTS = [
    ("{broken", "not a JSON object: Expecting property name"),
    ("[1]", "not a JSON object: [1]"),
    ({"text": "a"}, "neither 'messages' nor 'prompt' and 'completion', but text"),
    ({"messages": "a"}, "messages must be a list of messages, got 'a'"),
    ({"messages": []}, "messages are empty"),
    ({"messages": [{"role": "boss", "content": "a"}]}, "one of system, user, assistant, tool, got 'boss'"),
    ({"messages": [TALK[0], {"role": "assistant", "content": None}]}, "messages[1].content must be text, got None"),
    ({"messages": [TALK[0], {"role": "assistant", "content": " "}]}, "messages[1] says nothing"),
    ({"messages": TALK[:1]}, "the assistant must answer something"),
    ({"messages": TALK[1:]}, "the assistant must answer something"),
    ({"prompt": "a", "completion": 3}, "completion must be a list of messages, got 3"),
    ({"messages": TALK, "task": {"answer": "two"}}, "'task' must be like"),
]


def test_all_bad_rows_are_named_with_file_line_and_reason(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", {"messages": TALK}, *(row for row, _ in FAULTS))
    with pytest.raises(BadInput) as error:
        list(read(source(path)))
    assert len(error.value.problems) == len(FAULTS)
    for line, (problem, (_, reason)) in enumerate(zip(error.value.problems, FAULTS, strict=True), start=2):
        assert f"source 'own': {path}, line {line}: " in str(problem)
        assert reason in str(problem)


def test_many_bad_rows_are_counted_after_the_first_twenty(tmp_path):
    with pytest.raises(BadInput) as error:
        list(read(source(jsonl(tmp_path / "a.jsonl", *["[]"] * 25))))
    assert len(error.value.problems) == 21
    assert "5 more rows" in str(error.value)


def test_a_bad_row_before_the_limit_is_not_passed_over(tmp_path):
    path = jsonl(tmp_path / "a.jsonl", "[]", *[{"prompt": str(n), "completion": "a"} for n in range(3)])
    with pytest.raises(BadInput, match="line 1"):
        list(read(source(path, max_conversations=2)))


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("nowhere", "no folder or file"),
        ("pydoc:", "give a file, a folder, arithmetic:"),
        (".", "no .jsonl or .parquet file at ."),
    ],
)
def test_a_source_that_cannot_be_read_is_refused_before_anything_starts(path, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("not a conversation")
    with pytest.raises(BadInput) as error:
        conversations.fingerprint(source(path))
    assert said in str(error.value)


def test_the_fingerprint_is_of_the_content_wherever_it_lies(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        jsonl(tmp_path / name / "talk.jsonl", {"messages": TALK})
    first, second = (conversations.fingerprint(source(tmp_path / name), verify=True) for name in ("a", "b"))
    assert first == second
    jsonl(tmp_path / "b" / "talk.jsonl", {"prompt": "Hi", "completion": "Bye"})
    assert conversations.fingerprint(source(tmp_path / "b"), verify=True) != first
    assert conversations.fingerprint(source("arithmetic:")) != conversations.fingerprint(source("chitchat:"))


# Writing


def test_what_is_written_is_read_back_parted_by_id(tmp_path):
    made = [
        Conversation(
            f"{place:08x}rest", [*TALK, message("user", str(n))], "own", "MIT", {"answer": "1"} if n else None
        )
        for n, place in enumerate([0, 2**31 - 1, 2**31, 2**32 - 1])
    ]
    counts = write([*made, LeftOut("own", "dull")], tmp_path, 0.5)
    assert list(load(tmp_path / "held_out.parquet")) == made[:2]
    assert list(load(tmp_path / "train.parquet")) == made[2:]
    assert counts == ({"own": 2}, {"own": 2}, {"dull": 1})


def test_what_was_said_before_is_left_out(tmp_path):
    twice = [Conversation(id, TALK, "own", "MIT") for id in ("00000000", "ffffffff")]
    other = Conversation("fffffffe", [*TALK, *TALK], "own", "MIT")
    counts = write([*twice, other], tmp_path, 0.5)
    assert counts.left_out == {"said before, word for word": 1}


def test_an_empty_set_is_refused(tmp_path):
    with pytest.raises(StageFailed, match="no conversation fell into the held_out set"):
        write([Conversation("ffffffff", TALK, "own", "MIT")], tmp_path, 0.1)
