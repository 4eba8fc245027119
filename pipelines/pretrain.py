"""Stage 4: token shards to a base model, by next-token prediction, by masked words, or by both.

Ray Data streams rows into DeepSpeed ZeRO under Ray Train. What a table of counts would predict is computed first, so
that the model's held-out loss has something to stand beside.
"""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cluster import mirror
from cluster.errors import BadInput, Problem
from llm import cloze
from llm.adoption import adopt, grow, size_of
from llm.architectures import Architecture, Ids, Saved, load_weights, two_layers, unfit, window_of
from llm.engine import Engine
from llm.losses import following
from llm.masking import Masking
from llm.order import Mixture, mix_of, spread
from llm.output_head import rows_nats
from llm.parts import Share, draw_model, read_model
from llm.presets import Preset, build_model
from llm.sampling import SamplingParams
from llm.vocabulary import encode_text, fingerprint, load_tokenizer
from pipelines import checkpoints, records, training, worker
from pipelines.evaluation import held_out_by_source, held_out_figures, masked_baselines
from pipelines.recipe import Recipe
from pipelines.schema import PretrainSettings
from pipelines.shards import read_manifest, verify
from pipelines.stage import Outcome, Stage, StageRun, content_of
from pipelines.stream import HeldOutRows, RowStream

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SAMPLE_TOKENS = 32
COUNTED_TOKENS = 20_000_000  # of the training text, for the unigram and bigram tables


def run(stage: StageRun) -> Outcome:
    """Train from the cursor on, export the model, and set its held-out loss beside the baselines' (made beside)."""
    import ray

    training.refuse_starving("pretrain", stage.recipe.pretrain)
    tokens = stage.input("shards") / "tokens"
    manifest = read_manifest(tokens)
    verify(tokens, manifest, stage.recipe.pretrain.data_cpus)
    _same_tokenizer(manifest, stage.input("tokenizer") / "tokenizer")
    _same_tokenizer_in(stage.recipe.model.folder, manifest)
    mixture = mixture_of(manifest["train"]["sources"], stage.recipe.pretrain)
    rows = min(stage.recipe.pretrain.held_out_rows, manifest["held_out"]["rows"])
    job = _job(stage, manifest, tokens, rows, mixture)
    counting = ray.remote(num_cpus=stage.recipe.pretrain.data_cpus)(_baselines).remote(
        tokens, manifest, rows, job.held_out
    )
    training.train(job, "pretrain", stage.record)
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


def bytes_per_token(sources: dict[str, Any], mixture: Mixture | None) -> float:
    """Bytes of text that a token of the stream stands for, by the mixture's weights. `sources`: of a manifest."""
    there = [about for about in sources.values() if about["rows"]]
    rows = [about["rows"] for about in there] if mixture is None else mixture.share[mixture.rows > 0].tolist()
    read = [share / about["rows"] for share, about in zip(rows, there, strict=True)]  # how often, up to a factor
    text_bytes = sum(often * about["text_bytes"] for often, about in zip(read, there, strict=True))
    return text_bytes / sum(often * about["tokens"] for often, about in zip(read, there, strict=True))


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


def _same_tokenizer_in(start_from: Path | None, manifest: dict[str, Any]) -> None:
    """Refuse to go on from a model that learnt other ids: the run's tokenizer is its own, or was taken from it."""
    if start_from is None:
        return
    found, made_with = fingerprint(load_tokenizer(start_from)), manifest["tokenizer_fingerprint"]
    if found != made_with and _adopted(start_from) != made_with:
        raise BadInput(
            Problem(
                f"model.start_from ({start_from}) has tokenizer {found[:12]}, the run has {made_with[:12]}",
                "set tokenizer.from_folder to the same folder, start from a model of a run with the same text and "
                "tokenizer settings, or train a fresh one",
            )
        )


def _adopted(folder: Path) -> str | None:
    try:
        return fingerprint(adopt(folder))
    except ValueError:
        return None


