"""`rank`: prompts to ranked answers.

reads   sft/model                      the chat model, which writes several answers to each prompt
        sft/conversations              whose small talk gives the prompts
        rank.preferences               preferences of people in TRL's format, which become rankings of two answers
writes  rankings/train.parquet         one row a prompt: its answers and a rank for each
        rankings/held_out.parquet      the prompts that the reward model doesn't learn from
        answers/part-NNNNN.parquet     while it works: what a stage that was cut off doesn't write again

A judge that is a script stands in for people here, and every row says so. Rankings of people have the same form.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from cluster import mirror
from cluster.errors import BadInput, Problem, StageFailed, Stopped
from cluster.preflight import Piece
from cluster.progress import progress
from cluster.runs import canonical_hash, remove, stop_is_asked
from llm.architectures import context_of, read_config
from llm.chat import check_messages, render_conversation, render_turns
from llm.sampling import SamplingParams
from llm.vocabulary import load_tokenizer
from pipelines import conversations
from pipelines.alignment import AnswerSettings, PreferenceSource, RankSettings
from pipelines.conversations import Fault, Message
from pipelines.documents import is_held_out
from pipelines.judges import JUDGES, Judge, rank
from pipelines.recipe import Recipe
from pipelines.stage import Demand, Outcome, Stage, StageRun

if TYPE_CHECKING:
    from llm.engine import Completion, Engine

SETS = ("train", "held_out")
PROMPTS_PER_PART = 32  # answered together: which prompts share a batch must not depend on the actors
ANSWER_BYTES = 500  # of one answer on disk, for the estimate of space

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),  # messages, as JSON
        ("answers", pa.list_(pa.string())),
        ("finish_reasons", pa.list_(pa.string())),  # stop, length; null where nobody knows
        ("ranks", pa.list_(pa.int64())),  # 1 is best, ties share a rank
        ("annotator", pa.string()),
        ("model", pa.string()),  # fingerprint of the stage whose model wrote the answers; null where nobody knows
        ("sampling", pa.string()),  # how they were drawn, as JSON; null where nobody knows
    ]
)


class Prompt(NamedTuple):
    """Turns that an assistant is to answer; `id` is their hash."""

    id: str
    messages: list[Message]


def run(stage: StageRun) -> Outcome:
    """Choose prompts, have each answered several times, rank the answers."""
    found = _choose(stage)
    _refuse_none(found)
    answers = stage.folder.path / "answers"
    _answer_all(found.prompts, answers, stage)
    with stage.folder.artefact("rankings") as target:
        tally = _judge_all(answers, target, stage)
    remove(answers)
    return _outcome(found, tally, stage)


# Prompts


class Found(NamedTuple):
    """Prompts chosen from a set of conversations. `different`: how many there were to choose from. `too_long`: how
    many were passed over because they leave no room for an answer."""

    prompts: list[Prompt]
    different: int
    too_long: int


def _choose(stage: StageRun) -> Found:
    """The prompts, chosen in a task: the conversations don't pass through the driver."""
    import ray

    settings = stage.recipe.rank
    choose = ray.remote(num_cpus=settings.cpus_per_actor)(choose_prompts)
    return ray.get(choose.remote(stage.input("sft"), "train", settings, stage.recipe.seed))


def choose_prompts(sft: Path, name: str, settings: AnswerSettings, seed: int, without: Path | None = None) -> Found:
    """`settings.prompts` different prompts, drawn by `seed` from the small talk of the set `name` of the stage `sft`,
    and none that the conversations of the file `without` begin with."""
    known = {prompt.id for prompt in _small_talk(without)} if without else set()
    path = sft / "conversations" / f"{name}.parquet"
    spoken = {prompt.id: prompt for prompt in _small_talk(path) if prompt.id not in known}
    model = mirror.here(sft / "model")
    tokenizer, longest = load_tokenizer(model), _context(model) - settings.max_new_tokens
    chosen: list[Prompt] = []
    too_long = 0
    for prompt_id in sorted(spoken, key=lambda prompt_id: canonical_hash([seed, prompt_id])):
        if len(chosen) == settings.prompts:
            break
        if len(render_turns(tokenizer, spoken[prompt_id].messages)) <= longest:
            chosen.append(spoken[prompt_id])
        else:
            too_long += 1
    return Found(chosen, len(spoken), too_long)


def _small_talk(path: Path) -> Iterator[Prompt]:
    for conversation in conversations.load(path):
        if conversation.task is None:
            messages = conversations.first_prompt(conversation.messages)
            yield Prompt(canonical_hash(messages)[:32], messages)


def _context(model: Path) -> int:
    return context_of(read_config(model))


