"""What the doctor finds: judged from made-up nodes, and tried on real storage and real ports."""

from __future__ import annotations

import dataclasses
import os
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from cluster import doctor, mirror
from cluster.doctor import Finding, Node, judge

VERSIONS = dict.fromkeys(("python", *doctor.PACKAGES), "1.0")
SOUND = Node("here", VERSIONS, shm_free=4 << 30, disk_free=100 << 30, open_files=65536)


def found(nodes: list[Node], what: str, wanted: dict[str, str] | None = None) -> Finding:
    return next(one for one in judge(nodes, wanted or {}) if one.what == what)


def test_a_sound_node_has_nothing_wrong():
    assert {one.state for one in judge([SOUND], VERSIONS)} == {"ok"}


@pytest.mark.parametrize(
    ("change", "what", "state", "said"),
    [
        ({"versions": {**VERSIONS, "torch": "2.0"}}, "versions", "failure", "torch is 2.0 on there, 1.0 here"),
        ({"shm_free": 1 << 30}, "shared memory", "warning", "1.0 GiB free on there"),
        ({"disk_free": 1 << 30}, "disk under the run root", "warning", "1.0 GiB free on there"),
        ({"open_files": 1024}, "open files", "warning", "1024 a process on there"),
        ({"storage": {"append": "no"}}, "run root", "failure", "can't append on there: no"),
    ],
)
def test_what_is_wrong_on_one_node_is_named_with_its_remedy(change, what, state, said):
    finding = found([SOUND, dataclasses.replace(SOUND, host="there", **change)], what)
    assert (finding.state, said in finding.found, bool(finding.remedy)) == (state, True, True)


def test_versions_that_were_not_tested_are_a_warning():
    finding = found([SOUND], "versions", {"ray": "9.9"})
    assert (finding.state, finding.found) == ("warning", "ray 1.0 (tested: 9.9)")


def test_the_versions_tested_are_those_that_are_pinned():
    wanted = doctor.tested_versions()
    assert wanted["ray"] == doctor.examine_versions()["ray"]


def test_storage_is_tried_and_left_as_it_was(tmp_path):
    assert doctor.storage_problems(tmp_path / "runs") == {}
    assert os.listdir(tmp_path / "runs") == []


def test_a_root_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    assert list(doctor.storage_problems(tmp_path / "file")) == ["be written to"]


def test_storage_that_forgets_its_locks_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(doctor.fcntl, "flock", lambda *_: None)
    assert list(doctor.storage_problems(tmp_path)) == ["lock a file"]


def test_a_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        monkeypatch.setattr(doctor, "PORTS", {port: "somebody"})
        taken = doctor.local_findings()[0]
    assert (taken.state, taken.found) == ("warning", f"taken: {port} (somebody)")


@pytest.mark.parametrize(
    ("variables", "mode", "state"),
    [
        ({"RAY_AUTH_MODE": "disabled"}, None, "failure"),
        ({"RAY_AUTH_TOKEN": "x"}, None, "ok"),
        ({}, None, "warning"),
        ({}, 0o644, "warning"),
        ({}, 0o600, "ok"),
    ],
)
def test_the_token(tmp_path, monkeypatch, variables, mode, state):
    path = tmp_path / "token"
    if mode is not None:
        path.write_text("x")
        path.chmod(mode)
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**variables, "RAY_AUTH_TOKEN_PATH": str(path)}.items():
        monkeypatch.setenv(name, value)
    assert doctor.local_findings()[1].state == state


KEY = "0123456789abcdef" * 3


@pytest.mark.parametrize(
    ("variables", "state", "said"),
    [
        ({}, "ok", "no key: runs are kept"),
        ({"WANDB_API_KEY": KEY, "WANDB_MODE": "offline"}, "ok", "WANDB_MODE=offline: runs are kept"),
        ({"WANDB_API_KEY": "my key"}, "warning", "6 characters and is no key"),
        ({"WANDB_API_KEY": KEY, "WANDB_BASE_URL": "http://127.0.0.1:9"}, "warning", "127.0.0.1:9 is not reached"),
    ],
)
def test_whether_runs_can_be_sent_to_wandb(monkeypatch, variables, state, said):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    finding = doctor.driver_findings()[1]
    assert (finding.state, said in finding.found) == (state, True)
    assert bool(finding.remedy) == (state != "ok")


def test_a_wandb_server_that_is_reached(monkeypatch):
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.delenv("WANDB_MODE", raising=False)
        assert doctor.driver_findings()[1].found == "a key is set: runs are sent to 127.0.0.1"


class Answers(BaseHTTPRequestHandler):
    """A Jobs API that answers everyone, or nobody without a token."""

    code = 200

    def do_GET(self):
        self.send_response(401 if self.code == 401 and "Authorization" not in self.headers else 200)
        self.end_headers()

    def log_message(self, *words):
        pass


@pytest.mark.parametrize(("code", "state"), [(401, "ok"), (200, "failure")])
def test_a_jobs_api_that_answers_everyone_is_found(code, state):
    server = HTTPServer(("127.0.0.1", 0), type("Answering", (Answers,), {"code": code}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        finding = doctor.jobs_api_finding(f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    assert (finding.state, "RAY_AUTH_MODE=token" in finding.remedy) == (state, state == "failure")


def test_a_jobs_api_that_does_not_answer_is_named():
    finding = doctor.jobs_api_finding("http://127.0.0.1:9")
    assert (finding.state, "127.0.0.1:9" in finding.found, bool(finding.remedy)) == ("failure", True, True)


def test_object_storage_that_does_not_answer_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADWATER_CACHE", str(tmp_path))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("HEADWATER_STORAGE_WAIT_S", "0")
    for name, value in {"ACCESS_KEY_ID": "key", "SECRET_ACCESS_KEY": "secret", "REGION": "us-east-1"}.items():
        monkeypatch.setenv(f"AWS_{name}", value)
    (said,) = doctor.storage_problems(mirror.local("s3://bucket/runs")).items()
    assert (said[0], "http://127.0.0.1:9" in said[1], "NETWORK_CONNECTION" in said[1]) == ("be used", True, True)
