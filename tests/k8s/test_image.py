"""The image: every path, package and entry point that its Dockerfile names exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import tomllib
from fnmatch import fnmatch

import pytest

from cluster.manifests import K8S
from tests.commands import CHECKOUT
from tests.k8s.manifests_of import EVERYTHING, documents_of
from tests.k8s.policy import containers, pods

PROJECT = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())
PINS = dict(re.match(r"([\w-]+)(?:\[.*\])?==(.*)", pin).groups() for pin in PROJECT["project"]["dependencies"])
VERSION = PROJECT["project"]["version"]
PYTHON = "3.11"


def instructions() -> list[tuple[str, str]]:
    """(word, rest) of each instruction, lines joined and comments left out."""
    text = (K8S / "Dockerfile").read_text()
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [tuple(line.split(None, 1)) for line in joined.splitlines() if line.strip()]


INSTRUCTIONS = instructions()


def rest_of(word: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == word]


def commands() -> list[list[str]]:
    """The commands of all RUN instructions, as words."""
    parts = (part for run in rest_of("RUN") for part in re.split(r"&&|;|\bthen\b|\bif\b|\bfi\b", run))
    return [words for part in parts if (words := shlex.split(part))]


def arguments_of(*start: str) -> list[list[str]]:
    """What follows `start` in the commands that begin so; variables set before a command are not part of it."""
    bare = [[*(word for word in words if not re.match(r"\w+=\d$", word))] for words in commands()]
    return [words[len(start) :] for words in bare if tuple(words[: len(start)]) == start]


def test_only_instructions_that_docker_knows():
    known = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "USER", "ENTRYPOINT", "CMD"}
    assert {name for name, _ in INSTRUCTIONS} <= known


def test_stages_stand_on_the_base_or_on_one_another():
    declared = {rest.split("=")[0]: rest.partition("=")[2] for rest in rest_of("ARG")}
    assert declared["BASE"] == f"python:{PYTHON}-slim-bookworm"
    names = ["${BASE}"]
    for stage in rest_of("FROM"):
        base, word, name = stage.split()
        assert word == "AS"
        assert base in names
        names.append(name)
    assert len(names) > 3, "what builds is not what runs"
    assert rest_of("FROM")[-1].split()[0] != "build"


def test_every_path_that_is_copied_exists():
    ignored = [line for line in (K8S / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")]
    copied = [words for words in map(str.split, rest_of("COPY")) if not words[0].startswith("--")]
    for *sources, _ in copied:
        for source in sources:
            assert (CHECKOUT / source).exists(), source
            assert f"!{source}" in ignored, f"{source} is not part of what docker is sent"
    for kept in ignored:
        assert (CHECKOUT / kept[1:]).exists(), kept


def test_what_is_copied_from_a_stage_was_made_there():
    made = {words[-1] for words in commands() if "venv" in words}
    stages = {rest.split()[2] for rest in rest_of("FROM")}
    for words in map(str.split, rest_of("COPY")):
        if words[0].startswith("--from="):
            assert words[0].removeprefix("--from=") in stages
            assert words[1] in made
    assert any(f"{folder}/bin" in rest for folder in made for rest in rest_of("ENV"))


def test_the_build_has_what_it_needs_and_nothing_else_of_the_checkout():
    copied = {source for words in map(str.split, rest_of("COPY")) if words[0][0] != "-" for source in words[:-1]}
    project = PROJECT["project"]
    needed = {
        *{name.split(".")[0] for name in PROJECT["tool"]["setuptools"]["packages"]},
        "pyproject.toml",
        project["readme"],
        *project["license-files"],
    }
    assert copied == needed


def test_every_python_package_is_one_of_the_projects():
    tools = {"setuptools", "wheel", "ninja"}  # what DeepSpeed builds its operators with
    for words in arguments_of("pip", "install"):
        for word in (word for word in words if not word.startswith("-") and word != "."):
            name, _, pin = word.partition("==")
            assert name in PINS or name in tools, word
            if name in PINS and pin:
                assert pin == PINS[name]
    assert ["."] in arguments_of("pip", "install")
    assert any(f"deepspeed=={PINS['deepspeed']}" in words for words in arguments_of("pip", "install"))


def test_every_debian_package_is_expected():
    """By name; and in Debian's own list where this machine has it."""
    named = {word for words in arguments_of("apt-get", "install") for word in words if not word.startswith(("-", "/"))}
    python = {f"python{PYTHON}", f"python{PYTHON}-venv", f"python{PYTHON}-dev"}
    assert named == {"bash", "ca-certificates", "wget", "libaio1", "libaio-dev", *python}
    listed = set(subprocess.run(["apt-cache", "pkgnames"], capture_output=True, text=True).stdout.split())
    assert len(listed) < 10_000 or named <= listed


def test_the_python_is_one_that_the_project_runs_on():
    assert PROJECT["project"]["requires-python"] == f">={PYTHON},<3.12"
    assert all(words[0] == f"python{PYTHON}" for words in commands() if "venv" in words)


def test_whoever_runs_it_has_no_rights():
    (user,) = rest_of("USER")
    uid, gid = map(int, user.split(":"))
    names = [name for name, _ in INSTRUCTIONS]
    assert names.index("USER") > len(names) - names[::-1].index("FROM"), "in the last stage"
    ours = {
        (spec["securityContext"]["runAsUser"], spec["securityContext"]["runAsGroup"])
        for name, spec in pods(documents_of("overlays/production"))
        if not name.startswith("StatefulSet")
    }
    assert ours == {(uid, gid)}


def test_its_command_is_an_entry_point():
    (command,) = rest_of("CMD")
    program = re.findall(r'"([^"]+)"', command)[0]
    module, _, function = PROJECT["project"]["scripts"][program].partition(":")
    source = (CHECKOUT / f"{module.replace('.', '/')}.py").read_text()
    assert f"def {function}(" in source
    assert module.split(".")[0] in PROJECT["tool"]["setuptools"]["packages"]


def test_no_secret_is_built_in():
    for name, rest in INSTRUCTIONS:
        if name in ("ENV", "ARG"):
            assert not re.search(r"KEY|TOKEN|PASSWORD|SECRET", rest), rest
    assert "*" in (K8S / "Dockerfile.dockerignore").read_text().split()


@pytest.mark.parametrize("source", EVERYTHING)
def test_the_manifests_run_this_image_and_this_ray(source):
    tags = re.findall(r"-t (headwater:\S+)", (K8S / "Dockerfile").read_text())
    assert set(tags) == {f"headwater:{VERSION}", f"headwater:{VERSION}-cuda"}
    images = {container["image"] for _, container in containers(documents_of(source)) if "image" in container}
    assert all(image in tags or fnmatch(image, "redis:*") for image in images)
    versions = {
        cluster["rayVersion"]
        for document in documents_of(source)
        for cluster in (
            document.get("spec", {}),
            *(document.get("spec", {}).get(f, {}) for f in ("rayClusterSpec", "rayClusterConfig")),
        )
        if "rayVersion" in cluster
    }
    assert versions == {PINS["ray"]}
