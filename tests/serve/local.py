"""The service in this process, without Ray: the same API over the same replica, on a port of its own."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from llm.loading import load
from serve.api import Api
from serve.replica import Replica
from tests.serve.conftest import wait_until_ready


@contextmanager
def local_service(model_folder: Path, model_name: str) -> Iterator[str]:
    """The address of the ready service, `http://…/v1`."""

    def app():  # made by the server, in its event loop
        return Api(Replica(lambda: load(model_folder, slots=4)), model_name).app()

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
