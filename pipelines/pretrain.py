"""Stage 4: token shards to a base model, by next-token prediction.

Ray Data streams rows into DeepSpeed ZeRO under Ray Train. What a table of counts would predict is computed first, so
that the model's held-out loss has something to stand beside.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cluster import mirror
from cluster.errors import BadInput, Problem
from llm.losses import next_token_nats
from llm.order import Mixture, mix_of, spread
from llm.presets import Preset, build_model, llama_config
from llm.vocabulary import fingerprint, load_tokenizer
from pipelines import checkpoints, records, training
from pipelines.recipe import Recipe
from pipelines.schema import PretrainSettings
from pipelines.shards import read_manifest, verify
from pipelines.stage import Outcome, Stage, StageRun
from pipelines.stream import HeldOutRows, RowStream

COUNTED_TOKENS = 20_000_000  # of the training text, for the unigram and bigram tables


def run(stage: StageRun) -> Outcome:
    """Train from the cursor on, export the model, and set its held-out loss beside the baselines' (made beside)."""
    import ray

    tokens = stage.input("shards") / "tokens"
    manifest = read_manifest(tokens)
    verify(tokens, manifest, stage.recipe.pretrain.data_cpus)
    _same_tokenizer(manifest, stage.input("tokenizer") / "tokenizer")
    mixture = mixture_of(manifest["train"]["sources"], stage.recipe.pretrain)
    rows = min(stage.recipe.pretrain.held_out_rows, manifest["held_out"]["rows"])
    counting = ray.remote(num_cpus=stage.recipe.pretrain.data_cpus)(_baselines).remote(tokens, manifest, rows)
    training.train(_job(stage, manifest, tokens, rows, mixture), "pretrain", stage.record)
    checkpoints.export(stage.folder.path)
    baselines = ray.get(counting)
    stage.log.info(
        "held-out baselines: unigram %.4f, bigram %.4f nats a token", baselines["unigram"], baselines["bigram"]
    )
    return _outcome(stage, manifest, baselines, _epochs(manifest["train"]["sources"], mixture, stage.recipe.pretrain))


def mixture_of(sources: dict[str, Any], settings: PretrainSettings) -> Mixture | None:
    """The rows that each source gives, by the recipe's weights; None without weights. `sources`: of a manifest.

    BadInput if a weight is of no source, or if there is too little text for so many steps.
    """
    if not settings.mixture:
        return None
    if unknown := sorted(set(settings.mixture) - {name for name, about in sources.items() if about["rows"]}):
        there = ", ".join(name for name, about in sources.items() if about["rows"])
        what = f"pretrain.mixture has a weight for '{unknown[0]}', of which there are no rows"
        raise BadInput(Problem(what, f"sources with rows: {there}"))
    rows = np.array([about["rows"] for about in sources.values()], dtype=np.int64)
    weights = np.array([settings.mixture.get(name, 0.0) for name in sources])
    try:
        return mix_of(rows, weights, settings.steps * settings.global_batch, settings.max_epochs)
    except ValueError as error:
        what = f"pretrain.mixture: {error}"
        raise BadInput(Problem(what, "train fewer steps, raise pretrain.max_epochs, or add text")) from None


def _epochs(sources: dict[str, Any], mixture: Mixture | None, settings: PretrainSettings) -> dict[str, float]:
    """How often each source is read in all steps."""
    rows = np.array([about["rows"] for about in sources.values()], dtype=np.int64)
    mixture = mixture or Mixture(rows, rows)
    epochs = mixture.epochs(settings.steps * settings.global_batch)
    return {name: round(float(one), 4) for name, one in zip(sources, epochs, strict=True)}


def _same_tokenizer(manifest: dict[str, Any], folder: Path) -> None:
    found = fingerprint(load_tokenizer(mirror.here(folder)))
    made_with = manifest["tokenizer_fingerprint"]
    if found != made_with:
        raise BadInput(
            Problem(
                f"the shards were made with tokenizer {made_with[:12]}, the run has {found[:12]}",
                "run the shards stage again",
            )
        )


