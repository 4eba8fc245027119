"""Forked processes are what `python SCRIPT` would be: its words, its environment, its end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster import forks
from cluster.local import CHECKOUT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux alone")

SAY = """
import json, os, sys
print(json.dumps({"argv": sys.argv, "folder": os.getcwd(), "first": sys.path[0], "color": os.environ.get("COLOR"),
                  "loaded": "csv" in sys.modules, "name": __name__, "pid": os.getpid(), "read": sys.stdin.read()}))
print("to the errors", file=sys.stderr)
"""


@pytest.fixture(scope="module")
def server() -> Iterator[forks.ForkServer]:
    server = forks.start(("csv",), {"PYTHONPATH": str(CHECKOUT)})
    yield server
    server.stop()
    assert server.process.returncode == 0


@pytest.fixture
def script(tmp_path):
    def write(text: str) -> Path:
        (tmp_path / "script.py").write_text(text)
        return tmp_path / "script.py"

    return write


def launch(server: forks.ForkServer, *words: object, **options) -> subprocess.Popen:
    command = f"exec {server.py_executable} {' '.join(map(str, words))}"  # as Ray puts it together
    return subprocess.Popen(["bash", "-c", command], text=True, **options)


def test_a_forked_process_has_its_launchers_words_folder_environment_and_streams(server, script, tmp_path):
    said = launch(
        server,
        *(script(SAY), "--flag", "value"),
        **{"cwd": tmp_path, "env": {**os.environ, "COLOR": "green"}},
        **{"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE},
    )
    output, errors = said.communicate("a line")
    told = json.loads(output)
    pid = told.pop("pid")
    assert pid != said.pid
    assert told == {
        "argv": [str(tmp_path / "script.py"), "--flag", "value"],
        "folder": str(tmp_path),
        "first": str(tmp_path),
        "color": "green",
        "loaded": True,  # by the server
        "name": "__main__",
        "read": "a line",
    }
    assert (errors, said.returncode) == ("to the errors\n", 0)


@pytest.mark.parametrize(
    ("text", "status"),
    [
        ("import sys; sys.exit(7)", 7),
        ("import sys; sys.exit('why')", 1),
        ("raise ValueError('no')", 1),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", -signal.SIGKILL),
        ("import os, signal; os.kill(os.getpid(), signal.SIGTERM)", -signal.SIGTERM),
    ],
)
def test_a_launcher_ends_as_the_forked_process_did(server, script, text, status):
    assert launch(server, script(text), stderr=subprocess.DEVNULL).wait(60) == status


def test_random_numbers_differ_between_forked_processes(server, script):
    path = script("import random; print(random.random())")
    assert len({launch(server, path, stdout=subprocess.PIPE).communicate()[0] for _ in range(3)}) == 3


def test_a_killed_launcher_takes_the_forked_process_with_it(server, script):
    waiting = launch(server, script("import os, time; print(os.getpid(), flush=True); time.sleep(600)"), stdout=-1)
    child = psutil.Process(int(waiting.stdout.readline()))
    waiting.kill()
    waiting.wait()
    assert not psutil.wait_procs([child], timeout=60)[1]


def test_a_server_ends_with_the_process_that_started_it(script):
    path = script(
        "import time\nfrom cluster import forks\n"
        "print(forks.start(('csv',), {}).process.pid, flush=True)\ntime.sleep(600)\n"
    )
    driver = subprocess.Popen(
        [sys.executable, path], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(CHECKOUT)}
    )
    server = psutil.Process(int(driver.stdout.readline()))
    driver.kill()
    driver.wait()
    assert not psutil.wait_procs([server], timeout=60)[1]


def test_without_a_server_the_script_runs_all_the_same(script):
    server = forks.start(("csv",), {"PYTHONPATH": str(CHECKOUT)})
    server.stop()
    assert launch(server, script("import sys; sys.exit(5)")).wait(60) == 5


@pytest.mark.parametrize("modules", [("ray",), ("tests.cluster.threaded",)])
def test_what_cannot_be_forked_is_not(modules, script):
    """The server ends by itself, and the script is run by a Python of its own."""
    server = forks.start(modules, {"PYTHONPATH": str(CHECKOUT)})
    assert server.process.wait(120) == 1
    assert launch(server, script("import sys; sys.exit(5)")).wait(60) == 5
    server.stop()


def test_what_training_imports_can_be_forked(script):
    from pipelines.training import IMPORTED

    variables = {"PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    server = forks.start(IMPORTED, {**variables, "DS_ACCELERATOR": "cpu"})
    asking = launch(server, script(f"import sys; print([one in sys.modules for one in {IMPORTED}])"), stdout=-1)
    assert asking.communicate()[0] == f"{[True] * len(IMPORTED)}\n"
    server.stop()


def test_a_killed_server_takes_the_forked_processes_with_it(script):
    server = forks.start(("csv",), {"PYTHONPATH": str(CHECKOUT)})
    waiting = launch(server, script("import os, time; print(os.getpid(), flush=True); time.sleep(600)"), stdout=-1)
    child = psutil.Process(int(waiting.stdout.readline()))
    server.process.kill()
    assert waiting.wait(60) == -signal.SIGKILL
    assert not psutil.wait_procs([child], timeout=60)[1]
    server.stop()
