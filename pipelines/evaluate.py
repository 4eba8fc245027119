"""`evaluate`: base, chat and policy models side by side, on what none of them was trained on.

reads   pretrain/model, sft/model, rlhf/model     the three
        shards/tokens/held_out                    text, for bits a byte
        sft/conversations/held_out.parquet        small talk, for the judge and the reward model; tasks
        reward/model                              the learned reward
writes  results/results.json

All three are asked in the same words, through the same chat template, with the same seeds.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster import mirror
from cluster.errors import BadInput, Problem
from cluster.preflight import Piece
from cluster.progress import console, progress
from cluster.runs import canonical_hash
from llm.chat import render_turns
from llm.files import write_json
from llm.sampling import SamplingParams
from llm.vocabulary import fingerprint, load_tokenizer, token_bytes
from pipelines import conversations
from pipelines.alignment import EvaluateSettings
from pipelines.conversations import Message, Task
from pipelines.judges import JUDGES, score_task
from pipelines.rank import Prompt, answers_to, choose_prompts
from pipelines.recipe import Recipe
from pipelines.stage import Demand, Outcome, Stage, StageRun

if TYPE_CHECKING:
    from rich.table import Table

    from llm.engine import Engine

MODELS = {"base": "pretrain", "chat": "sft", "policy": "rlhf"}  # and the stages that left them
ROWS_AT_ONCE = 8
TALK_SHOWN, TASKS_SHOWN = 2, 1


@dataclass(frozen=True)
class Questions:
    """What every model is asked."""

    prompts: list[Prompt]
    tasks: list[tuple[list[Message], Task]]


def run(stage: StageRun) -> Outcome:
    """Ask the three models the same, and set down what each says and scores."""
    questions = _questions(stage)
    with stage.folder.artefact("results") as target:
        results = {**_said(stage, questions), "models": _measure_all(stage, questions)}
        write_json(target / "results.json", results)
    console.print(table(results))
    return _outcome(results)


def show(results: dict[str, Any], as_json: bool) -> None:
    """Print what `results.json` holds: a table with samples for people, or the JSON itself."""
    from rich.console import Console

    if as_json:
        json.dump(results, sys.stdout, indent=1)
        print()
    else:
        Console().print(table(results))


# Questions


def _questions(stage: StageRun) -> Questions:
    """Chosen in a task: the conversations don't pass through the driver."""
    import ray

    settings = stage.recipe.evaluate
    choose = ray.remote(num_cpus=settings.cpus_per_task)(choose_questions)
    return ray.get(choose.remote(stage.input("sft"), settings, stage.recipe.seed))


def choose_questions(sft: Path, settings: EvaluateSettings, seed: int) -> Questions:
    """Held-out prompts that no training conversation begins with, and held-out tasks, both drawn by `seed`."""
    found = choose_prompts(sft, "held_out", settings, seed, without=sft / "conversations" / "train.parquet")
    if not found.prompts:
        remedy = "hold out more conversations, or add a source of small talk to the sft stage"
        raise BadInput(Problem("no held-out conversation begins with a prompt of its own", remedy))
    return Questions(found.prompts, list(_tasks(sft, settings.tasks, seed)))


def _tasks(sft: Path, count: int, seed: int) -> Iterator[tuple[list[Message], Task]]:
    held_out = conversations.load(sft / "conversations" / "held_out.parquet")
    tasks = sorted((one for one in held_out if one.task), key=lambda one: canonical_hash([seed, one.id]))
    for one in tasks[:count]:
        assert one.task is not None
        yield conversations.first_prompt(one.messages), one.task


def _said(stage: StageRun, questions: Questions) -> dict[str, Any]:
    """What was asked and how, beside the figures."""
    settings, judge = stage.recipe.evaluate, stage.recipe.rank.judge
    return {
        "judge": judge,
        "rule": JUDGES[judge].rule,
        "prompts": len(questions.prompts),
        "answers": settings.answers,
        "tasks": len(questions.tasks),
    }


# Measuring, a task for each model


