"""`headwater plan`: what a recipe will take before it starts. Reads the recipe, and the cluster that is up if one is
named; starts and writes nothing. The numbers are those of `cluster/plan.py`, where each is cited.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table

from cluster import plan
from cluster.errors import BadInput, Problem
from cluster.local import expected_node, live_places, ray_session
from cluster.plan import Decoder, Gpu, Load
from llm.architectures import Ids, on_meta
from llm.flops import multiplied_weights
from llm.output_head import PLAIN_HEADS
from pipelines import training
from pipelines.recipe import Recipe
from pipelines.schema import PretrainSettings, TrainingSettings

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

TRAINED = ("pretrain", "sft", "reward", "rlhf")
OFFLOADS: tuple[plan.Offload, ...] = ("none", "optimizer", "all")
OFFLOADED = {"none": "", "optimizer": "+", "all": "++"}


class Options(NamedTuple):
    """What the command was told. `price`: US dollars for a GPU and hour; `api_price`: for a million tokens."""

    gpu: str = "H100"
    price: float | None = None
    mfu: float = plan.MFU
    api_price: float | None = None


def answer(recipe: Recipe, options: Options) -> dict[str, Any]:
    """The plan as an object: units are in its keys. BadInput for an unknown GPU, a share that is none, or a model that
    can't be cut as the recipe says."""
    if problems := training.cutting_problems(recipe, "pretrain"):
        raise BadInput(*problems)
    gpu, decoder, load = _gpu(options), decoder_of(config_of(recipe)), load_of(recipe)
    return {
        "recipe": recipe.name,
        "gpu": {**gpu._asdict(), "count": gpus_of(recipe.pretrain), "ranks": recipe.pretrain.workers},
        "model": decoder._asdict(),
        "training": training_of(recipe, decoder),
        "memory": memory_of(recipe.pretrain, decoder, load, gpu),
        "start": start_of(recipe.pretrain, decoder, load, gpu),
        "fits": fits_of(recipe.pretrain, decoder, load, gpu),
        "time": time_of(recipe, decoder, gpu, options),
        "serving": serving_of(recipe, decoder, gpu, options),
        "disk": disk_of(recipe, decoder),
        "cluster": cluster_of(recipe),
        "assumptions": assumptions(recipe.pretrain, gpu, options),
    }


def show(recipe: Recipe, options: Options, as_json: bool) -> None:
    """Print the plan: tables for people, one object for programs."""
    found = answer(recipe, options)
    if as_json:
        json.dump(found, sys.stdout, indent=1)
        print()
        return
    console = Console(highlight=False)
    for table in _tables(found):
        console.print(table)
    notes = (f"assumed: {one}" for one in found["assumptions"])
    for line in (*_start_lines(found), *_cluster_lines(found["cluster"]), *notes):
        console.print(line)


# What the recipe says


def decoder_of(config: PreTrainedConfig) -> Decoder:
    """The numbers of `config`'s architecture; weights are counted on a model without storage."""
    model, text = on_meta(config), config.get_text_config()
    heads = text.num_attention_heads
    names = ("intermediate_size", "n_inner", "ffn_dim")
    return Decoder(
        parameters=sum(weight.numel() for weight in model.parameters()),
        multiplied=multiplied_weights(model),
        layers=text.num_hidden_layers,
        hidden=text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head=getattr(text, "head_dim", None) or text.hidden_size // heads,
        ffn=next((width for name in names if (width := getattr(text, name, None))), 4 * text.hidden_size),
        gated=any("gate" in name for name, _ in model.named_parameters()),
        vocab=text.vocab_size,
    )


def config_of(recipe: Recipe) -> PreTrainedConfig:
    """The configuration of the recipe's model."""
    return recipe.model.shape.config(Ids(recipe.tokenizer.ids))


def load_of(recipe: Recipe) -> Load:
    """How pretraining loads each of its ranks: with whole rows and layers, or its part of those that ranks share."""
    settings = recipe.pretrain
    return Load(
        sequence=recipe.shards.sequence_length // settings.sequence_parallel,
        micro_batch=settings.forward_rows,
        precision=4 if settings.dtype == "fp32" else 2,
        checkpointing=settings.activation_checkpointing,
        tensor=settings.tensor_parallel,
        offload=settings.offload,
        optimizer=settings.optimizer,
        loss_in_pieces=_loss_in_pieces(config_of(recipe), settings),
        on_gpu=settings.gpus_per_worker > 0,
    )


