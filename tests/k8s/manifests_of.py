"""The manifests that the tests look at: what kubectl makes of each overlay, and what the command renders."""

from __future__ import annotations

import copy
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster import manifests
from cluster.manifests import Document, Node
from pipelines import deploy
from pipelines.recipe import load_recipe, shipped

KUBECTL = Path(sys.executable).with_name("kubectl")
KUSTOMIZED = ("base", *(f"overlays/{name}" for name in manifests.overlays()))

# 16 workers with a GPU each, 4 to a pod, and replicas that need a CPU and a half.
GPU = (
    "name=large",
    "pretrain.workers=16",
    "pretrain.global_batch=64",
    "pretrain.cpus_per_worker=4",
    "pretrain.gpus_per_worker=1",
    "rank.gpus_per_actor=0.5",
    "serve.replicas=3",
    "serve.max_replicas=12",
    "serve.cpus_per_replica=1.5",
)
KEYS = ("serve.keys=keys.json", "serve.replicas=0", "serve.max_replicas=3", "serve.gpus_per_replica=1")
YOURS = ("70b-512gpu", "7b-64gpu", "small-8gpu")  # recipes that read what is under /your
# What is rendered: recipe, settings, overlays, root of the runs.
RENDERED: dict[str, tuple[str, tuple[str, ...], tuple[str, ...], str]] = {
    **{name: (name, (), (), "/your" if name in YOURS else "/runs") for name in shipped()},
    **{f"tiny {overlay}": ("tiny", (), (overlay,), "/runs") for overlay in manifests.overlays()},
    "tiny in object storage": ("tiny", (), ("production", "spot"), "s3://bucket/some/prefix"),
    "tiny with keys": ("tiny", KEYS, ("gpu",), "/runs"),
    "large": ("micro", GPU, ("gpu",), "/mnt/runs"),
    "large on spot": ("micro", GPU, ("gpu", "spot", "volcano"), "/mnt/runs"),
    "large in a queue": ("micro", GPU, ("gpu", "production", "kueue"), "/mnt/runs"),
}
EVERYTHING = [*KUSTOMIZED, *RENDERED]


def documents_of(source: str) -> list[Document]:
    """A copy of the manifests that `source` names, to look at or to break."""
    return copy.deepcopy(_kustomized(source) if source in KUSTOMIZED else _rendered(source))


def order_of(recipe: str, settings: tuple[str, ...] = (), root: str = "/runs", **node: Any) -> manifests.Order:
    return deploy.order(load_recipe(recipe, settings), root, Node(**node))


@cache
def _kustomized(folder: str) -> list[Document]:
    done = subprocess.run(
        [str(KUBECTL), "kustomize", str(manifests.K8S / folder)], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.load_all(done.stdout, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


@cache
def _rendered(source: str) -> list[Document]:
    recipe, settings, overlays, root = RENDERED[source]
    return manifests.render(order_of(recipe, settings, root, cpus=17, gpus=4), overlays)


def key(document: Document) -> tuple[str, str]:
    return document["kind"], document["metadata"]["name"]


def kinds(documents: list[Document], *names: str) -> list[Document]:
    return [document for document in documents if document["kind"] in names]