def _baselines(tokens: Path, manifest: dict[str, Any], rows: int, stream: HeldOutRows) -> dict[str, float]:
    """Unigram and bigram nats a target on the held-out rows, with how many targets and bytes those are.

    With what the unigram table scores on hidden words, if the stream is masked.
    """
    from llm.baselines import count, mean_nats
    from llm.packing import IGNORED, RowReader
    from llm.shardfile import Shards
    from llm.vocabulary import token_bytes

    counts = count(Shards(mirror.here(tokens) / "train").flat(COUNTED_TOKENS), manifest["vocab_size"])
    chosen = spread(rows, manifest["held_out"]["rows"])
    held_out = RowReader(tokens / "held_out", manifest["pad_id"], stream.isolated).read(chosen)
    targets = held_out["labels"][:, 1:]
    targets = targets[targets != IGNORED]
    lengths = token_bytes(load_tokenizer(mirror.here(tokens.parent.parent / "tokenizer" / "tokenizer")))
    return {
        **mean_nats(counts, held_out["input_ids"], held_out["labels"]),
        "targets": int(targets.size),
        "bytes": int(lengths[targets].sum()),
        **(masked_baselines(stream, counts, manifest["eos_id"]) if stream.masking else {}),
    }


def _job(stage: StageRun, manifest: dict[str, Any], tokens: Path, rows: int, mixture: Mixture | None) -> worker.Job:
    recipe = stage.recipe
    settings = recipe.pretrain
    pad_id, isolated = manifest["pad_id"], settings.isolate
    tokenizer = stage.input("tokenizer") / "tokenizer"
    masking = masking_of(settings, tokenizer, recipe.seed)
    held_out = HeldOutRows.of_set(rows, tokens / "held_out", pad_id, settings, isolated, masking)
    return worker.Job(
        folder=stage.folder.path,
        settings=settings,
        build=partial(_build_told, settings.objective, partial(build, recipe.model.shape, tokenizer, recipe.seed)),
        objective=cloze.guess_nats if masking else next_token_objective,
        tokenizer=tokenizer,
        stream=RowStream.of(tokens / "train", pad_id, settings, recipe.seed, mixture, isolated, masking),
        held_out=held_out,
        evaluation=_evaluation(settings.objective, manifest["held_out"]["sources"]),
        facts={"tokenizer_fingerprint": manifest["tokenizer_fingerprint"], "held_out_targets": held_out.targets()},
        bytes_per_target=None if masking else bytes_per_token(manifest["train"]["sources"], mixture),
        samples=partial(_samples, prompts=settings.samples) if _writes(settings) else None,
        counts_flops=True,
    )


def _evaluation(objective: str, sources: dict[str, Any]) -> worker.Evaluation:
    if objective != "causal":
        return partial(held_out_figures, objective=objective)
    return partial(held_out_by_source, names=list(sources), rows=[about["rows"] for about in sources.values()])


def _writes(settings: PretrainSettings) -> bool:
    whole = settings.zero_stage < 3 and settings.group == 1
    return bool(settings.samples) and whole and settings.objective != "masked"


def _samples(model: Any, tokenizer: Any, prompts: tuple[str, ...]) -> list[dict[str, str]]:
    """What the model continues each of `prompts` with, by its likeliest tokens."""
    try:
        engine = Engine(model, tokenizer, slots=len(prompts))
        ids = [encode_text(tokenizer, prompt) for prompt in prompts]
        answers = engine.generate(ids, SamplingParams(max_new_tokens=SAMPLE_TOKENS, temperature=0))
    except ValueError as error:
        return [{"prompt": prompt, "text": f"({error})"} for prompt in prompts]
    return [{"prompt": prompt, "text": answer.text} for prompt, answer in zip(prompts, answers, strict=True)]


def masking_of(settings: PretrainSettings, tokenizer: Path, seed: int) -> Masking | None:
    """What of the rows is masked; None for next-token prediction alone."""
    if settings.objective == "causal":
        return None
    share = 1.0 if settings.objective == "masked" else settings.masked_share
    return Masking(str(tokenizer), settings.mask_rate, share, seed)