def _loss_in_pieces(config: PreTrainedConfig, settings: PretrainSettings) -> bool:
    """Whether the loss is made as `llm.output_head` can: not of compiled models, nor of masked words."""
    return config.model_type in PLAIN_HEADS and settings.objective == "causal" and not settings.compile


def gpus_of(settings: TrainingSettings) -> int:
    """GPUs that the recipe asks for; one a worker where it was written for CPUs."""
    return round(settings.workers * (settings.gpus_per_worker or 1))


def _gpu(options: Options) -> Gpu:
    if options.gpu not in plan.GPUS:
        raise BadInput(Problem(f"unknown GPU '{options.gpu}'", f"known are {', '.join(plan.GPUS)}"))
    if not 0 < options.mfu <= 1:
        raise BadInput(Problem(f"--mfu is a share above 0 and up to 1, got {options.mfu:g}", "0.4 is usual"))
    for name, value in (("--price", options.price), ("--api-price", options.api_price)):
        if value is not None and value <= 0:
            raise BadInput(Problem(f"{name} is in US dollars and above 0, got {value:g}", "leave it out for none"))
    return plan.GPUS[options.gpu]


# The parts of the answer


def training_of(recipe: Recipe, decoder: Decoder) -> dict[str, Any]:
    """Tokens and arithmetic of pretraining."""
    settings, sequence = recipe.pretrain, recipe.shards.sequence_length
    tokens = settings.steps * settings.global_batch * sequence
    per_token = plan.flops_per_token(decoder, sequence)
    return {
        "steps": settings.steps,
        "tokens_per_step": settings.global_batch * sequence,
        "tokens": tokens,
        "flops_per_token": per_token,
        "flops": per_token * tokens,
        "tokens_per_parameter": tokens / decoder.parameters,
        "chinchilla_tokens": plan.CHINCHILLA_TOKENS * decoder.parameters,
    }


def memory_of(settings: TrainingSettings, decoder: Decoder, load: Load, gpu: Gpu) -> list[dict[str, Any]]:
    """Bytes of a rank, on as many GPUs as the recipe has, for each ZeRO stage with and without offload."""
    rows = []
    for stage in plan.stages(load):
        for offload in OFFLOADS if stage == 3 else OFFLOADS[: 1 + bool(stage)]:
            found = plan.footprint(decoder, load._replace(offload=offload), stage, settings.workers)
            rows.append(
                {
                    "zero_stage": stage,
                    "offload": offload,
                    **found._asdict(),
                    "peak": found.peak,
                    "fits": found.peak <= gpu.memory * plan.USABLE_MEMORY,
                }
            )
    return rows


def start_of(settings: TrainingSettings, decoder: Decoder, load: Load, gpu: Gpu) -> dict[str, Any]:
    """Bytes of a rank before the first step, and whether a GPU holds them."""
    size = plan.start_bytes(decoder, settings.zero_stage, settings.workers, load.precision, load.tensor)
    return {"bytes": size, "fits": size <= gpu.memory * plan.USABLE_MEMORY}


def fits_of(settings: TrainingSettings, decoder: Decoder, load: Load, gpu: Gpu) -> list[dict[str, Any]]:
    """The fewest GPUs on which the recipe's micro-batch fits, for each ZeRO stage; null if none does."""
    most = settings.global_batch * settings.group  # a rank without a row has nothing to do
    found = plan.fits(decoder, load, gpu, most)
    best = plan.best(found)
    return [
        {"zero_stage": fit.stage, "gpus": fit.gpus, "peak": fit.footprint.peak, "fewest": fit == best} for fit in found
    ]


def time_of(recipe: Recipe, decoder: Decoder, gpu: Gpu, options: Options) -> list[dict[str, Any]]:
    """Hours and money of pretraining, on the recipe's GPUs and on the fewest that hold it."""
    settings, sequence = recipe.pretrain, recipe.shards.sequence_length
    most = settings.global_batch * settings.group
    best = plan.best(plan.fits(decoder, load_of(recipe), gpu, most))
    hours = plan.gpu_hours(training_of(recipe, decoder)["flops"], gpu, options.mfu)
    return [
        {
            "gpus": count,
            "whose": whose,
            "tokens_per_s": plan.tokens_per_s(decoder, sequence, gpu, count, options.mfu),
            "hours": hours / count,
            "gpu_hours": hours,
            "usd": None if options.price is None else hours * options.price,
        }
        for whose, count in (("the recipe's", gpus_of(settings)), ("the fewest", best.gpus if best else None))
        if count
    ]


