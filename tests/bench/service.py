"""A service to measure, in a process of its own until it is told to stop: python -m tests.bench.service ORDER.

order, as JSON: `kind` ray: as `headwater serve` starts it; uvicorn: the same API and engine in this process, without
Ray. `folder`, `name`, `port`, `slots`, `threads`, `options`: further ones of serve.options.Options.
"""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any


def on_ray(order: dict[str, Any]) -> None:
    from cluster.local import ray_session
    from pipelines.schema import ClusterSettings

    with ray_session(None, ClusterSettings().object_store_mb):
        from serve import app
        from serve.options import Options

        options = Options(cpus=order["threads"], slots=order["slots"], **order["options"])
        app.start({order["name"]: Path(order["folder"])}, port=order["port"], options=options)
        signal.pause()


def on_uvicorn(order: dict[str, Any]) -> None:
    import torch
    import uvicorn

    from llm.loading import load
    from llm.vocabulary import load_tokenizer
    from serve.api import Api
    from serve.models import Served
    from serve.replica import Replica

    torch.set_num_threads(order["threads"])
    folder = Path(order["folder"])

    def app():  # made by the server, in its event loop
        replica = Replica(lambda: load(folder, slots=order["slots"]))
        return Api({order["name"]: Served(order["name"], replica, load_tokenizer(folder))}).app()

    uvicorn.run(app, factory=True, port=order["port"], log_level="warning")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    given = json.loads(sys.argv[1])
    {"ray": on_ray, "uvicorn": on_uvicorn}[given["kind"]](given)
