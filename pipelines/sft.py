"""Stage 5: demonstrations to a chat model. Loss falls on what the assistant says, and on nothing else."""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import mirror
from cluster.errors import Problem, StageFailed
from llm.chat import render_conversation
from llm.files import write_json
from llm.packing import IGNORED, pack_whole
from llm.parts import Share, read_model
from llm.vocabulary import fingerprint, load_tokenizer
from pipelines import checkpoints, conversations, records, training, worker
from pipelines.alignment import ConversationSource
from pipelines.pretrain import next_token_objective
from pipelines.recipe import Recipe
from pipelines.stage import Outcome, Stage, StageRun
from pipelines.stream import HeldOutRows, RowStream
from pipelines.token_rows import Piece, write_rows

SETS = ("train", "held_out")


def run(stage: StageRun) -> Outcome:
    """Gather the demonstrations, render them into rows, and train the base model on them."""
    _prepare(stage)
    manifest = json.loads((mirror.here(stage.folder.path / "tokens") / "manifest.json").read_text())
    training.train(_job(stage, manifest), "sft", stage.record)
    checkpoints.export(stage.folder.path)
    return _outcome(stage, manifest)


def _prepare(stage: StageRun) -> None:
    """Conversations and rows, unless an earlier attempt left them whole."""
    import ray

    folder, recipe = stage.folder.path, stage.recipe
    cpus = recipe.sft.data_cpus
    if not stage.folder.has("conversations"):
        with stage.folder.artefact("conversations") as target:
            ray.get(ray.remote(num_cpus=cpus)(_gather).remote(recipe.sft.sources, target, recipe.sft.held_out))
    if not stage.folder.has("tokens"):
        tokenizer, length = stage.input("tokenizer") / "tokenizer", recipe.shards.sequence_length
        with stage.folder.artefact("tokens") as target:
            ray.get(ray.remote(num_cpus=cpus)(_render).remote(folder / "conversations", tokenizer, length, target))


def _gather(sources: tuple[ConversationSource, ...], target: Path, held_out: float) -> None:
    found = (item for source in sources for item in conversations.read(source))
    with mirror.filling(target):
        counts = conversations.write(found, target, held_out)
        write_json(target / "counts.json", counts._asdict())


def _render(folder: Path, tokenizer_folder: Path, row_tokens: int, target: Path) -> None:
    tokenizer = load_tokenizer(mirror.here(tokenizer_folder))
    manifest: dict[str, Any] = {
        "tokenizer_fingerprint": fingerprint(tokenizer),
        "pad_id": tokenizer.pad_token_id,
        "sequence_length": row_tokens,
    }
    with mirror.filling(target):
        for name in SETS:
            manifest[name] = _render_set(folder / f"{name}.parquet", tokenizer, row_tokens, target / name)
        write_json(target / "manifest.json", manifest)


def _render_set(path: Path, tokenizer, row_tokens: int, target: Path) -> dict[str, int]:
    counts: Counter = Counter()
    pieces = []
    for conversation in conversations.load(path):
        piece = _piece(tokenizer, conversation)
        counts["conversations"] += 1
        if len(piece.ids) > row_tokens:
            counts["too_long"] += 1
        else:
            pieces.append(piece)
    if not pieces:
        raise StageFailed(Problem(f"no conversation of {path} fits a row of {row_tokens} tokens", "lengthen the rows"))
    answered = np.array([sum(label != IGNORED for label in piece.labels) for piece in pieces], dtype=np.int64)
    index = write_rows(target, pieces, len(tokenizer), lambda lengths: pack_whole(lengths, answered, row_tokens))
    tokens = int(index.length.sum())
    return {**counts, "rows": index.num_rows, "tokens": tokens, "loss_tokens": int(answered.sum())}


def _piece(tokenizer, conversation: conversations.Conversation) -> Piece:
    ids, mask = render_conversation(tokenizer, conversation.messages)
    labels = [token if said else IGNORED for token, said in zip(ids, mask, strict=True)]
    return Piece(conversation.id, ids, labels)


def _job(stage: StageRun, manifest: dict[str, Any]) -> worker.Job:
    settings, tokens = stage.recipe.sft, stage.folder.path / "tokens"
    rows = min(settings.held_out_rows, manifest["held_out"]["rows"])
    train = RowStream.of(tokens / "train", manifest["pad_id"], settings, stage.recipe.seed)
    held_out = HeldOutRows.of_set(rows, tokens / "held_out", manifest["pad_id"], settings)
    return worker.Job(
        folder=stage.folder.path,
        settings=settings,
        build=partial(build, stage.input("pretrain") / "model"),
        objective=next_token_objective,
        tokenizer=stage.input("tokenizer") / "tokenizer",
        stream=train,
        held_out=held_out,
        facts={"tokenizer_fingerprint": manifest["tokenizer_fingerprint"], "held_out_targets": held_out.targets()},
    )


def build(base: Path, saved: Path | None, share: Share | None = None) -> torch.nn.Module:
    """The model in `base`, or as it was saved; shared out a module at a time where `share` says how."""
    return read_model(saved or mirror.here(base), share)


def _outcome(stage: StageRun, manifest: dict[str, Any]) -> Outcome:
    steps = records.read_lines(stage.folder.path / "metrics.jsonl")
    held_out = records.read_lines(stage.folder.path / "held_out.jsonl")[-1]["held_out_loss"]
    train = manifest["train"]
    epochs = len(steps) * stage.recipe.sft.global_batch / train["rows"]
    return Outcome(
        read=f"{train['conversations']:,} conversations ({epochs:.2f} epochs)",
        wrote="chat model",
        figure=f"held-out loss {held_out:.3f} nats on the assistant's tokens",
        metrics={
            "steps": len(steps),
            "epochs": epochs,
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "held_out_loss": held_out,
            **{name: manifest[name] for name in SETS},
        },
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.seed, "sequence_length": recipe.shards.sequence_length, **recipe.sft.identity()}


def _sources(recipe: Recipe, verify: bool) -> dict[str, str]:
    return {source.name: conversations.fingerprint(source, verify) for source in recipe.sft.sources}


def _check(recipe: Recipe) -> list[Problem]:
    problems = conversations.problems_of(recipe.sft.sources, "sft.sources")
    problems += training.cutting_problems(recipe, "sft")
    if recipe.pretrain.objective == "masked":
        what = "sft can't begin with a model that was pretrained on masked words alone"
        problems.append(Problem(what, "set pretrain.objective to causal or mixed, or stop with --to pretrain"))
    return problems


STAGE = Stage(
    name="sft",
    version=1,
    needs=("tokenizer", "pretrain"),
    artefacts=("conversations", "model"),
    identity=_identity,
    sources=_sources,
    check=_check,
    demand=lambda recipe: training.demand("sft", recipe),
    run=run,
)