def serving_of(recipe: Recipe, decoder: Decoder, gpu: Gpu, options: Options) -> dict[str, Any]:
    """One replica of the model, against what an API asks."""
    found = plan.serving(decoder, gpu, recipe.serve.slots, recipe.shards.sequence_length, options.mfu, options.price)
    even = None
    if options.price is not None and options.api_price is not None:
        even = options.price * found.gpus * 24 / options.api_price * 1e6
    return {**found._asdict(), "api_usd": options.api_price, "even_tokens_a_day": even}


def disk_of(recipe: Recipe, decoder: Decoder) -> dict[str, float]:
    """Bytes of the token shards when each token is read once, and of the checkpoints of all stages that train."""
    tokens = training_of(recipe, decoder)["tokens"]
    kept = [training.demand(name, recipe).disk_bytes for name in TRAINED]
    return {"shards": float(tokens * (2 if decoder.vocab <= 1 << 16 else 4)), "checkpoints": float(sum(kept))}


def cluster_of(recipe: Recipe) -> dict[str, Any] | None:
    """What the cluster that is up has, and what of the recipe it can't place; None if none is named."""
    address = recipe.cluster.address
    if expected_node(address) is not None:
        return None
    import ray

    from pipelines.run import resource_problems_of
    from pipelines.stage import load_stages

    with ray_session(address, recipe.cluster.object_store_mb):
        there, places = ray.cluster_resources(), live_places()
    missing = [str(problem.what) for problem in resource_problems_of(load_stages(), recipe, places)]
    kinds = [name.partition(":")[2] for name in there if name.startswith("accelerator_type:")]
    return {"cpus": there.get("CPU", 0.0), "gpus": there.get("GPU", 0.0), "kinds": kinds, "missing": missing}


def assumptions(settings: TrainingSettings, gpu: Gpu, options: Options) -> list[str]:
    """What the numbers rest on, a sentence each."""
    price = "no price of a GPU, so no costs" if options.price is None else f"{options.price:g} USD for a GPU and hour"
    return [
        f"{gpu.name}: {gpu.memory / 1e9:g} GB, {gpu.flops / 1e12:g} dense bf16 TFLOP/s, {gpu.bandwidth / 1e9:g} GB/s "
        f"({gpu.sheet}); {plan.USABLE_MEMORY:.0%} of the memory can be used",
        f"MFU {options.mfu:g} (Llama 3 had 0.38 to 0.43, arXiv 2407.21783); {price}",
        "6N + 12LHQT FLOPs a token (PaLM, arXiv 2204.02311, appendix B), N without tables that are looked up",
        f"{plan.CHINCHILLA_TOKENS:g} tokens a parameter are compute-optimal (arXiv 2203.15556)",
        "bytes of a rank by ZeRO (arXiv 1910.02054), activations by arXiv 2205.05198 without the quadratic term "
        "(fused attention), with DeepSpeed's buckets and what the loss makes of logits",
        f"{settings.forward_rows} rows in a forward pass of {settings.shares} shares, {settings.dtype}, "
        f"{settings.rows_per_worker // settings.forward_rows} forward passes a step",
        f"serving in bf16, prompts at the MFU, writing at {plan.DECODE_BANDWIDTH:.0%} of the memory's bandwidth, "
        "every slot full and at the row's length, replicas never idle",
        "disk for the run folder alone: raw text and documents come to it",
    ]


# How people see it


def _tables(found: dict[str, Any]) -> Iterable[Table]:
    yield _facts(found)
    yield _memory(found)
    yield _fits(found)
    yield _time(found)
    yield _serving(found)


def _facts(found: dict[str, Any]) -> Table:
    model, run, disk = found["model"], found["training"], found["disk"]
    rows = [
        ("parameters", f"{_count(model['parameters'])}, of which a token meets {_count(model['multiplied'])}"),
        ("shape", f"{model['layers']} layers, {model['hidden']} wide, {model['heads']} heads of {model['head']}"),
        ("tokens", f"{_count(run['tokens'])} in {run['steps']:,} steps of {_count(run['tokens_per_step'])}"),
        (
            "tokens a parameter",
            f"{run['tokens_per_parameter']:.1f} (compute-optimal: {_count(run['chinchilla_tokens'])} tokens)",
        ),
        ("FLOPs", f"{run['flops']:.3g}, {run['flops_per_token']:.3g} a token"),
        ("disk", f"{_bytes(disk['shards'])} of shards, {_bytes(disk['checkpoints'])} of checkpoints"),
    ]
    return _table(f"plan of {found['recipe']}", ("", "pretraining"), rows)