def _build_told(
    objective: str, build: worker.Build, saved: Path | None, share: Share | None = None
) -> torch.nn.Module:
    """What `build` builds, with its objective in the configuration that is saved with it."""
    model = build(saved, share)
    cloze.tell_objective(model, objective)
    return model


def build(
    shape: Preset | Architecture | Saved, tokenizer: Path, seed: int, saved: Path | None, share: Share | None = None
) -> torch.nn.Module:
    """The model as `seed` draws it or as a folder has it; or, of a checkpoint, as it was saved.

    share: how it is shared out a module at a time, so that no rank needs room for all of it.
    """
    if saved is not None:
        return read_model(saved, share)
    if isinstance(shape, Saved):
        return _go_on_from(mirror.here(shape.folder), mirror.here(tokenizer), share)
    config = shape.config(load_tokenizer(mirror.here(tokenizer)))
    return draw_model(config, seed, share) if share else build_model(config, seed)


def _go_on_from(folder: Path, tokenizer: Path, share: Share | None) -> torch.nn.Module:
    """The folder's model, with a row for each special token that the run's tokenizer has beyond the folder's.

    One that has to grow is read whole by every rank.
    """
    own, taken = load_tokenizer(folder), load_tokenizer(tokenizer)
    if fingerprint(own) == fingerprint(taken):
        return read_model(folder, share) if share else load_weights(folder)
    model = load_weights(folder)
    grow(model, size_of(folder), taken)
    return model


