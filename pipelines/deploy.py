"""What a recipe asks of Kubernetes: the sizes of its stages and of its service, the disk, the recipe itself."""

from __future__ import annotations

from typing import Any

import yaml

from cluster.manifests import Need, Node, Order
from pipelines.recipe import Recipe
from pipelines.schema import ServeSettings
from pipelines.stage import Stage, load_stages


def order(recipe: Recipe, root: str, node: Node, image: str | None = None) -> Order:
    """The recipe as cluster/manifests.py renders it."""
    serve, stages = recipe.serve, load_stages()
    return Order(
        name=recipe.name,
        recipe=yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True),
        root=root,
        stages=tuple(need(stage, recipe) for stage in stages),
        service=Need("service", serve.replicas, serve.cpus_per_replica),
        slots=serve.slots,
        disk_bytes=sum(stage.demand(recipe).disk_bytes for stage in stages),
        node=node,
        image=image,
    )


def need(stage: Stage, recipe: Recipe) -> Need:
    """What the stage demands, in the pieces that it comes in: workers, actors, or one task at a time."""
    settings, demand = getattr(recipe, stage.name), stage.demand(recipe)
    pieces = getattr(settings, "workers", getattr(settings, "actors", 1))
    cpus = getattr(settings, "cpus_per_worker", getattr(settings, "cpus_per_actor", demand.cpus))
    return Need(stage.name, pieces, cpus, demand.gpus / pieces, demand.cpus - pieces * cpus)


def service_args(serve: ServeSettings) -> dict[str, Any]:
    """The settings as `args` of serve.app:application; the model, the address and `insecure` are not among them."""
    named = serve.model_dump(mode="json", exclude={"host", "port", "cpus_per_replica", "gpus_per_replica"})
    return {**named, "cpus": serve.cpus_per_replica, "gpus": serve.gpus_per_replica}
