"""A service whose head is lost, with Redis behind it: what the overlay `production` is for, on real Ray nodes."""

from __future__ import annotations

from typing import Any

import httpx
import psutil
import pytest
import yaml

from cluster.manifests import cluster_of
from tests.commands import wait_until
from tests.k8s.manifests_of import documents_of, kinds
from tests.models import save_tiny_model
from tests.nodes import Cluster, bridge, cluster, free_port, redis_server, title

pytestmark = pytest.mark.slow


def configuration(model_folder: str, port: int) -> dict[str, Any]:
    """What KubeRay would hand to Ray Serve of the rendered service, with one model folder and port for others."""
    (service,) = kinds(documents_of("tiny in object storage"), "RayService")
    assert cluster_of(service)["gcsFaultToleranceOptions"]["redisAddress"]
    config = yaml.safe_load(service["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    application["args"] |= {"model_folder": model_folder, "cpus": 0.5, "replicas": 1}
    config["http_options"]["port"] = port
    return config


def statuses(nodes: Cluster) -> list[str]:
    """Of Serve's applications, as the dashboard tells them; none while it doesn't answer."""
    try:
        answer = httpx.get(f"{nodes.address}/api/serve/applications/", headers=nodes.headers, timeout=5)
        return [one["status"] for one in answer.json()["applications"].values()]
    except (httpx.HTTPError, ValueError, KeyError):
        return []


def answers(address: str) -> bool:
    body = {"model": "tiny", "prompt": "Hello", "max_tokens": 4, "temperature": 0}
    try:
        answer = httpx.post(f"{address}/v1/completions", json=body, timeout=20)
        return answer.status_code == 200 and answer.json()["usage"]["completion_tokens"] > 0
    except httpx.HTTPError:
        return False


def replicas(nodes: Cluster) -> set[psutil.Process]:
    return {one for one in nodes.processes() if "ServeReplica" in title(one)}


def test_a_service_answers_while_its_head_is_replaced(tmp_path):
    model, port = save_tiny_model(tmp_path / "model"), free_port()
    with redis_server(tmp_path) as redis, bridge() as network, cluster(1, 1, network, redis=redis) as nodes:
        url = f"{nodes.address}/api/serve/applications/"
        httpx.put(url, json=configuration(str(model), port), headers=nodes.headers, timeout=60).raise_for_status()
        address = f"http://{network.places[0].ip}:{port}"
        wait_until(lambda: statuses(nodes) == ["RUNNING"] and answers(address), "the service", 120)
        before = replicas(nodes)
        assert len(before) == 2, "the ingress and an engine"

        nodes.nodes.pop(0).kill()
        assert answers(address), "with no head there is"
        nodes.nodes.insert(0, nodes.start_head())
        nodes.nodes.pop()  # where start_head put it

        wait_until(lambda: statuses(nodes) == ["RUNNING"], "the next head to know of the service", 120)
        assert answers(address)
        assert replicas(nodes) == before, "nothing had to be loaded again"