def _refuse_none(found: Found) -> None:
    if len(found.prompts) < 2:
        what = f"sft's training conversations hold {found.different} small-talk prompts that can be answered"
        more = f" ({found.too_long} are too long for the model's context)" if found.too_long else ""
        raise BadInput(Problem(what + more, "add a source of conversations that are no tasks to the sft stage"))


# Answers, on the cluster


def answers_to(
    engine: Engine, prompts: Sequence[Prompt], settings: AnswerSettings, seed: int
) -> list[list[Completion]]:
    """`settings.answers` answers to each prompt. Each is drawn with a seed of its own, from `seed`, prompt and number,
    so it doesn't depend on which prompts are answered beside it."""
    each = settings.answers
    ids = [render_turns(engine.tokenizer, prompt.messages) for prompt in prompts for _ in range(each)]
    params = [_sampling(settings, prompt, number, seed) for prompt in prompts for number in range(each)]
    written = engine.generate(ids, params)
    return [written[start : start + each] for start in range(0, len(written), each)]


def _sampling(settings: AnswerSettings, prompt: Prompt, number: int, seed: int) -> SamplingParams:
    own_seed = int(canonical_hash([seed, prompt.id, number])[:15], 16)
    return SamplingParams(max_new_tokens=settings.max_new_tokens, temperature=settings.temperature, seed=own_seed)


class _Answerer:
    """An actor's work: an engine over the chat model, which answers one part of the prompts after another."""

    def __init__(self, model: Path, folder: Path, settings: RankSettings, seed: int):
        import torch

        from llm.loading import load

        torch.set_num_threads(max(1, int(settings.cpus_per_actor)))
        self._engine = load(mirror.here(model), slots=settings.slots)
        self._folder, self._settings, self._seed = folder, settings, seed

    def __call__(self, item: dict[str, Any]) -> dict[str, Any]:
        prompts = [Prompt(*one) for one in json.loads(item["prompts"])]
        answered = answers_to(self._engine, prompts, self._settings, self._seed)
        rows = [
            {
                "id": prompt.id,
                "prompt": json.dumps(prompt.messages, ensure_ascii=False),
                "answers": [answer.text for answer in answers],
                "finish_reasons": [answer.finish_reason for answer in answers],
            }
            for prompt, answers in zip(prompts, answered, strict=True)
        ]
        path = _part(self._folder, item["number"])
        mirror.make(path.parent)
        unfinished = path.with_name(f".partial-{path.name}")
        pq.write_table(pa.Table.from_pylist(rows, _ANSWERED), unfinished)
        unfinished.replace(path)
        mirror.send(path)
        return {"answered": len(prompts)}


_ANSWERED = pa.schema([SCHEMA.field(name) for name in ("id", "prompt", "answers", "finish_reasons")])


def _answer_all(prompts: list[Prompt], folder: Path, stage: StageRun) -> None:
    """Have every part that isn't there yet written, by actors on the cluster."""
    folder.mkdir(exist_ok=True)
    parts, there = list(enumerate(_parts(prompts))), set(mirror.names(folder))
    missing = [(number, part) for number, part in parts if _part(folder, number).name not in there]
    done = len(prompts) - sum(len(part) for _, part in missing)
    if done:
        stage.log.info("rank: %d of %d prompts were answered before", done, len(prompts))
    with progress("rank", len(prompts), "prompts") as report:
        for answered in _written(missing, folder, stage) if missing else ():
            done += answered
            report(done)
            if stop_is_asked(stage.folder.path):
                raise Stopped(f"rank was asked to stop: {done} of {len(prompts)} prompts are answered and kept")


def _parts(prompts: list[Prompt]) -> Iterator[list[Prompt]]:
    return (prompts[start : start + PROMPTS_PER_PART] for start in range(0, len(prompts), PROMPTS_PER_PART))


def _part(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


def _written(parts: list[tuple[int, list[Prompt]]], folder: Path, stage: StageRun) -> Iterator[int]:
    """How many prompts each part answered, as parts are finished."""
    import ray.data
    import ray.exceptions

    settings = stage.recipe.rank
    items = [{"number": number, "prompts": json.dumps(part)} for number, part in parts]
    work = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _Answerer,
        fn_constructor_args=(stage.input("sft") / "model", folder, settings, stage.recipe.seed),
        compute=ray.data.ActorPoolStrategy(size=min(settings.actors, len(items))),
        num_cpus=settings.cpus_per_actor,
        num_gpus=settings.gpus_per_actor,
    )
    try:
        for row in work.iter_rows():
            yield int(row["answered"])
    except ray.exceptions.RayError as error:
        problem = Problem(f"writing answers failed: {str(error).strip().splitlines()[-1]}", "the same command goes on")
        raise StageFailed(problem) from error


