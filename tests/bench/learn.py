"""Whether pretraining learns as it should: python -m tests.bench.learn [FIGURE ...], or `make bench-learn`.

    learning   1.005 times the plain loop's held-out bits a byte over ours: 1 is half a per cent worse than the loop
    masked     held-out accuracy of filling in hidden words, over that of always saying the commonest token

Both train L4-256 (4 layers, 256 wide, 4,096 tokens of vocabulary, rows of 256) on 1,300 steps of 8 rows, 2.66 M
tokens, with a cosine schedule, in bf16 or in what HEADWATER_BENCH_DTYPE says. `learning` is the median over three
seeds (`--pairs` if that is fewer), each with one training of ours (`headwater run`: best-fit packing, the documents
of a row hidden from one another) and one of the plain loop (`loop`: documents end to end, cut into rows, in an
order of its own). The same weights are drawn for both. Whoever trained it, Hugging Face loads the model from its
folder and one evaluator scores it: whole held-out documents, each by itself, all tokens but the first, in windows
of the context.

reads   what HEADWATER_BENCH_DATA names (`texts`)
writes  runs/bench/learn.json, and one line a figure: BENCH name value [low, high] bar B met

Six trainings and one more on two CPUs; ends with an error only where a comparison is invalid.
"""

from __future__ import annotations

import math
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

from cluster.runs import Run
from llm.packing import IGNORED
from llm.presets import build_model
from llm.shardfile import Shards
from llm.vocabulary import load_tokenizer, token_bytes
from tests.bench import command, processes
from tests.bench.command import Scale
from tests.bench.measure import FOLDER, Figure, Invalid
from tests.bench.workload import L4_256, WORK, Model, Plan, drive, prepared, recipe_of, recipe_settings

DTYPE = os.environ.get("HEADWATER_BENCH_DTYPE", "bf16")
STEPS, WARM_UP_SHARE, PEAK = 1_300, 0.08, 2e-3
SEEDS = (11, 12, 13)
HELD_OUT_ROWS = 512  # that fill in words
WORSE = 1.005  # how many times the peer's bits a byte ours may be
ABOVE_UNIGRAM = 2.0
WINDOWS_AT_ONCE = 32


def main(arguments: list[str]) -> int:
    return command.run("tests.bench.learn", FIGURES, arguments, FOLDER / "learn.json")


# The figures


def learning(scale: Scale) -> list[Figure]:
    pairs = [_pair(seed, _steps(scale)) for seed in SEEDS[: scale.pairs]]
    return [compared(f"learning_{L4_256.name}", pairs, _told(_steps(scale)))]


def masked(scale: Scale) -> list[Figure]:
    steps = _steps(scale)
    run = _pretrained(SEEDS[0], steps, objective="masked", held_out_rows=HELD_OUT_ROWS)
    found = (Run(run).stage("pretrain").done() or {})["metrics"]
    value = found["masked_accuracy"] / found["unigram_masked_accuracy"]
    names = ("masked_accuracy", "unigram_masked_accuracy", "masked_loss", "unigram_masked_loss", "masked_targets")
    detail = {**{name: found[name] for name in names}, **_told(steps)}
    return [Figure("masked_accuracy", value, value, value, ABOVE_UNIGRAM, detail)]


FIGURES: dict[str, command.Measure] = {"learning": learning, "masked": masked}


class Pair(NamedTuple):
    """Held-out bits a byte of the two models of a seed."""

    seed: int
    ours: float
    theirs: float


def compared(name: str, pairs: list[Pair], told: dict[str, Any]) -> Figure:
    """The median of the seeds' ratios, the lowest and the highest. Raises Invalid where a model learnt nothing."""
    if not all(math.isfinite(bits) for pair in pairs for bits in pair[1:]):
        raise Invalid(f"bits a byte that are no numbers: {pairs}")
    ratios = [WORSE * pair.theirs / pair.ours for pair in pairs]
    by_seed = {str(pair.seed): {"our_bits_per_byte": pair.ours, "their_bits_per_byte": pair.theirs} for pair in pairs}
    return Figure(name, median(ratios), min(ratios), max(ratios), 1.0, {**told, "by_seed": by_seed})


def _pair(seed: int, steps: int) -> Pair:
    run = _pretrained(seed, steps)
    theirs = _plainly(seed, steps)
    documents = [ids.astype(np.int64) for ids in held_out_documents(run / "shards" / "tokens" / "held_out")]
    return Pair(seed, bits_per_byte(run / "pretrain" / "model", documents), bits_per_byte(theirs, documents))


def _steps(scale: Scale) -> int:
    return max(4, scale.of(STEPS))


def _told(steps: int) -> dict[str, Any]:
    return {"dtype": DTYPE, "steps": steps, "tokens_a_training": steps * L4_256.tokens}


# The arms


def plan_of(steps: int) -> Plan:
    return Plan(L4_256, workers=1, threads=2, steps=steps, zero_stage=1, dtype=DTYPE)


