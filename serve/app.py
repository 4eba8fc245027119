"""The service on Ray Serve: an API in front, behind it replicas of each model's engine; started and stopped."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ray import serve as ray_serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, BackpressureConfig, RequestRouterConfig
from ray.serve.schema import LoggingConfig

from cluster import mirror
from cluster.errors import BadInput, Problem
from cluster.runs import folder_at
from serve.engines import EngineReplica, Engines
from serve.guards import LOOPBACK_HOSTS, Guard, Guards
from serve.keys import check_file
from serve.options import VLLM, ApplicationArgs, Options
from serve.routing import PrefixRouter
from serve.scaling import Policy

if TYPE_CHECKING:
    from ray.serve.handle import DeploymentHandle

NAME = "headwater"  # of the application, and of the deployment of its first model's replicas
INGRESS = "ingress"
# Ray Serve's limits lie beyond ours, which refuse in OpenAI's words and let the health checks through.
SPARE = 2
# A head without CPUs for work is no place for an ingress, whose clients it would take with it when it goes. Engines
# leave that much of what they may claim: there must be room next to one that claims a machine's only CPU.
INGRESS_CPUS = 0.05
METRICS_EVERY_S = 1.0
LOOK_BACK_S = 5.0
HEALTH_EVERY_S = 5.0


@ray_serve.deployment(name=INGRESS)
@ray_serve.ingress()
class Ingress:
    """The API: reads requests, knows the tokenizers, and passes ids on to the engines."""

    def __init__(
        self, folders: dict[str, str], engines: list[DeploymentHandle], options: Options, hosts: tuple[str, ...] | None
    ):
        self.folders = folders
        self.backends = [Engines(handle, options) for handle in engines]
        self.guards = Guards(
            keys_file=options.keys,
            hosts=hosts,
            deadline_s=options.deadline_s,
            sends_request_id=False,
            request_logger="ray.serve.requests",  # in the replica's own log, below Ray Serve's logger
        )

    def __serve_build_asgi_app__(self) -> Guard:
        """Called by Ray Serve after the constructor."""
        from llm.vocabulary import load_tokenizer
        from serve.api import Api
        from serve.models import Served, lineage_of

        models = {}
        for (name, folder), backend in zip(self.folders.items(), self.backends, strict=True):
            here = mirror.here(Path(folder))
            models[name] = Served(name, backend, load_tokenizer(here), lineage_of(here))
        return Api(models, self.guards).app()


def build(
    models: Mapping[str, Path], options: Options | None = None, *, hosts: tuple[str, ...] | None = None
) -> ray_serve.Application:
    """The Ray Serve application that serves model folders under their names, at `hosts` alone if they are given."""
    options = options or Options()
    # Where a link leads now: a replica that starts later is to load the same model.
    folders = {name: str(folder if mirror.key_of(folder) else folder.resolve()) for name, folder in models.items()}
    replicas = [
        engines(NAME if not number else f"{NAME}-{_tame(name)}", folder, options)
        for number, (name, folder) in enumerate(folders.items())
    ]
    deployment = Ingress.options(  # type: ignore[attr-defined]
        num_replicas=options.ingresses,
        max_ongoing_requests=SPARE * Guards().max_in_flight,
        ray_actor_options={"num_cpus": INGRESS_CPUS, "runtime_env": {"env_vars": _variables()}},
        **_lifetime(options),
    )
    return deployment.bind(folders, replicas, options, hosts)


def engines(name: str, folder: str, options: Options) -> ray_serve.Application:
    """The replicas of the model in `folder`, as the deployment `name`."""
    router = RequestRouterConfig(
        request_router_class=PrefixRouter, request_router_kwargs={"slack": max(1, options.slots // 2)}
    )
    deployment = EngineReplica.options(  # type: ignore[attr-defined]
        name=name,
        max_ongoing_requests=SPARE * options.max_requests,
        max_queued_requests=options.max_requests,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=1),
        max_constructor_retry_count=3,
        request_router_config=router,
        ray_actor_options={
            "num_cpus": round(max(options.cpus - INGRESS_CPUS * options.ingresses, options.cpus / 2), 4),
            "num_gpus": options.gpus,
            "runtime_env": {"env_vars": _variables()},
        },
        **_replicas(options),
        **_lifetime(options),
    )
    return deployment.bind(folder, options)


def _replicas(options: Options) -> dict[str, Any]:
    if not options.scales:
        return {"num_replicas": options.replicas}
    targets = {"target_tokens": options.target_tokens, "target_wait_s": options.target_wait_s}
    scaling = AutoscalingConfig(
        min_replicas=options.replicas,
        initial_replicas=max(1, options.replicas),
        max_replicas=options.most,
        metrics_interval_s=METRICS_EVERY_S,
        look_back_period_s=LOOK_BACK_S,
        upscale_delay_s=options.upscale_delay_s,
        downscale_delay_s=options.downscale_delay_s,
        policy=AutoscalingPolicy(policy_function=Policy, policy_kwargs=targets),
    )
    return {"num_replicas": None, "autoscaling_config": scaling}


def _lifetime(options: Options) -> dict[str, Any]:
    """How replicas end and are watched: what they have begun they finish, unless it takes longer than it may."""
    return {
        "graceful_shutdown_timeout_s": options.deadline_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "health_check_period_s": HEALTH_EVERY_S,
        "logging_config": LoggingConfig(enable_access_log=False),  # the guards write one
    }


def _variables() -> dict[str, str]:
    # By default OpenMP's threads spin while they wait for work; with as many of them as cores, Ray's own processes got
    # no core to pass the tokens on with: 32 streams on two cores gave 180 tokens/s, and 900 with threads that sleep.
    vllm = {name: os.environ[name] for name in (VLLM,) if name in os.environ}
    return {"OMP_WAIT_POLICY": "PASSIVE", **vllm, **mirror.same_everywhere()}


def _tame(name: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", name)


def application(args: dict[str, Any]) -> ray_serve.Application:
    """What a Serve configuration file names as `import_path: serve.app:application`.

    Such a file decides on the address too, usually one that others reach, so without keys `insecure` has to be said.
    """
    given = ApplicationArgs.model_validate(args)
    if not given.insecure and given.keys is None:
        raise BadInput(
            Problem(
                "the service has no keys, and a Serve configuration opens it to the network",
                "name a file of keys in `args` as `keys`, or say `insecure: true` there if everyone who can reach it "
                "may use it",
            )
        )
    folders = {given.model_name: given.model_folder, **given.also}
    options = Options.model_validate(given.model_dump(include=set(Options.model_fields)))
    return build({name: folder_at(folder) for name, folder in folders.items()}, options)


def start(
    models: Mapping[str, Path],
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    options: Options | None = None,
    insecure: bool = False,
) -> str:
    """Serve model folders, by their names, on the Ray that is initialised, and return the API's address.

    `/readyz` says when it is ready. BadInput, before anything starts, if a folder holds no model, others could reach
    `host` without a key, the port is taken, or this Ray serves already; afterwards, if a model can't be loaded.
    """
    options = options or Options()
    for folder in models.values():
        _check_model(Path(folder))
    if options.keys is not None:
        check_file(Path(options.keys))
    check_host(host, insecure or options.keys is not None)
    check_port(host, port)
    check_idle()
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # what starts where is not the user's business
    ray_serve.start(http_options={"host": host, "port": port})
    # A page whose name is made to point at this machine would talk to the service as if it were the page's own.
    hosts = LOOPBACK_HOSTS if _is_loopback(host) and options.keys is None else None
    try:
        ray_serve.run(build(models, options, hosts=hosts), name=NAME, route_prefix="/")
    except RuntimeError as error:
        raise BadInput(Problem(f"the service didn't start: {error}", "see its log, named above")) from error
    return f"http://{host}:{port}/v1"


def stop() -> None:
    """Stop the service, with Ray Serve on this Ray. Requests that it has begun come to their end first."""
    ray_serve.shutdown()


def _check_model(folder: Path) -> None:
    from llm.loading import continues_text

    try:
        continues_text(folder)
    except ValueError as error:
        raise BadInput(Problem(str(error), "give a run, or a folder with a Hugging Face model")) from error


def check_idle() -> None:
    """BadInput if this Ray serves something: its address would stay the old one, and its application be replaced."""
    running = sorted(ray_serve.status().applications)
    if running:
        raise BadInput(Problem(f"this Ray serves {', '.join(running)} already", "stop it first, or use another Ray"))


def check_host(host: str, allowed: bool) -> None:
    """BadInput if others than this machine could reach `host`, unless the user said or saw to it that they may."""
    if allowed or _is_loopback(host):
        return
    raise BadInput(
        Problem(
            f"{host} can be reached from other machines, and the service has no keys: anyone there could use it",
            "serve on 127.0.0.1, give it keys with --keys, or say --insecure if everyone who can reach it may use it",
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
