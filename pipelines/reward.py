"""Stage 7: rankings to a reward model, which learns from the rankings alone.

A row of the stream holds all answers to one prompt, so that every pair of a ranking is in one forward pass. A label is
an answer's rank, at the answer's last token.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from cluster import mirror
from cluster.errors import Problem, StageFailed
from llm.chat import render_conversation
from llm.files import write_json
from llm.packing import IGNORED, RowReader, pack_groups
from llm.parts import Share
from llm.preferences import count_pairs, pair_margins, ranking_nats
from llm.vocabulary import fingerprint, load_tokenizer
from pipelines import checkpoints, records, training, worker
from pipelines.recipe import Recipe
from pipelines.stage import Outcome, Stage, StageRun
from pipelines.stream import HeldOutRows, RowStream
from pipelines.token_rows import Piece, write_rows

SETS = ("train", "held_out")
MOST_ANSWERS_AT_ONCE = 64


def run(stage: StageRun) -> Outcome:
    """Render the rankings into rows, train on them, and measure on rankings that were kept out."""
    import ray

    cpus = stage.recipe.reward.data_cpus
    tokens, tokenizer = stage.folder.path / "tokens", stage.input("tokenizer") / "tokenizer"
    if not stage.folder.has("tokens"):
        with stage.folder.artefact("tokens") as target:
            ray.get(ray.remote(num_cpus=cpus)(_render).remote(stage.input("rank") / "rankings", tokenizer, target))
    manifest = json.loads((mirror.here(tokens) / "manifest.json").read_text())
    training.train(_job(stage, manifest), "reward", stage.record)
    checkpoints.export(stage.folder.path)
    measure = ray.remote(num_cpus=cpus)(_measure)
    found = ray.get(measure.remote(stage.folder.path / "model", tokens / "held_out", manifest["pad_id"]))
    return _outcome(stage, manifest, found)


def _render(rankings: Path, tokenizer_folder: Path, target: Path) -> None:
    tokenizer = load_tokenizer(mirror.here(tokenizer_folder))
    groups = {name: _groups(mirror.here(rankings) / f"{name}.parquet", tokenizer) for name in SETS}
    row_tokens = max(sum(len(piece.ids) for piece in group) for name in SETS for group, _ in groups[name])
    manifest: dict[str, Any] = {"tokenizer_fingerprint": fingerprint(tokenizer), "pad_id": tokenizer.pad_token_id}
    with mirror.filling(target):
        for name in SETS:
            _write(groups[name], len(tokenizer), row_tokens, target / name)
            manifest[name] = {"rows": len(groups[name]), "pairs": sum(pairs for _, pairs in groups[name])}
        write_json(target / "manifest.json", manifest)


def _groups(path: Path, tokenizer) -> list[tuple[list[Piece], int]]:
    """The answers to each prompt, with how many pairs their ranking makes; rankings that make none are left out."""
    rows = pq.read_table(path).to_pylist()
    groups = [([*_pieces(tokenizer, row)], count_pairs(row["ranks"])) for row in rows]
    told = [group for group in groups if group[1]]
    if not told:
        raise StageFailed(Problem(f"the {len(rows)} rankings of {path} are all ties", "rank more prompts or answers"))
    return told


def _pieces(tokenizer, row: dict[str, Any]):
    prompt = json.loads(row["prompt"])
    for number, (answer, rank) in enumerate(zip(row["answers"], row["ranks"], strict=True)):
        ids, _ = render_conversation(tokenizer, [*prompt, {"role": "assistant", "content": answer}])
        yield Piece(f"{row['id']}/{number}", ids, [IGNORED] * (len(ids) - 1) + [rank])


def _write(groups: list[tuple[list[Piece], int]], vocab_size: int, row_tokens: int, target: Path) -> None:
    pieces = [piece for group, _ in groups for piece in group]
    row = np.repeat(np.arange(len(groups)), [len(group) for group, _ in groups])
    # What a row counts for is its pairs; they stand at its first answer.
    counts = np.array([pairs if at == 0 else 0 for group, pairs in groups for at in range(len(group))], dtype=np.int64)
    write_rows(target, pieces, vocab_size, lambda lengths: pack_groups(lengths, row, counts, row_tokens))


def _job(stage: StageRun, manifest: dict[str, Any]) -> worker.Job:
    settings, tokens = stage.recipe.reward, stage.folder.path / "tokens"
    rows = min(settings.held_out_rows, manifest["held_out"]["rows"])
    held_out = HeldOutRows.of_set(rows, tokens / "held_out", manifest["pad_id"], settings)
    return worker.Job(
        folder=stage.folder.path,
        settings=settings,
        build=partial(build, stage.input("sft") / "model", stage.recipe.seed),
        objective=ranking_objective,
        tokenizer=stage.input("tokenizer") / "tokenizer",
        stream=RowStream.of(tokens / "train", manifest["pad_id"], settings, stage.recipe.seed),
        held_out=held_out,
        facts={"tokenizer_fingerprint": manifest["tokenizer_fingerprint"], "held_out_targets": held_out.targets()},
    )


def build(chat: Path, seed: int, saved: Path | None, share: Share | None = None) -> torch.nn.Module:
    """The chat model with a head of one score, drawn by `seed`; or the reward model as it was saved. Whole on each
    rank, whatever `share` would do.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return load(saved or mirror.here(chat))