def settings_of(seed: int, steps: int, **pretrain: Any) -> dict[str, Any]:
    """Of the recipe, for a training."""
    schedule = {"decay": "cosine", "warmup_steps": int(steps * WARM_UP_SHARE), "learning_rate": PEAK}
    return {**recipe_settings(L4_256, **{**plan_of(steps).settings(), **schedule, **pretrain}), "seed": seed}


def _pretrained(seed: int, steps: int, **pretrain: Any) -> Path:
    """The run, with the model that `headwater run` has trained."""
    run = prepared(L4_256)
    shutil.rmtree(run / "pretrain", ignore_errors=True)
    words = drive(L4_256, run, "pretrain", "pretrain", settings_of(seed, steps, **pretrain))
    processes.followed(words, WORK / "ours.log", run / "pretrain" / "metrics.jsonl", every_s=1.0)
    return run


def _plainly(seed: int, steps: int) -> Path:
    """The folder of the model that the loop has trained."""
    folder = WORK / f"{L4_256.name}-plain"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    run, recipe = prepared(L4_256), recipe_of(settings_of(seed, steps), L4_256.shape)
    tokenizer = load_tokenizer(run / "tokenizer" / "tokenizer")
    build_model(recipe.model.shape.config(tokenizer), seed).save_pretrained(folder / "model")
    train = run / "shards" / "tokens" / "train"
    np.savez(folder / "rows.npz", **plain_rows(train, L4_256, steps, seed))  # type: ignore[arg-type]
    processes.answer(processes.python("tests.bench.loop", _order(folder, recipe, steps)))
    tokenizer.save_pretrained(folder / "trained")
    return folder / "trained"


def _order(folder: Path, recipe: Any, steps: int) -> dict[str, Any]:
    settings = recipe.pretrain
    names = ("weight_decay", "beta1", "beta2", "clip_norm", "learning_rate", "global_batch", "threads", "dtype")
    return {
        **{name: getattr(settings, name) for name in names},
        "rates": [settings.rate(step) for step in range(steps)],
        "rows": folder / "rows.npz",
        "model": folder / "model",
        "keep": folder / "trained",
        "steps": steps,
        "save_every": None,
    }


def plain_rows(train: Path, model: Model, steps: int, seed: int) -> dict[str, np.ndarray]:
    """Documents end to end, cut into rows, shuffled anew for each epoch: what one writes without a framework.

    `input_ids`, `position_ids` and `labels`, each (steps * rows of a batch, T) int32. What fills no row is left out.
    """
    shards, size = Shards(train), model.shape.context
    tokens = shards.flat(int(shards.lengths().sum()))
    rows = tokens[: len(tokens) // size * size].reshape(-1, size).astype(np.int32)
    draw, wanted = np.random.default_rng(seed), steps * model.rows
    order = np.concatenate([draw.permutation(len(rows)) for _ in range(math.ceil(wanted / len(rows)))])[:wanted]
    positions = np.broadcast_to(np.arange(size, dtype=np.int32), (wanted, size))
    return {"input_ids": rows[order], "position_ids": positions, "labels": rows[order]}


# The evaluator


def held_out_documents(folder: Path) -> Iterator[np.ndarray]:
    """Ids of each held-out document, its end included."""
    shards = Shards(folder)
    return (shards.tokens(number, 0, int(length)) for number, length in enumerate(shards.lengths()))


def bits_per_byte(folder: Path, documents: list[np.ndarray]) -> float:
    """Bits a byte of `documents`' text that the model in `folder` needs for all tokens but the first of each.

    In fp32, whatever it was trained in. The end of a document is told too, and has no bytes.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    lengths, nats, size = token_bytes(load_tokenizer(folder)), 0.0, 0
    parts = [part for ids in documents for part in windows(ids, model.config.max_position_embeddings)]
    for start in range(0, len(parts), WINDOWS_AT_ONCE):
        ids, labels = _padded(parts[start : start + WINDOWS_AT_ONCE])
        with torch.inference_mode():
            logits = model(input_ids=ids, use_cache=False).logits
        nats += F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum").item()
        told = labels[:, 1:]
        size += int(lengths[told[told != IGNORED].numpy()].sum())
    return nats / math.log(2) / size


def windows(ids: np.ndarray, context: int) -> list[np.ndarray]:
    """Pieces of a document of at most `context` tokens, each beginning with the last token of the one before.

    So each token but the document's first is told once: it isn't the first of its piece.
    """
    return [ids[start : start + context] for start in range(0, len(ids) - 1, context - 1)]


def _padded(parts: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and labels (B, T) int64. Padding stands behind, where no token of a decoder sees it."""
    longest = max(map(len, parts))
    ids, labels = torch.zeros(len(parts), longest, dtype=torch.int64), torch.full((len(parts), longest), IGNORED)
    for row, part in enumerate(parts):
        ids[row, : len(part)] = labels[row, : len(part)] = torch.from_numpy(part)
    return ids, labels


if __name__ == "__main__":
    command.on_few_cpus()
    sys.exit(main(sys.argv[1:]))
