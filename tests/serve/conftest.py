from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from cluster.local import SERVING
from tests.models import save_tiny_model

ROOT = Path(__file__).resolve().parents[2]
READY_WITHIN_S = 120


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    import ray

    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.update({key: value for key, value in SERVING.items() if key not in os.environ})
    ray.init(
        num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": str(ROOT)}}
    )
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def service(ray_cluster, model_folder) -> Iterator[str]:
    """The address of a running, ready service of `model_folder`, named tiny."""
    from serve import app
    from serve.options import Options

    url = app.start({"tiny": model_folder}, port=free_port(), options=Options(cpus=1, slots=4))
    wait_until_ready(url.removesuffix("/v1"))
    yield url
    app.stop()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_until_ready(address: str) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while (answer := httpx.get(f"{address}/readyz", timeout=READY_WITHIN_S)).status_code != 200:
        assert time.monotonic() < deadline, f"not ready within {READY_WITHIN_S} s: {answer.text}"
        time.sleep(0.1)
