"""What the manifests hand to Ray Serve: the schema of its configuration, the import path, the arguments."""

from __future__ import annotations

import importlib

import pytest
import yaml
from pydantic import ValidationError
from ray import serve as ray_serve
from ray.serve.schema import ServeDeploySchema

from cluster.errors import BadInput
from cluster.manifests import cluster_of
from serve import app
from tests.k8s.manifests_of import EVERYTHING, documents_of, kinds

ARGS = {"model_folder": "/runs/tiny/rlhf/model", "model_name": "tiny", "insecure": True}


def configuration(source: str) -> ServeDeploySchema:
    (service,) = kinds(documents_of(source), "RayService")
    return ServeDeploySchema(**yaml.safe_load(service["spec"]["serveConfigV2"]))


@pytest.mark.parametrize("source", EVERYTHING)
def test_ray_serve_takes_the_configuration(source):
    (application,) = configuration(source).applications
    module, _, name = application.import_path.partition(":")
    built = getattr(importlib.import_module(module), name)(application.args)
    assert isinstance(built, ray_serve.Application)
    assert [deployment.name for deployment in application.deployments] == [app.NAME]


@pytest.mark.parametrize("source", EVERYTHING)
def test_replicas_and_pods_grow_alike(source):
    (service,) = kinds(documents_of(source), "RayService")
    (application,) = configuration(source).applications
    scaling = application.deployments[0].autoscaling_config
    (group,) = cluster_of(service)["workerGroupSpecs"]
    assert group["minReplicas"] == scaling["min_replicas"]
    assert group["maxReplicas"] == scaling["max_replicas"]
    cpus = group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]
    assert float(cpus) >= application.args["cpus"]


def test_replicas_follow_the_recipe():
    (application,) = configuration("large").applications
    assert application.args["model_folder"] == "/mnt/runs/large/rlhf/model"
    assert application.args["cpus"] == 1.5
    assert application.deployments[0].autoscaling_config["min_replicas"] == 3
    (application,) = configuration("large in a queue").applications
    assert application.deployments[0].autoscaling_config["max_replicas"] == 3, "a queue admits one size"


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