def _memory(found: dict[str, Any]) -> Table:
    """A column for each way of sharing, so that all of them stand side by side on a narrow terminal."""
    columns, gpu = found["memory"], found["gpu"]
    size, unit = (1e9, "GB") if max(row["peak"] for row in columns) >= 1e9 else (1e6, "MB")
    names = ("weights", "optimizer", "gradients", "activations", "logits", "reduction", "update", "peak", "host")
    rows = [(name, *(f"{row[name] / size:.3g}" for row in columns)) for name in names]
    rows.append(("fits", *("yes" if row["fits"] else "no" for row in columns)))
    titles = (f"{row['zero_stage']}{OFFLOADED[row['offload']]}" for row in columns)
    return _table(
        f"{unit} of a rank on {gpu['name']}, {gpu['ranks']} ranks (+ optimizer, ++ weights offloaded)",
        ("ZeRO", *titles),
        rows,
    )


def _fits(found: dict[str, Any]) -> Table:
    rows = [
        (
            str(row["zero_stage"]),
            f"{row['gpus']:,}{' (the fewest)' if row['fewest'] else ''}" if row["gpus"] else "none",
            _bytes(row["peak"]),
        )
        for row in found["fits"]
    ]
    return _table(f"fewest {found['gpu']['name']} that hold it", ("ZeRO", "GPUs", "peak of a rank"), rows)


def _time(found: dict[str, Any]) -> Table:
    rows = [
        (
            f"{row['gpus']:,} ({row['whose']})",
            f"{row['tokens_per_s']:,.0f}",
            _hours(row["hours"]),
            f"{row['gpu_hours']:,.0f}",
            _usd(row["usd"]),
        )
        for row in found["time"]
    ]
    return _table("time and money", ("GPUs", "tokens/s", "time", "GPU-hours", "cost"), rows)


def _serving(found: dict[str, Any]) -> Table:
    row = found["serving"]
    rows = [
        ("a replica", f"{row['gpus']} GPUs, {row['batch']} requests at once, {row['context']:,} tokens each"),
        ("a million tokens written", f"{_usd(row['usd_output'])} at {row['decode_tokens_per_s']:,.0f} tokens/s"),
        ("a million tokens read", f"{_usd(row['usd_input'])} at {row['prefill_tokens_per_s']:,.0f} tokens/s"),
    ]
    if row["api_usd"] is not None:
        rows.append(("an API", f"{_usd(row['api_usd'])} a million tokens"))
    if row["even_tokens_a_day"] is not None:
        a_day = row["decode_tokens_per_s"] * 86400
        cheaper = "cheaper above" if row["even_tokens_a_day"] < a_day else "never cheaper: it would have to write"
        rows.append(("one's own replica", f"{cheaper} {_count(row['even_tokens_a_day'])} tokens a day"))
    return _table("serving", ("", found["gpu"]["name"]), rows)


def _start_lines(found: dict[str, Any]) -> list[str]:
    if found["start"]["fits"]:
        return []
    size = _bytes(found["start"]["bytes"])
    return [f"start: each rank needs {size} to build the model before the first step, which doesn't fit: zero_stage=3"]


def _cluster_lines(there: dict[str, Any] | None) -> list[str]:
    if there is None:
        return ["cluster: none is named (cluster.address, RAY_ADDRESS), so nothing was compared with one"]
    has = f"cluster: {there['cpus']:g} CPUs, {there['gpus']:g} GPUs ({', '.join(there['kinds']) or 'no kind told'})"
    return [has, *(f"missing: {one}" for one in there["missing"])] if there["missing"] else [f"{has}: holds it"]


def _table(title: str, columns: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> Table:
    table = Table(*columns, title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    return table


def _count(value: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value:.3g}"


def _bytes(value: float) -> str:
    if not value:
        return "-"
    for size, name in ((1e12, "TB"), (1e9, "GB")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value / 1e6:.3g} MB"


def _hours(value: float) -> str:
    return f"{value / 24:,.1f} days" if value >= 48 else f"{value:.3g} h"


def _usd(value: float | None) -> str:
    return "no price" if value is None else f"{value:,.{0 if value >= 1000 else 2}f} USD"