def load(folder: Path) -> torch.nn.Module:
    """The sequence classifier of one label in `folder`, in the form that other tools load too."""
    from transformers import AutoModelForSequenceClassification

    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=1, local_files_only=True, trust_remote_code=False, use_safetensors=True
    )


def ranking_objective(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Bradley-Terry loss over all pairs of the batch's rankings, in nats, summed."""
    return ranking_nats(token_scores(model, batch["input_ids"], batch["position_ids"]), batch["labels"])


def token_scores(model: torch.nn.Module, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
    """The score that the head gives each token of packed rows. Shapes (B, T), fp32.

    The classifier itself pools one score a row, which is one too few for a row of several answers.
    """
    output = model(input_ids=input_ids, position_ids=position_ids, use_cache=False, output_hidden_states=True)
    head: Any = getattr(model, "module", model).score  # behind DeepSpeed's engine
    return head(output.hidden_states[-1]).squeeze(-1).float()


@torch.no_grad()
def _measure(model_folder: Path, rows_folder: Path, pad_id: int) -> dict[str, float]:
    """Share of held-out pairs that the model orders as the ranking does, and how far apart it puts them."""
    model = load(mirror.here(model_folder)).eval()
    rows = RowReader(mirror.here(rows_folder), pad_id)
    right = pairs = 0
    margins_sum = 0.0
    for row in range(rows.index.num_rows):
        batch = {name: torch.from_numpy(array).long() for name, array in rows.read(np.array([row])).items()}
        scores = token_scores(model, batch["input_ids"], batch["position_ids"])[0]
        ends = batch["labels"][0] != IGNORED
        margins, better = pair_margins(scores[ends], batch["labels"][0][ends])
        right += int((margins[better] > 0).sum())
        pairs += int(better.sum())
        margins_sum += float(margins[better].sum())
    return {"accuracy": right / pairs, "held_out_pairs": pairs, "mean_margin": margins_sum / pairs}


@torch.no_grad()
def score(folder: Path, conversations: list[list[dict[str, str]]]) -> list[float]:
    """The learned reward of each conversation's last answer, by the reward model in `folder`."""
    model, tokenizer = load(folder).eval(), load_tokenizer(folder)
    rendered = [render_conversation(tokenizer, messages)[0] for messages in conversations]
    scores: list[float] = []
    for start in range(0, len(rendered), MOST_ANSWERS_AT_ONCE):
        scores += score_ids(model, rendered[start : start + MOST_ANSWERS_AT_ONCE], tokenizer.pad_token_id).tolist()
    return scores


def score_ids(model: torch.nn.Module, sequences: list[list[int]], pad_id: int) -> torch.Tensor:
    """The score at the last token of each sequence. Shape (len(sequences),), fp32."""
    device = next(model.parameters()).device
    ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(one) for one in sequences], True, pad_id).to(device)  # (N, T)
    positions = torch.arange(ids.shape[1], device=device).expand_as(ids)
    last = torch.tensor([len(one) - 1 for one in sequences], device=device)
    return token_scores(model, ids, positions).gather(1, last[:, None]).squeeze(1)


def _outcome(stage: StageRun, manifest: dict[str, Any], found: dict[str, float]) -> Outcome:
    steps = records.read_lines(stage.folder.path / "metrics.jsonl")
    train = manifest["train"]
    return Outcome(
        read=f"{train['rows']:,} rankings, {train['pairs']:,} pairs",
        wrote="reward model",
        figure=f"accuracy {found['accuracy']:.3f} on {found['held_out_pairs']} held-out pairs",
        metrics={
            "steps": len(steps),
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "held_out_loss": records.read_lines(stage.folder.path / "held_out.jsonl")[-1]["held_out_loss"],
            **found,
            **{name: manifest[name] for name in SETS},
        },
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.seed, **recipe.reward.identity()}


STAGE = Stage(
    name="reward",
    version=1,
    needs=("tokenizer", "sft", "rank"),
    artefacts=("model",),
    identity=_identity,
    demand=lambda recipe: training.demand("reward", recipe),
    run=run,
)
