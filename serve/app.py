"""The service on Ray Serve: replicas of the API and its engine, started and stopped."""

from __future__ import annotations

import ipaddress
import logging
import socket
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve as ray_serve

from cluster import mirror
from cluster.errors import BadInput, Problem
from cluster.runs import folder_at
from serve.options import ApplicationArgs
from serve.replica import MAX_REQUESTS, Replica

if TYPE_CHECKING:
    from fastapi import FastAPI

    from llm.engine import Engine

NAME = "headwater"
# Ray Serve's own limit lies beyond the replica's, which refuses in OpenAI's words and lets the health checks through.
MAX_ONGOING = 2 * MAX_REQUESTS


@ray_serve.deployment(name=NAME, max_ongoing_requests=MAX_ONGOING)
@ray_serve.ingress()
class Service:
    """One replica of the service: the API, over an engine that loads in the background."""

    def __init__(self, model_folder: str, model_name: str, slots: int, threads: int):
        self.model_name = model_name
        self.replica = Replica(lambda: load_engine(model_folder, slots, threads))

    def __serve_build_asgi_app__(self) -> FastAPI:
        """Called by Ray Serve after the constructor."""
        from serve.api import Api

        return Api(self.replica, self.model_name).app()

    async def check_health(self) -> None:
        """Called by Ray Serve, which replaces a replica whose engine has failed."""
        if self.replica.failure is not None:
            raise RuntimeError(f"the engine failed: {self.replica.failure}")


def load_engine(model_folder: str, slots: int, threads: int) -> Engine:
    """The engine of one replica. Ray gives its processes one thread for each CPU; torch is told to use them."""
    import torch

    from llm.loading import load

    torch.set_num_threads(threads)
    return load(mirror.here(Path(model_folder)), slots=slots)


def build(
    model_folder: Path, model_name: str, *, replicas: int = 1, cpus: float = 1, slots: int = 32
) -> ray_serve.Application:
    """The Ray Serve application that serves `model_folder` as `model_name`; each replica takes `cpus` CPUs."""
    # By default OpenMP's threads spin while they wait for work; with as many of them as cores, Ray's own processes got
    # no core to pass the tokens on with: 32 streams on two cores gave 180 tokens/s, and 900 with threads that sleep.
    variables = {"OMP_WAIT_POLICY": "PASSIVE", **mirror.same_everywhere()}
    options = {"num_cpus": cpus, "runtime_env": {"env_vars": variables}}
    deployment = Service.options(num_replicas=replicas, ray_actor_options=options)  # type: ignore[attr-defined]
    # Where a link leads now: a replica that starts later is to load the same model.
    folder = model_folder if mirror.key_of(model_folder) else Path(model_folder).resolve()
    return deployment.bind(str(folder), model_name, slots, max(1, int(cpus)))


def application(args: dict[str, Any]) -> ray_serve.Application:
    """What a Serve configuration file names as `import_path: serve.app:application`.

    Such a file decides on the address too, usually one that others reach, so `insecure` has to be said in it.
    """
    given = ApplicationArgs.model_validate(args)
    if not given.insecure:
        raise BadInput(
            Problem(
                "the service has no keys, and a Serve configuration opens it to the network",
                "say `insecure: true` in `args` if everyone who can reach it may use it",
            )
        )
    folder = folder_at(given.model_folder)
    return build(folder, given.model_name, replicas=given.replicas, cpus=given.cpus, slots=given.slots)


def start(
    model_folder: Path,
    model_name: str,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    replicas: int = 1,
    cpus: float = 1,
    slots: int = 32,
    insecure: bool = False,
) -> str:
    """Serve `model_folder` on the Ray that is initialised; return the API's address. `/readyz` says when it is loaded.

    BadInput, before anything starts, if the folder holds no model, others could reach `host`, the port is taken, or
    this Ray serves already.
    """
    from llm.loading import check_model_folder

    try:
        check_model_folder(Path(model_folder))
    except ValueError as error:
        raise BadInput(Problem(str(error), "give a run, or a folder with a Hugging Face model")) from error
    check_host(host, insecure)
    check_port(host, port)
    check_idle()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what starts where is not the user's business
    ray_serve.start(http_options={"host": host, "port": port})
    application = build(model_folder, model_name, replicas=replicas, cpus=cpus, slots=slots)
    ray_serve.run(application, name=NAME, route_prefix="/")
    return f"http://{host}:{port}/v1"


def stop() -> None:
    """Stop the service, with Ray Serve on this Ray."""
    ray_serve.shutdown()


def check_idle() -> None:
    """BadInput if this Ray serves something: its address would stay the old one, and its application be replaced."""
    running = sorted(ray_serve.status().applications)
    if running:
        raise BadInput(Problem(f"this Ray serves {', '.join(running)} already", "stop it first, or use another Ray"))


def check_host(host: str, insecure: bool) -> None:
    """BadInput if others than this machine could reach `host`, unless the user said that they may."""
    if insecure or _is_loopback(host):
        return
    raise BadInput(
        Problem(
            f"{host} can be reached from other machines, and the service has no keys: anyone there could use it",
            "serve on 127.0.0.1, or say --insecure if everyone who can reach it may use it",
        )
    )


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_port(host: str, port: int) -> None:
    """BadInput if `port` can't be listened on."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        # As servers do, or a port whose last connections are fading would look taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except (OSError, OverflowError) as error:
            raise BadInput(Problem(f"can't listen on {host}:{port}: {error}", "choose another with --port")) from error