def _baselines(tokens: Path, manifest: dict[str, Any], rows: int) -> dict[str, float]:
    """Unigram and bigram nats a target on the held-out rows, with how many targets and bytes those are."""
    from llm.baselines import count, mean_nats
    from llm.packing import IGNORED, RowReader
    from llm.shardfile import Shards
    from llm.vocabulary import token_bytes

    counts = count(Shards(mirror.here(tokens) / "train").flat(COUNTED_TOKENS), manifest["vocab_size"])
    chosen = spread(rows, manifest["held_out"]["rows"])
    held_out = RowReader(tokens / "held_out", manifest["pad_id"]).read(chosen)
    targets = held_out["labels"][:, 1:]
    targets = targets[targets != IGNORED]
    lengths = token_bytes(load_tokenizer(mirror.here(tokens.parent.parent / "tokenizer" / "tokenizer")))
    return {
        **mean_nats(counts, held_out["input_ids"], held_out["labels"]),
        "targets": int(targets.size),
        "bytes": int(lengths[targets].sum()),
    }


def _job(stage: StageRun, manifest: dict[str, Any], tokens: Path, rows: int, mixture: Mixture | None) -> training.Job:
    recipe = stage.recipe
    settings = recipe.pretrain
    held_out = HeldOutRows.of_set(rows, tokens / "held_out", manifest["pad_id"], settings)
    tokenizer = stage.input("tokenizer") / "tokenizer"
    return training.Job(
        folder=stage.folder.path,
        settings=settings,
        build=partial(build, recipe.model.shape, tokenizer, recipe.seed),
        objective=next_token_objective,
        tokenizer=tokenizer,
        stream=RowStream.of(tokens / "train", manifest["pad_id"], settings, recipe.seed, mixture),
        held_out=held_out,
        facts={"tokenizer_fingerprint": manifest["tokenizer_fingerprint"], "held_out_targets": held_out.targets()},
    )


def build(shape: Preset, tokenizer: Path, seed: int, saved: Path | None) -> torch.nn.Module:
    """The model as `seed` draws it, or as it was saved."""
    from transformers import LlamaForCausalLM

    if saved is not None:
        return LlamaForCausalLM.from_pretrained(saved, local_files_only=True, use_safetensors=True)
    return build_model(llama_config(shape, load_tokenizer(mirror.here(tokenizer))), seed)


def next_token_objective(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Next-token loss of packed rows, in nats, summed over targets.

    Positions that begin again at 0 in each piece are what isolates the pieces: transformers derives the mask from
    them, but only without a cache and without an attention mask.
    """
    logits = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
    return next_token_nats(logits, batch["labels"])


def _outcome(
    stage: StageRun, manifest: dict[str, Any], baselines: dict[str, float], epochs: dict[str, float]
) -> Outcome:
    steps = records.read_lines(stage.folder.path / "metrics.jsonl")
    nats = {
        "held_out": records.read_lines(stage.folder.path / "held_out.jsonl")[-1]["held_out_loss"],
        "bigram": baselines["bigram"],
        "unigram": baselines["unigram"],
    }
    # Nats a target to bits a byte of text: what compares models across tokenizers.
    bits = {name: loss * baselines["targets"] / math.log(2) / baselines["bytes"] for name, loss in nats.items()}
    tokens = steps[-1]["tokens"]
    parameters = stage.recipe.model.shape.parameters(manifest["vocab_size"])
    return Outcome(
        read=f"{tokens / 1e6:.2f} M tokens ({tokens / manifest['train']['tokens']:.2f} epochs)",
        wrote=f"base model of {parameters / 1e6:.2f} M parameters",
        figure=f"held-out loss {nats['held_out']:.3f} nats, {bits['held_out']:.3f} bits a byte "
        f"(bigram {nats['bigram']:.3f}, {bits['bigram']:.3f}; unigram {nats['unigram']:.3f}, {bits['unigram']:.3f})",
        metrics={
            "steps": len(steps),
            "tokens": tokens,
            "epochs_per_source": epochs,
            "parameters": parameters,
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "held_out_targets": baselines["targets"],
            "held_out_bytes": baselines["bytes"],
            **{f"{name}_loss": loss for name, loss in nats.items()},
            **{f"{name}_bits_per_byte": value for name, value in bits.items()},
        },
    )


def _identity(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.seed, "model": recipe.model.identity(), **recipe.pretrain.identity()}


STAGE = Stage(
    name="pretrain",
    version=1,
    needs=("tokenizer", "shards"),
    artefacts=("model",),
    identity=_identity,
    demand=lambda recipe: training.demand(recipe.model.shape.parameters(recipe.tokenizer.vocab_size), recipe.pretrain),
    run=run,
)