def _measure_all(stage: StageRun, questions: Questions) -> dict[str, Any]:
    """The figures of each model by name."""
    import ray

    settings = stage.recipe.evaluate
    remote = ray.remote(num_cpus=settings.cpus_per_task, num_gpus=settings.gpus_per_task)(measure)
    same = {
        "tokens": stage.input("shards") / "tokens",
        "reward": stage.input("reward") / "model",
        "questions": questions,
        "settings": settings,
        "judge": stage.recipe.rank.judge,
        "seed": stage.recipe.seed,
        "isolated": stage.recipe.pretrain.isolate,
    }
    waiting = {remote.remote(stage.input(made_by) / "model", **same): name for name, made_by in MODELS.items()}
    measured: dict[str, Any] = {}
    with progress("evaluate", len(MODELS), "models") as report:
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            name = waiting.pop(done)
            measured[name] = ray.get(done)
            report(len(measured), name)
    return {name: measured[name] for name in MODELS}


def measure(
    model: Path,
    *,
    tokens: Path,
    reward: Path,
    questions: Questions,
    settings: EvaluateSettings,
    judge: str,
    seed: int,
    isolated: bool,
) -> dict[str, Any]:
    """Runs in a Ray task: all figures of one model, and samples of what it says."""
    import torch

    from llm.loading import load

    torch.set_num_threads(max(1, int(settings.cpus_per_task)))
    model, tokens, reward = (mirror.here(folder) for folder in (model, tokens, reward))
    manifest = json.loads((tokens / "manifest.json").read_text())
    _same_tokenizer(model, manifest)
    engine = load(model, slots=settings.slots)
    answers = answers_to(engine, questions.prompts, settings, seed)
    solutions = _solve(engine, questions, settings)
    talk = [[answer.text for answer in each] for each in answers]
    return {
        "bits_per_byte": bits_per_byte(
            engine, tokens / "held_out", manifest["pad_id"], settings.held_out_rows, isolated
        ),
        "judge": _mean([[JUDGES[judge].score(a.text, a.finish_reason or "") for a in each] for each in answers]),
        "reward": _mean(_rewards(reward, questions.prompts, talk)),
        "tasks_right": _share_right(solutions, questions),
        "samples": _samples(questions, talk, solutions),
    }


def _same_tokenizer(model: Path, manifest: dict[str, Any]) -> None:
    found, expected = fingerprint(load_tokenizer(model)), manifest["tokenizer_fingerprint"]
    if found != expected:
        what = f"{model} has tokenizer {found[:12]}, the run's shards were made with {expected[:12]}"
        raise BadInput(Problem(what, "run the stage that made the model again"))


