"""Rankings: which prompts are chosen, seeds that don't depend on company, and TRL's preference format."""

import json

import pytest

from cluster.errors import BadInput
from llm.loading import load
from pipelines import rank
from pipelines.alignment import PreferenceSource, RankSettings
from pipelines.conversations import Conversation, message, write
from pipelines.judges import JUDGES
from pipelines.rank import Prompt, answers_to, choose_prompts, from_preferences, judged, to_preferences
from pipelines.recipe import load_recipe
from tests.models import save_tiny_model

SETTINGS = RankSettings(prompts=3, answers=2, max_new_tokens=8)


def talk(number: int, text: str, task=None) -> Conversation:
    return Conversation(
        f"{number:08x}", [message("user", text), message("assistant", f"{number}")], "own", "MIT", task
    )


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """What the stage `sft` leaves: conversations, half of them held out, and a model."""
    folder = tmp_path_factory.mktemp("sft")
    (folder / "conversations").mkdir()
    train = [talk(2**32 - 1 - n, text) for n, text in enumerate(["a", "b", "b", "c", "d", "x" * 1000])]
    held_out = [talk(n, text) for n, text in enumerate(["a", "e", "f"])]
    tasks = [talk(n, f"{n} + 1?", {"answer": f"{n + 1}"}) for n in (7, 2**32 - 9)]
    write([*train, *held_out, *tasks], folder / "conversations", 0.5)
    save_tiny_model(folder / "model")
    return folder


def texts(found) -> set[str]:
    return {prompt.messages[0]["content"] for prompt in found.prompts}


def test_prompts_are_different_small_talk_that_leaves_room_for_an_answer(sft):
    found = choose_prompts(sft, "train", SETTINGS.model_copy(update={"prompts": 99}), seed=1)
    assert texts(found) == {"a", "b", "c", "d"}
    assert (found.different, found.too_long) == (5, 1)


def test_the_seed_draws_the_prompts(sft):
    drawn = [texts(choose_prompts(sft, "train", SETTINGS, seed)) for seed in (1, 1, 2, 3, 4, 5)]
    assert all(len(one) == 3 for one in drawn)
    assert drawn[0] == drawn[1]
    assert len(set(map(frozenset, drawn))) > 1


def test_prompts_that_training_knows_are_passed_over(sft):
    known = sft / "conversations" / "train.parquet"
    assert texts(choose_prompts(sft, "held_out", SETTINGS, seed=1, without=known)) == {"e", "f"}


def test_an_answer_depends_on_its_prompt_and_number_and_on_no_other(sft):
    engine = load(sft / "model", slots=3)
    prompts = choose_prompts(sft, "train", SETTINGS, seed=1).prompts
    together = answers_to(engine, prompts, SETTINGS, seed=5)
    alone = answers_to(engine, prompts[1:2], SETTINGS, seed=5)
    assert [answer.ids for answer in together[1]] == [answer.ids for answer in alone[0]]
    assert len({tuple(answer.ids) for each in together for answer in each}) == 6
    other = answers_to(engine, prompts[1:2], SETTINGS, seed=6)
    assert [answer.ids for answer in alone[0]] != [answer.ids for answer in other[0]]


def test_parts_hold_every_prompt_once_in_order():
    prompts = [Prompt(str(n), []) for n in range(70)]
    parts = list(rank._parts(prompts))
    assert [len(part) for part in parts] == [32, 32, 6]
    assert [prompt for part in parts for prompt in part] == prompts


def test_a_scripted_judge_sees_each_answer_with_its_end():
    row = {"answers": ["How are you?", "How are you?"], "finish_reasons": ["stop", "length"]}
    assert judged(JUDGES["asks-back"], row) == [1.0, -1.0]


# Preferences

PROMPT = [message("user", "Hi")]
PAIR = {"prompt": PROMPT, "chosen": [message("assistant", "Yes")], "rejected": [message("assistant", "No")]}


def ranking(answers: list[str], ranks: list[int]) -> dict:
    return {"prompt": PROMPT, "answers": answers, "ranks": ranks}


def pairs(one: dict) -> list[tuple[str, str]]:
    return [(pair["chosen"][0]["content"], pair["rejected"][0]["content"]) for pair in to_preferences(one)]