# Rankings


class Tally:
    """What the judge made of the answers."""

    def __init__(self) -> None:
        self.scores: list[float] = []
        self.ties = 0  # rankings whose answers all share a rank: they teach nothing
        self.cut = 0  # answers that reached the token limit
        self.rankings: Counter[str] = Counter()  # by set
        self.preferences: Counter[str] = Counter()  # of people, by set

    def count(self, name: str, scores: list[float], ranking: dict[str, Any]) -> None:
        self.rankings[name] += 1
        self.scores += scores
        self.ties += len(set(ranking["ranks"])) == 1
        self.cut += ranking["finish_reasons"].count("length")

    @property
    def mean(self) -> float:
        return sum(self.scores) / len(self.scores)


def _judge_all(answers: Path, target: Path, stage: StageRun) -> Tally:
    """Rank the answers of every part and write the rankings, a part in memory at a time."""
    tally, settings = Tally(), stage.recipe.rank
    origin = _origin(stage)
    with ExitStack() as files:
        writers = {name: files.enter_context(pq.ParquetWriter(target / f"{name}.parquet", SCHEMA)) for name in SETS}
        for part in (answers / name for name in mirror.names(answers) if name.startswith("part-")):
            rows: dict[str, list[dict[str, Any]]] = {name: [] for name in SETS}
            for answered in pq.read_table(mirror.fetch(part)).to_pylist():
                scores = judged(JUDGES[settings.judge], answered)
                name = "held_out" if is_held_out(answered["id"], settings.held_out) else "train"
                rows[name].append({**answered, "ranks": rank(scores), **origin})
                tally.count(name, scores, rows[name][-1])
            for name, writer in writers.items():
                writer.write_table(pa.Table.from_pylist(rows[name], SCHEMA))
        for source in settings.preferences:
            for row in _preferences(source, mirror.here(stage.input("sft") / "model")):
                name = "held_out" if is_held_out(row["id"], settings.held_out) else "train"
                writers[name].write_table(pa.Table.from_pylist([{**row, "prompt": json.dumps(row["prompt"])}], SCHEMA))
                tally.preferences[name] += 1
    _refuse_empty(tally)
    return tally


def _preferences(source: PreferenceSource, model: Path) -> Iterator[dict[str, Any]]:
    """The preferences of a source as rankings, but those too long for the model. BadInput names every bad row."""
    tokenizer, longest, faults, taken = load_tokenizer(model), _context(model), [], 0
    for file in conversations.files_of(source):
        for number, row in conversations.rows_of(file.path):
            if taken == source.max_preferences:
                break
            try:
                [ranking] = from_preferences([row], f"preferences:{source.name}")
            except ValueError as error:
                faults.append(Fault(file.path, number, str(error).partition(": ")[2]))
                continue
            if max(map(len, (_spoken(tokenizer, ranking, answer) for answer in ranking["answers"]))) <= longest:
                taken += 1
                yield ranking
    if faults:
        raise BadInput(*conversations.told(source, faults))


def _spoken(tokenizer, ranking: dict[str, Any], answer: str) -> list[int]:
    return render_conversation(tokenizer, [*ranking["prompt"], conversations.message("assistant", answer)])[0]


def judged(judge: Judge, row: dict[str, Any]) -> list[float]:
    """The judge's score of each answer of a row."""
    return [judge.score(*one) for one in zip(row["answers"], row["finish_reasons"], strict=True)]


def _origin(stage: StageRun) -> dict[str, Any]:
    """What all of the stage's rankings share: who ranked, which model wrote, how it was sampled."""
    settings = stage.recipe.rank
    sampling = {
        "temperature": settings.temperature,
        "max_new_tokens": settings.max_new_tokens,
        "seed": stage.recipe.seed,
    }
    model = (stage.run.stage("sft").done() or {})["fingerprint"]
    return {"annotator": f"scripted:{settings.judge}", "model": model, "sampling": json.dumps(sampling)}


def _refuse_empty(tally: Tally) -> None:
    for name in SETS:
        if not tally.rankings[name]:
            what = f"no prompt fell into the {name} set of rankings (prompts: {dict(tally.rankings)})"
            raise StageFailed(Problem(what, "raise rank.prompts or rank.held_out"))


def read_rankings(path: Path) -> Iterator[dict[str, Any]]:
    """The rankings of a file, each as a row of `SCHEMA` whose prompt is a list of messages."""
    with pq.ParquetFile(mirror.here(path)) as file:
        for batch in file.iter_batches(batch_size=1024):
            for row in batch.to_pylist():
                yield {**row, "prompt": json.loads(row["prompt"])}


# Preferences: pairs of answers, as TRL's datasets have them


