"""What a recipe asks of Kubernetes: the sizes of its stages and of its service, the disk, the recipe itself."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from cluster.manifests import SCRATCH, Need, Node, Order
from pipelines.recipe import Recipe
from pipelines.schema import ServeSettings
from pipelines.stage import Stage, load_stages

ELSEWHERE = re.compile(r"[a-z0-9]+:")  # an address, or something that an installed package brings along


def order(recipe: Recipe, root: str, node: Node, image: str | None = None) -> Order:
    """The recipe as cluster/manifests.py renders it."""
    serve, stages = recipe.serve, load_stages()
    most, gpus = serve.max_replicas or max(1, serve.replicas), serve.gpus_per_replica
    return Order(
        name=recipe.name,
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        root=root,
        stages=tuple(need(stage, recipe) for stage in stages),
        service=Need("service", most, serve.cpus_per_replica, gpus, least=serve.replicas),
        service_args=service_args(serve),
        disk_bytes=sum(stage.demand(recipe).disk_bytes for stage in stages),
        paths=tuple((setting, path) for setting, path in paths(recipe) if path and not ELSEWHERE.match(path)),
        address=recipe.cluster.address,
        node=node,
        image=image,
    )


def need(stage: Stage, recipe: Recipe) -> Need:
    """What the stage demands: the pieces that do its work, and what runs beside them."""
    work, *beside = stage.demand(recipe).pieces
    shared = sum(piece.count * piece.cpus for piece in beside)
    return Need(stage.name, work.most or work.count, work.cpus, work.claims["GPU"], shared, least=work.count)


def paths(recipe: Recipe) -> Iterator[tuple[str, str | None]]:
    """Every folder and file that the recipe names, after the setting that does."""
    ingest = recipe.ingest
    if ingest.folder:
        yield "ingest.folder", ingest.folder
    for source in () if ingest.folder else ingest.sources:
        yield f"the path of ingest's source '{source.name}'", source.path
        yield f"the block_list of ingest's source '{source.name}'", source.block_list
    for who, sources in (("sft.sources", recipe.sft.sources), ("rank.preferences", recipe.rank.preferences)):
        for one in sources:
            yield f"the path of '{one.name}' in {who}", one.path
    yield "tokenizer.from_folder", recipe.tokenizer.from_folder
    yield "model.start_from", recipe.model.start_from
    for who in ("pretrain", "sft", "reward", "rlhf"):
        if (folder := getattr(recipe, who).offload_to) != "cpu" and not Path(folder).is_relative_to(SCRATCH):
            yield f"{who}.offload_to", folder


def service_args(serve: ServeSettings) -> dict[str, Any]:
    """The settings as `args` of serve.app:application; the model, the address and `insecure` are not among them."""
    named = serve.model_dump(mode="json", exclude={"host", "port", "cpus_per_replica", "gpus_per_replica"})
    return {**named, "cpus": serve.cpus_per_replica, "gpus": serve.gpus_per_replica}