def bits_per_byte(engine: Engine, held_out: Path, pad_id: int, rows: int, isolated: bool = True) -> float:
    """What the model's predictions of `rows` held-out rows, spread evenly, cost in bits a byte of their text.

    isolated: whether the documents of a row are hidden from one another, as they were when the model was trained.
    """
    import torch

    from llm.losses import next_token_nats
    from llm.order import spread
    from llm.packing import IGNORED, RowReader

    reader, nats, size = RowReader(held_out, pad_id, isolated), 0.0, 0
    lengths = token_bytes(engine.tokenizer)
    ids = spread(rows, reader.index.num_rows)
    for start in range(0, len(ids), ROWS_AT_ONCE):
        columns = reader.read(ids[start : start + ROWS_AT_ONCE])
        batch = {name: torch.from_numpy(values).long().to(engine.model.device) for name, values in columns.items()}
        with torch.inference_mode():  # no cache and no mask: positions that begin at 0 part the pieces
            logits = engine.model(batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
        nats += float(next_token_nats(logits, batch["labels"]))
        targets = columns["labels"][:, 1:]
        size += int(lengths[targets[targets != IGNORED]].sum())
    return nats / math.log(2) / size


def _solve(engine: Engine, questions: Questions, settings: EvaluateSettings) -> list[str]:
    """The model's likeliest answer to each task."""
    params = SamplingParams(max_new_tokens=settings.max_new_tokens, temperature=0)
    prompts = [render_turns(engine.tokenizer, messages) for messages, _ in questions.tasks]
    return [answer.text for answer in engine.generate(prompts, params)]


def _share_right(solutions: list[str], questions: Questions) -> float | None:
    """Share of the tasks that are solved; None if there are none."""
    right = [score_task(text, task) for text, (_, task) in zip(solutions, questions.tasks, strict=True)]
    return sum(right) / len(right) if right else None


def _rewards(reward: Path, prompts: list[Prompt], talk: list[list[str]]) -> list[list[float]]:
    """The learned reward of each answer, by prompt."""
    from pipelines.reward import score

    asked = [
        [*prompt.messages, conversations.message("assistant", text)]
        for prompt, texts in zip(prompts, talk, strict=True)
        for text in texts
    ]
    scores, each = score(reward, asked), len(talk[0])
    return [scores[start : start + each] for start in range(0, len(scores), each)]


def _mean(scores: list[list[float]]) -> dict[str, float]:
    """Mean over all answers, and its standard error over prompts: the answers to one prompt aren't independent."""
    means = [sum(each) / len(each) for each in scores]
    mean = sum(means) / len(means)
    variance = sum((one - mean) ** 2 for one in means) / max(1, len(means) - 1)
    return {"mean": mean, "error": math.sqrt(variance / len(means))}


def _samples(questions: Questions, talk: list[list[str]], solutions: list[str]) -> list[dict[str, str]]:
    """The first questions, with the model's first answer to each."""
    said = [(prompt.messages, texts[0]) for prompt, texts in zip(questions.prompts, talk, strict=True)]
    solved = [(messages, text) for (messages, _), text in zip(questions.tasks, solutions, strict=True)]
    shown = [*said[:TALK_SHOWN], *solved[:TASKS_SHOWN]]
    return [{"prompt": messages[-1]["content"], "answer": text} for messages, text in shown]


# What is said at the end


def table(results: dict[str, Any]) -> Table:
    """Measures by model, then what each said."""
    from rich.table import Table

    models = results["models"]
    grid = Table("held out", *models, caption=results["rule"], caption_justify="left")
    grid.add_row("bits a byte", *(f"{figures['bits_per_byte']:.3f}" for figures in models.values()))
    for key, label in (("judge", f"judge {results['judge']}"), ("reward", "learned reward")):
        grid.add_row(
            label, *(f"{figures[key]['mean']:+.2f} ± {figures[key]['error']:.2f}" for figures in models.values())
        )
    grid.add_row("tasks right", *(_percent(figures["tasks_right"]) for figures in models.values()), end_section=True)
    for number, sample in enumerate(models["base"]["samples"]):
        said = (figures["samples"][number]["answer"] for figures in models.values())
        grid.add_row(_in_a_cell(sample["prompt"]), *map(_in_a_cell, said))
    return grid


def _in_a_cell(text: str) -> str:
    """Without line ends, and without control characters that a terminal would obey."""
    from rich.markup import escape

    printable = "".join(letter if letter.isprintable() else " " for letter in text)
    return escape(" ".join(printable.split()))


def _percent(share: float | None) -> str:
    return "none asked" if share is None else f"{share:.0%}"


def _outcome(results: dict[str, Any]) -> Outcome:
    chat, policy = results["models"]["chat"], results["models"]["policy"]
    judge = f"judge {chat['judge']['mean']:.2f} -> {policy['judge']['mean']:.2f}"
    tasks = f"tasks {_percent(chat['tasks_right'])} -> {_percent(policy['tasks_right'])}"
    return Outcome(
        read=f"{results['prompts']} prompts, {results['tasks']} tasks",
        wrote=f"figures of {len(MODELS)} models",
        figure=f"{judge}, {tasks}",
        metrics=results,
    )


# How the driver sees it


def _identity(recipe: Recipe) -> dict[str, Any]:
    judge = recipe.rank.judge
    rows = {} if recipe.pretrain.isolate else {"isolate": False}
    return {"seed": recipe.seed, "judge": judge, "rule": JUDGES[judge].rule, **rows, **recipe.evaluate.identity()}


def _demand(recipe: Recipe) -> Demand:
    settings, names = recipe.evaluate, "evaluate.cpus_per_task or evaluate.gpus_per_task"
    return Demand((Piece("task", names, settings.cpus_per_task, settings.gpus_per_task),))


STAGE = Stage(
    name="evaluate",
    version=1,
    needs=("shards", "pretrain", "sft", "reward", "rlhf"),
    artefacts=("results",),
    identity=_identity,
    demand=_demand,
    run=run,
)
