"""The service in this process, without Ray: the same API over the same replica, on a port of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from llm.loading import load
from llm.vocabulary import load_tokenizer
from serve.api import Api
from serve.guards import Guards
from serve.models import Served, lineage_of
from serve.replica import Replica
from tests.serve.conftest import wait_until_ready


@contextmanager
def local_service(
    model_folder: Path, *model_names: str, guards: Guards | None = None, slots: int = 4
) -> Iterator[str]:
    """The address of the ready service, `http://…/v1`; each name gets an engine of its own."""

    def served(name: str) -> Served:
        replica = Replica(lambda: load(model_folder, slots=slots))
        return Served(name, replica, load_tokenizer(model_folder), lineage_of(model_folder))

    def app():  # made by the server, in its event loop
        return Api({name: served(name) for name in model_names}, guards).app()

    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, factory=True, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            address = f"http://127.0.0.1:{listening.getsockname()[1]}"
            wait_until_ready(address)
            yield f"{address}/v1"
        finally:
            server.should_exit = True
            thread.join()