def test_a_ranking_gives_every_pair_that_is_not_a_tie():
    assert pairs(ranking(["a", "b", "c"], [2, 1, 2])) == [("b", "a"), ("b", "c")]
    assert pairs(ranking(["a", "b", "c"], [1, 2, 3])) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert pairs(ranking(["a", "b"], [1, 1])) == []


def test_a_preference_becomes_a_ranking_of_two_and_comes_back_unchanged():
    (one,) = from_preferences([PAIR], "somebody")
    assert (one["answers"], one["ranks"], one["annotator"]) == (["Yes", "No"], [1, 2], "somebody")
    assert list(to_preferences(one)) == [PAIR]


def test_a_ranking_of_two_comes_back_best_first():
    (one,) = from_preferences(to_preferences(ranking(["worse", "better"], [2, 1])), "somebody")
    assert (one["prompt"], one["answers"], one["ranks"]) == (PROMPT, ["better", "worse"], [1, 2])


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Yes", "rejected": "No"},
        {"chosen": PROMPT + PAIR["chosen"], "rejected": PROMPT + PAIR["rejected"]},
        {"prompt": "Hi", "chosen": PROMPT + PAIR["chosen"], "rejected": PROMPT + PAIR["rejected"]},
    ],
    ids=["standard", "implicit prompt", "prompt repeated"],
)
def test_the_other_forms_of_trl_say_the_same(row):
    (one,) = from_preferences([row], "somebody")
    assert list(to_preferences(one)) == [PAIR]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "Hi", "chosen": "Yes"}, "rejected: messages are empty"),
        ({"prompt": "Hi", "chosen": "Yes", "rejected": [message("user", "No")]}, "one answer each"),
        ({"chosen": "Yes", "rejected": "No"}, "one answer each to the same prompt"),
        ({"chosen": PROMPT + PAIR["chosen"], "rejected": [*PAIR["chosen"], *PAIR["rejected"]]}, "the same prompt"),
        ({"prompt": 3, "chosen": "Yes", "rejected": "No"}, "prompt: "),
    ],
)
def test_a_row_that_is_no_preference_is_named(row, said):
    with pytest.raises(ValueError, match=f"row 2: .*{said}"):
        list(from_preferences([PAIR, row], "somebody"))


def test_rankings_are_read_back(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    (one,) = from_preferences([PAIR], "somebody")
    stored = {**one, "prompt": json.dumps(one["prompt"])}
    pq.write_table(pa.Table.from_pylist([stored], rank.SCHEMA), tmp_path / "train.parquet")
    assert list(rank.read_rankings(tmp_path / "train.parquet")) == [one]


def test_preferences_of_people_become_rankings_and_every_bad_row_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "load_tokenizer", lambda model: None)
    monkeypatch.setattr(rank, "_context", lambda model: 40)
    monkeypatch.setattr(rank, "_spoken", lambda tokenizer, ranking, answer: list(answer))
    lines = [json.dumps(PAIR), json.dumps({"prompt": "Hi", "chosen": "Yes" * 20, "rejected": "No"})]
    (tmp_path / "people.jsonl").write_text("\n".join(lines))
    source = PreferenceSource(name="people", path=str(tmp_path / "people.jsonl"), licence="MIT")
    [found] = rank._preferences(source, tmp_path)
    assert (found["answers"], found["annotator"]) == (["Yes", "No"], "preferences:people"), (
        "too long ones are left out"
    )
    (tmp_path / "people.jsonl").write_text("\n".join([*lines, '{"prompt": "Hi"}', "not JSON"]))
    with pytest.raises(BadInput, match=r"people.jsonl, line 3: .*chosen(?s:.*)people.jsonl, line 4: "):
        list(rank._preferences(source, tmp_path))


def test_preferences_without_a_licence_are_refused(tmp_path):
    (tmp_path / "people.jsonl").write_text(json.dumps(PAIR))
    bare = PreferenceSource(name="people", path=str(tmp_path))
    recipe = load_recipe("micro")
    recipe = recipe.model_copy(update={"rank": recipe.rank.model_copy(update={"preferences": (bare,)})})
    [problem] = rank.STAGE.check(recipe)
    assert "declares no licence" in problem.what
    assert rank.STAGE.sources(recipe, False).keys() == {"people"}