def to_preferences(ranking: dict[str, Any]) -> Iterator[dict[str, list[Message]]]:
    """Every pair of answers of which one ranks above the other, in TRL's conversational preference format."""
    ranked = list(zip(ranking["ranks"], ranking["answers"], strict=True))
    for (rank_a, a), (rank_b, b) in itertools.combinations(ranked, 2):
        if rank_a != rank_b:
            chosen, rejected = (a, b) if rank_a < rank_b else (b, a)
            yield {
                "prompt": ranking["prompt"],
                "chosen": [conversations.message("assistant", chosen)],
                "rejected": [conversations.message("assistant", rejected)],
            }


def from_preferences(rows: Iterable[dict[str, Any]], annotator: str) -> Iterator[dict[str, Any]]:
    """A ranking of two answers for each preference of a TRL dataset, in its conversational or its standard format,
    with `prompt` or with the prompt at the head of both answers. ValueError names the first row that is neither."""
    for number, row in enumerate(rows, start=1):
        try:
            prompt, chosen, rejected = _preference(row)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from None
        yield {
            "id": canonical_hash(prompt)[:32],
            "prompt": prompt,
            "answers": [chosen, rejected],
            "finish_reasons": [None, None],
            "ranks": [1, 2],
            "annotator": annotator,
            "model": None,
            "sampling": None,
        }


def _preference(row: dict[str, Any]) -> tuple[list[Message], str, str]:
    """Prompt, chosen and rejected answer of one row."""
    if not isinstance(row, dict):
        raise ValueError(f"not a JSON object: {row!s:.80}")
    chosen, rejected = _turns(row, "chosen", "assistant"), _turns(row, "rejected", "assistant")
    if row.get("prompt") is not None:
        prompt = _turns(row, "prompt", "user")
        # Some datasets repeat the prompt in the answers.
        chosen, rejected = (turns[len(prompt) :] if turns[:-1] == prompt else turns for turns in (chosen, rejected))
    else:
        prompt, chosen, rejected = chosen[:-1], chosen[-1:], rejected[-1:] if rejected[:-1] == chosen[:-1] else []
    if not prompt or [turn["role"] for turn in (*chosen, *rejected)] != ["assistant", "assistant"]:
        raise ValueError("chosen and rejected must be one answer each to the same prompt")
    return prompt, chosen[0]["content"], rejected[0]["content"]


def _turns(row: dict[str, Any], column: str, role: str) -> list[Message]:
    value = row.get(column)
    turns = [conversations.message(role, value)] if isinstance(value, str) else value
    try:
        check_messages(turns or [])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{column}: {error}") from None
    return [conversations.message(turn["role"], turn["content"]) for turn in turns or []]


# How the driver sees it


def _outcome(found: Found, tally: Tally, stage: StageRun) -> Outcome:
    settings = stage.recipe.rank
    train, held_out = (tally.rankings[name] for name in SETS)
    rankings = train + held_out
    return Outcome(
        read=f"{rankings:,} of {found.different:,} prompts",
        wrote=f"{train:,} rankings of {settings.answers} answers, {held_out:,} held out",
        figure=f"{settings.judge} {tally.mean:+.3f} on average, {tally.ties / rankings:.0%} of the rankings all ties",
        metrics={
            "prompts": rankings,
            "prompts_to_choose_from": found.different,
            "prompts_too_long": found.too_long,
            "rankings": dict(tally.rankings),
            "preferences": dict(tally.preferences),
            "answers": len(tally.scores),
            "cut_off": tally.cut,
            "all_tied": tally.ties,
            "judge": settings.judge,
            "rule": JUDGES[settings.judge].rule,
            "mean_score": tally.mean,
        },
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    settings = recipe.rank
    return {"seed": recipe.seed, **settings.identity(), "rule": JUDGES[settings.judge].rule}


def _sources(recipe: Recipe, verify: bool) -> dict[str, str]:
    return {source.name: conversations.files_fingerprint(source, verify) for source in recipe.rank.preferences}


def _check(recipe: Recipe) -> list[Problem]:
    return conversations.problems_of(recipe.rank.preferences, "rank.preferences")


def _demand(recipe: Recipe) -> Demand:
    settings = recipe.rank
    names = "rank.actors, rank.cpus_per_actor or rank.gpus_per_actor"
    return Demand(
        (Piece("actor", names, settings.cpus_per_actor, settings.gpus_per_actor, settings.actors),),
        disk_bytes=2 * settings.prompts * settings.answers * ANSWER_BYTES,
    )


STAGE = Stage(
    name="rank",
    version=1,
    needs=("sft",),
    artefacts=("rankings",),
    identity=_identity,
    demand=_demand,
    run=run,
    check=_check,
    sources=_sources,
)