def next_token_objective(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Next-token loss of packed rows, in nats, summed over targets.

    Positions that begin again at 0 in each piece are what isolates the pieces: transformers derives the mask from
    them, but only without a cache and without an attention mask.
    """
    # Of rows that workers share (`llm.sequence`) each position's target is there instead of labels.
    targets = batch["targets"] if "targets" in batch else following(batch["labels"])
    return rows_nats(model, batch["input_ids"], targets, position_ids=batch["position_ids"])


def _outcome(
    stage: StageRun, manifest: dict[str, Any], baselines: dict[str, float], epochs: dict[str, float]
) -> Outcome:
    steps = records.read_lines(stage.folder.path / "metrics.jsonl")
    held_out = records.read_lines(stage.folder.path / "held_out.jsonl")[-1]
    objective = stage.recipe.pretrain.objective
    figures = [_causal_figures(held_out, baselines)] if objective != "masked" else []
    figures += [_masked_figures(held_out, baselines)] if objective != "causal" else []
    tokens = steps[-1]["tokens"]
    parameters = stage.recipe.model.shape.parameters(manifest["vocab_size"])
    return Outcome(
        read=f"{tokens / 1e6:.2f} M tokens ({tokens / manifest['train']['tokens']:.2f} epochs)",
        wrote=f"base model of {parameters / 1e6:.2f} M parameters",
        figure="; ".join(said for said, _ in figures),
        metrics={
            "steps": len(steps),
            "tokens": tokens,
            "epochs_per_source": epochs,
            "parameters": parameters,
            "first_loss": steps[0]["loss"],
            "last_loss": steps[-1]["loss"],
            "held_out_loss": held_out["held_out_loss"],
            **{name: value for _, metrics in figures for name, value in metrics.items()},
        },
    )


def _causal_figures(held_out: dict[str, float], baselines: dict[str, float]) -> tuple[str, dict[str, float]]:
    """Next-token loss beside the tables', for people and as metrics."""
    nats = {"held_out": held_out["held_out_loss"], "bigram": baselines["bigram"], "unigram": baselines["unigram"]}
    # Nats a target to bits a byte of text: what compares models across tokenizers.
    bits = {name: loss * baselines["targets"] / math.log(2) / baselines["bytes"] for name, loss in nats.items()}
    said = (
        f"held-out loss {nats['held_out']:.3f} nats, {bits['held_out']:.3f} bits a byte "
        f"(bigram {nats['bigram']:.3f}, {bits['bigram']:.3f}; unigram {nats['unigram']:.3f}, {bits['unigram']:.3f})"
    )
    return said, {
        "held_out_targets": baselines["targets"],
        "held_out_bytes": baselines["bytes"],
        **{f"{name}_loss": loss for name, loss in nats.items()},
        **{f"{name}_bits_per_byte": value for name, value in bits.items()},
    }


def _masked_figures(held_out: dict[str, float], baselines: dict[str, float]) -> tuple[str, dict[str, float]]:
    """The same of filling in hidden words; baselines are those of the unigram table."""
    metrics = {
        "masked_loss": held_out["masked_loss"],
        "masked_accuracy": held_out["masked_accuracy"],
        "pseudo_perplexity": math.exp(held_out["pseudo_loss"]),
        **{name: value for name, value in baselines.items() if "masked" in name or "single" in name},
    }
    said = (
        f"masked words: loss {metrics['masked_loss']:.3f} nats (unigram {metrics['unigram_masked_loss']:.3f}), "
        f"accuracy {metrics['masked_accuracy']:.1%} (commonest token {metrics['unigram_masked_accuracy']:.1%}), "
        f"pseudo-perplexity {metrics['pseudo_perplexity']:.1f} on {metrics['single_targets']:,} tokens"
    )
    return said, metrics


def _identity(recipe: Recipe) -> dict[str, Any]:
    return {"seed": recipe.seed, "model": recipe.model.identity(), **recipe.pretrain.identity()}


def _sources(recipe: Recipe, verify: bool) -> dict[str, str]:
    """The model to go on from: names, sizes and times of its files, or their bytes."""
    shape = recipe.model.shape if recipe.model.start_from else None
    if not isinstance(shape, Saved):
        return {}
    files = (path for path in shape.folder.iterdir() if path.suffix in (".json", ".safetensors"))
    return {"start_from": content_of(files, verify)}


def _check(recipe: Recipe) -> list[Problem]:
    """What can be seen of a model that isn't one of ours before anything starts."""
    model, length = recipe.model, recipe.shards.sequence_length
    if problems := training.cutting_problems(recipe, "pretrain"):
        return problems
    if model.preset or model.depth:
        return []
    setting = "model.start_from" if model.start_from else "model.config"
    shape = model.shape
    if length > shape.context:
        what = f"shards.sequence_length {length} is longer than the context of {setting} ({shape.context} tokens)"
        return [Problem(what, "shorten the rows, or take another model")]
    if why := _why_unfit(shape.config(Ids(64)), recipe.pretrain, length):
        return [Problem(f"{setting} can't be pretrained on packed rows: {why}", "take another architecture")]
    return []


def _why_unfit(config: PreTrainedConfig, settings: PretrainSettings, row_tokens: int) -> str | None:
    """Why models of this architecture can't be trained on the recipe's objective; None if they can."""
    if settings.objective != "masked" and (why := unfit(config, isolated=settings.isolate)):
        return why
    if settings.objective == "causal":
        return None
    return _window_too_short(config, row_tokens) or cloze.unfit(two_layers(config).eval())


def _window_too_short(config: PreTrainedConfig, row_tokens: int) -> str | None:
    """Masked rows are looked at whole: what a sliding window would hide of them is seen."""
    window = window_of(config)
    if window is None or window >= row_tokens:
        return None
    return (
        f"{config.model_type} looks {window} tokens far in some layers, and pretrain.objective=masked or mixed would "
        f"let it see all {row_tokens} of a row"
    )


STAGE = Stage(
    name="pretrain",
    version=1,
    needs=("tokenizer", "shards"),
    artefacts=("model",),
    identity=_identity,
    check=_check,
    sources=_sources,
    demand=lambda recipe: training.demand("pretrain", recipe),
    run=run,
)
