"""Join a running Ray, or start one here."""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cluster import forks, mirror
from cluster.errors import PreflightRefused, Problem
from cluster.progress import console

CHECKOUT = Path(__file__).resolve().parent.parent

# For the driver and, through the runtime environment, for every worker.
QUIET = {
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_ENABLE_V2_MIGRATION_WARNINGS": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_task_oom_retries": "4",  # Ray's own is without end, and a task that doesn't fit never will
    "TOKENIZERS_PARALLELISM": "true",
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_VERBOSITY": "error",
}
# Where Ray is this machine alone: no watcher for nodes about to be taken away, whose actor costs seconds to start, and
# workers looked at more often than every 2 s, which is how long Ray Train takes to see that they have ended. A process
# whose task is done is kept half a minute for the next, with all that it has imported, rather than a second; not for
# ever, for an idle process of Ray's wakes up a hundred times a second, which training waits for. Those that Ray starts
# in advance fit none of our tasks, which have a runtime environment. Nothing here reads Ray's own metrics.
ALONE = {
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    "RAY_num_workers_soft_limit": "0",
    "RAY_idle_worker_killing_time_threshold_ms": "30000",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_prestart_worker_first_driver": "0",
}
# For Ray Serve's own processes, which take these from the Ray that starts them. A proxy on a busy machine takes longer
# than three times 5 s to be ready; one that is gone is missed after a second, not ten. One is serve/proxies.py's.
SERVING = {
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "serve.proxies:middlewares",
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "30",
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
}


@contextmanager
def ray_session(address: str | None, object_store_mb: int) -> Iterator[bool]:
    """Ray for as long as the block lasts: the cluster at `address` or RAY_ADDRESS, else a local one that ends with it.

    The block is told whether Ray is local, so that what it starts there need not be stopped by hand.

    On a cluster the code travels with the job (`ray job submit --working-dir .`); here workers find it by path.
    """
    os.environ.update({key: value for key, value in QUIET.items() if key not in os.environ})
    import ray

    address = address or os.environ.get("RAY_ADDRESS")
    for name in ("ray", "ray.data", "ray.train", "ray.serve"):
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        with console.status("starting Ray" if not address else f"joining Ray at {address}"):
            _connect(address, object_store_mb)
    except ConnectionError as error:
        raise PreflightRefused(
            Problem(f"no Ray cluster at {address}: {error}", "start it, or unset cluster.address and RAY_ADDRESS")
        ) from None
    _quieten_data()
    with _forking(local=not address):
        try:
            yield not address
        finally:
            ray.shutdown()


def _connect(address: str | None, object_store_mb: int) -> None:
    import ray

    if not address:
        os.environ.update({key: value for key, value in (ALONE | SERVING).items() if key not in os.environ})
    environment = {"env_vars": {**QUIET, "PYTHONPATH": _python_path(), **mirror.same_everywhere()}}
    common = {"runtime_env": environment, "log_to_driver": False, "logging_level": logging.ERROR}
    ours = signal.getsignal(signal.SIGTERM)
    if address:
        ray.init(address=address, **common)
    else:
        ray.init(num_cpus=usable_cpus(), include_dashboard=False, object_store_memory=object_store_mb << 20, **common)
        _end_log_monitor()
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, ours)  # Ray puts in its own, which exits with 15


_servers: dict[tuple[str, ...], forks.ForkServer] | None = (
    None  # by what they have imported; None: workers aren't forked
)


@contextmanager
def _forking(*, local: bool) -> Iterator[None]:
    """On a Ray of this process's own, workers may be forked for as long as the block lasts."""
    global _servers
    _servers = {} if local and sys.platform == "linux" else None
    try:
        yield
    finally:
        running, _servers = _servers, None
        for server in (running or {}).values():
            server.stop()


def forked_workers(modules: tuple[str, ...]) -> dict[str, str]:
    """What a worker's runtime environment says so that it starts with `modules` imported: nothing on a cluster, whose
    workers are started by Ray on machines of their own.
    """
    if _servers is None:
        return {}
    if modules not in _servers:
        # One thread: a pool that a library starts when it is imported would not be there in the forked process.
        single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        _servers[modules] = forks.start(modules, {**QUIET, **single, "PYTHONPATH": _python_path()})
    return {"py_executable": _servers[modules].py_executable}


def _end_log_monitor() -> None:
    """It hands on what workers print, which nobody here asks for, and takes 1 % of a core for that."""
    from ray._private.worker import global_worker

    global_worker.node.kill_log_monitor()


def _python_path() -> str:
    inherited = os.environ.get("PYTHONPATH", "")
    return os.pathsep.join(part for part in (str(CHECKOUT), inherited) if part)


def _quieten_data() -> None:
    from ray.data import DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # says that bars are off, each time


def usable_cpus() -> int:
    """CPUs that this process may use, which in a container can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def expected_resources(address: str | None) -> dict[str, float] | None:
    """CPUs and GPUs that a local Ray will have; None for a cluster, which only answers once joined."""
    if address or os.environ.get("RAY_ADDRESS"):
        return None
    return {"CPU": float(usable_cpus()), "GPU": 0.0}
