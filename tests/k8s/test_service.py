"""What the manifests hand to Ray Serve: the schema of its configuration, the import path, the arguments."""

from __future__ import annotations

import importlib
import math
from typing import Any

import pytest
import yaml
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

from cluster.errors import BadInput
from cluster.manifests import K8S, cluster_of
from pipelines.recipe import load_recipe
from pipelines.schema import ServeSettings
from serve import app
from serve.options import ApplicationArgs
from tests.k8s.manifests_of import EVERYTHING, RENDERED, documents_of, kinds

ARGS = {"model_folder": "/runs/tiny/rlhf/model", "model_name": "tiny", "insecure": True}


def configuration(source: str) -> ServeDeploySchema:
    (service,) = kinds(documents_of(source), "RayService")
    return ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))


def asked(source: str) -> ApplicationArgs:
    """What the manifests tell the application, defaults filled in."""
    (application,) = configuration(source).applications
    return ApplicationArgs.model_validate(application.args)


def workers(source: str) -> dict[str, Any]:
    (service,) = kinds(documents_of(source), "RayService")
    (group,) = cluster_of(service)["workerGroupSpecs"]
    return group


@pytest.mark.parametrize("source", EVERYTHING)
def test_ray_serve_takes_the_configuration(source):
    (application,) = configuration(source).applications
    module, _, name = application.import_path.partition(":")
    build = getattr(importlib.import_module(module), name)
    assert isinstance(build(application.args), ray_serve.Application)


@pytest.mark.parametrize("source", EVERYTHING)
def test_replicas_and_pods_grow_alike(source):
    said, group = asked(source), workers(source)
    assert (max(1, said.replicas), said.most) == (group["minReplicas"], group["maxReplicas"])
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert float(limits["cpu"]) == said.cpus, "one replica a pod"
    assert float(limits.get("nvidia.com/gpu", 0)) == math.ceil(said.gpus)


@pytest.mark.parametrize("source", RENDERED)
def test_every_setting_of_the_service_is_the_recipes(source):
    """But for what an overlay wants more of, and the CPUs, which are a whole pod's."""
    recipe, settings, overlays, root = RENDERED[source]
    serve, said = load_recipe(recipe, settings).serve, asked(source)
    for name in set(ServeSettings.model_fields) & set(ApplicationArgs.model_fields) - {
        "replicas",
        "max_replicas",
        "keys",
    }:
        assert getattr(said, name) == getattr(serve, name), name
    assert said.cpus == math.ceil(serve.cpus_per_replica)
    assert said.gpus == serve.gpus_per_replica
    assert said.replicas == max(serve.replicas, 2 if "production" in overlays else 0)
    assert said.model_folder == f"{root}/{load_recipe(recipe, settings).name}/rlhf/model"
    assert said.insecure == (said.keys is None) == (serve.keys is None)


def test_the_service_of_the_base_is_the_one_that_is_rendered():
    assert asked("base") == asked("tiny")
    assert asked("overlays/production") == asked("tiny production")


def test_replicas_follow_the_recipe():
    assert (asked("large").replicas, asked("large").most) == (3, 12)
    assert asked("large in a queue").most == 3, "a queue admits one size"
    assert not asked("tiny").scales, "without serve.max_replicas their number is fixed"
    assert (asked("tiny with keys").replicas, workers("tiny with keys")["minReplicas"]) == (0, 1)


def test_keys_come_from_a_secret():
    spec = workers("tiny with keys")["template"]["spec"]
    (volume,) = [volume for volume in spec["volumes"] if "secret" in volume]
    (mount,) = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] == volume["name"]]
    assert volume["secret"]["secretName"] == "headwater-keys"
    assert asked("tiny with keys").keys == f"{mount['mountPath']}/keys.json"
    assert "keys.json" in (K8S / "README.md").read_text()


def test_an_open_service_is_asked_for_in_plain_words():
    with pytest.raises(BadInput, match=r"(?s)no keys.*insecure: true"):
        app.application({**ARGS, "insecure": False})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model": "x"}, "Extra inputs"),
        ({"cpus": 0}, "greater than 0"),
        ({"slots": "many"}, "valid integer"),
        ({"replicas": -1}, "greater than or equal to 0"),
        ({"replicas": 3, "max_replicas": 2}, r"max_replicas \(2\) is below replicas \(3\)"),
    ],
)
def test_a_mistake_in_the_arguments_is_named(change, said):
    with pytest.raises(ValidationError, match=said):
        app.application({**ARGS, **change})
