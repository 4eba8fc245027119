"""A recipe as Kubernetes manifests: the objects of k8s/, with the names, the command and the sizes of the recipe.

k8s/base says what the objects are. An overlay changes them by JSON patches (RFC 6902) and is applied here as kustomize
applies it: of kustomize this knows what the folder k8s/ uses, and a test compares the two. The recipe has the last
word.
"""

from __future__ import annotations

import copy
import itertools
import math
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cluster.errors import BadInput, Problem
from cluster.preflight import Piece, starving_problems

K8S = Path(__file__).resolve().parent.parent / "k8s"
RAY_KINDS = ("RayCluster", "RayJob", "RayService")
COMPONENT = "app.kubernetes.io/component"
GPU = "nvidia.com/gpu"
DISK = "ephemeral-storage"
RECIPE = "/etc/headwater/recipe.yaml"
LONGEST_OBJECT = 47  # KubeRay adds six characters for a job's cluster, and up to ten for that cluster's services
LONGEST_NAME = LONGEST_OBJECT - len("headwater-") - len("-tokenizer")
SMALLEST_DISK = 10  # GiB
SMALLEST_MEMORY = 2  # GiB, what the overlay `laptop` asks for
KEYS = "/etc/headwater-keys/keys.json"  # from the Secret `headwater-keys`
OURS = ("replicas", "max_replicas", "keys")  # of a service's arguments, which the cluster has a word in
SCRATCH = "/tmp"  # of each pod, writable

Document = dict[str, Any]


@dataclass(frozen=True)
class Need:
    """What a stage, or the service, needs at once: pieces that each fit into one pod, and CPUs beside them."""

    component: str
    pieces: int
    cpus: float  # of one piece
    gpus: float = 0.0  # of one piece
    shared_cpus: float = 0.0  # of Ray Data's tasks, in whichever pod
    least: int | None = None  # pieces that are enough, where their number isn't fixed

    @property
    def fewest(self) -> int:
        return self.pieces if self.least is None else self.least


@dataclass(frozen=True)
class Node:
    """The largest pod that a node of the cluster has room for."""

    cpus: int = 8
    gpus: int = 8
    memory_per_cpu: float = 4.0  # GiB


@dataclass(frozen=True)
class Pods:
    """The workers of a cluster: how many at most and at least, and what each has."""

    most: int
    least: int
    cpus: int
    gpus: int


@dataclass(frozen=True)
class Order:
    """A recipe as far as Kubernetes is concerned. `root` holds all runs: an absolute path or s3://BUCKET/PREFIX."""

    name: str
    recipe: str  # the resolved recipe, as YAML
    root: str
    stages: tuple[Need, ...]
    service: Need
    service_args: dict[str, Any]  # of serve.app:application, but for the model and who may ask it
    disk_bytes: int
    paths: tuple[tuple[str, str], ...] = ()  # folders and files that the recipe names, after the settings that do
    address: str | None = None  # of a Ray that the recipe names
    node: Node = Node()
    image: str | None = None  # None keeps what the manifests and the overlays say

    @property
    def run(self) -> str:
        return f"{self.root.rstrip('/')}/{self.name}"

    @property
    def in_object_store(self) -> bool:
        return self.root.startswith("s3://")


def overlays() -> list[str]:
    """Names of the overlays that come with the project."""
    return sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml"))


def render(order: Order, chosen: Sequence[str] = ()) -> list[Document]:
    """The manifests of `order` with the overlays `chosen`, in that order. BadInput with all that is wrong."""
    problems = list(_problems(order, chosen))
    if problems:
        raise BadInput(*problems)
    documents = layer(K8S / "base")
    for name in chosen:
        documents = layer(K8S / "overlays" / name, documents)
    filled = [_filled(document, order) for document in documents if _wanted(document, order)]
    return [*filled, _recipe_map(order)]


def _problems(order: Order, chosen: Sequence[str]) -> Iterator[Problem]:
    if not (K8S / "base").is_dir():
        yield Problem(f"no manifests at {K8S}", "give the command from a checkout of the project")
    for name in set(chosen) - set(overlays()):
        yield Problem(f"no overlay '{name}'", f"there are {', '.join(overlays())}")
    if not re.fullmatch(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?", order.name) or len(order.name) > LONGEST_NAME:
        yield Problem(
            f"the run's name '{order.name}' can't be part of a Kubernetes name",
            f"name=... with small letters, digits and dashes inside, {LONGEST_NAME} characters at most",
        )
    if not re.fullmatch(r"(s3:/)?(/[A-Za-z0-9][A-Za-z0-9._-]*)+/?", order.root):
        yield Problem(
            f"pods can't keep runs at '{order.root}'",
            "--runs with an absolute path or s3://BUCKET/PREFIX, of letters, digits, dots, dashes and underscores",
        )
    node = order.node
    if node.cpus < 1 or node.gpus < 0 or node.memory_per_cpu < SMALLEST_MEMORY:
        what = f"a pod of {node.cpus} CPUs, {node.gpus} GPUs and {node.memory_per_cpu:g} GiB a CPU holds no Ray worker"
        yield Problem(what, f"1 CPU at least, no GPU or more, {SMALLEST_MEMORY} GiB at least")
        return
    for need in (*order.stages, order.service):
        yield from _size_problems(need, node)
    yield from _starving_problems(order)
    yield from _unseen_problems(order)


def _starving_problems(order: Order) -> Iterator[Problem]:
    """Where the number of workers isn't fixed, they take all the room of a pod, and may leave Ray Data none."""
    for need in (need for need in order.stages if need.fewest < need.pieces):
        for pods in dict.fromkeys((pods_for(need, order.node), pods_for_all(order.stages, order.node))):
            yield from _starving(need, pods.cpus, pods.gpus)


def _unseen_problems(order: Order) -> Iterator[Problem]:
    """Paths that mean something on the machine where the recipe was written, and nothing in a pod."""
    volume = [] if order.in_object_store else [order.root]
    for setting, path in order.paths:
        if not any(_lies_under(path, folder) for folder in volume):
            there = (
                f"put it under {order.root} on the volume, or into object storage" if volume else "put it there too"
            )
            yield Problem(f"{setting} is '{path}', which no pod sees", f"{there}: s3://BUCKET/PREFIX")
    if order.address:
        yield Problem(f"cluster.address is '{order.address}', and a job runs on a Ray of its own", "set it to null")


def _lies_under(path: str, folder: str) -> bool:
    return ".." not in Path(path).parts and Path(path).is_relative_to(folder)


def _size_problems(need: Need, node: Node) -> Iterator[Problem]:
    if need.cpus + need.shared_cpus > node.cpus:
        what = f"{need.component}: one process needs {need.cpus:g} CPUs, and {need.shared_cpus:g} beside it"
        yield Problem(
            f"{what}, the largest pod has {node.cpus}", f"give {need.component} fewer CPUs, or raise --pod-cpus"
        )
    if need.gpus > node.gpus:
        what = f"{need.component}: one process needs {need.gpus:g} GPUs"
        yield Problem(
            f"{what}, the largest pod has {node.gpus}", f"give {need.component} fewer GPUs, or raise --pod-gpus"
        )


# Sizes


def pods_for(need: Need, node: Node) -> Pods:
    """Pods that hold every piece of `need`, as few as can be, each with room for Ray Data's tasks."""
    return pods_for_all([need], node)


def _fewest_pods(need: Need, node: Node) -> Pods:
    room = [need.pieces, math.floor((node.cpus - need.shared_cpus) / need.cpus + 1e-9)]
    if need.gpus:
        room.append(math.floor(node.gpus / need.gpus + 1e-9))
    together = max(1, min(room))
    most, least = math.ceil(need.pieces / together), math.ceil(need.fewest / together)
    cpus = math.ceil(together * need.cpus + need.shared_cpus - 1e-9)
    return Pods(most, least, max(1, cpus), math.ceil(together * need.gpus - 1e-9))


def pods_for_all(needs: Iterable[Need], node: Node) -> Pods:
    """Pods that are enough for each of `needs` in turn."""
    needs = list(needs)
    each = [_fewest_pods(need, node) for need in needs]
    cpus, gpus = max(pods.cpus for pods in each), max(pods.gpus for pods in each)
    elastic = [need for need in needs if need.fewest < need.pieces]
    fed = (size for size in range(cpus, node.cpus + 1) if not any(_starving(need, size, gpus) for need in elastic))
    return Pods(max(pods.most for pods in each), min(pods.least for pods in each), next(fed, cpus), gpus)


def _starving(need: Need, cpus: int, gpus: int) -> list[Problem]:
    """What is wrong with pods of that size, where as many pieces as fit would leave Ray Data nothing."""
    pod = {"CPU": float(cpus), "GPU": float(gpus)}
    worker = Piece("worker", "", need.cpus, need.gpus, need.fewest, need.pieces)
    return starving_problems(need.component, worker, need.shared_cpus, [pod])


# Filling in


def _wanted(document: Document, order: Order) -> bool:
    return not (order.in_object_store and document["metadata"]["name"] == "headwater-runs")


def _filled(document: Document, order: Order) -> Document:
    """`document` with what the recipe decides."""
    document = copy.deepcopy(document)
    if document["kind"] in RAY_KINDS:
        FILL[document["kind"]](document, order)
        for spec in pod_specs(document):
            _place(spec, order)
    elif document["metadata"]["name"] == "headwater-runs":
        gib = max(SMALLEST_DISK, math.ceil(order.disk_bytes * 1.25 / 2**30))
        if gib > _gib(document["spec"]["resources"]["requests"]["storage"]):
            document["spec"]["resources"]["requests"]["storage"] = f"{gib}Gi"
    return document


def _gib(quantity: str) -> int:
    return int(quantity.removesuffix("Gi"))


def _fill_job(document: Document, order: Order) -> None:
    component = document["metadata"]["labels"][COMPONENT]
    journey = component == "journey"
    document["metadata"]["name"] = f"headwater-{order.name}" + ("" if journey else f"-{component}")
    verb = "run" if journey else component
    document["spec"]["entrypoint"] = f"python -m pipelines {verb} {RECIPE} --runs {order.root}"
    needs = [need for need in order.stages if journey or need.component == component]
    cluster = cluster_of(document)
    _size_workers(cluster, pods_for_all(needs, order.node), order.node)
    _mount_recipe(cluster["headGroupSpec"]["template"]["spec"], order)


def _fill_cluster(document: Document, order: Order) -> None:
    """As large as the journey needs at once: a preflight compares with what is there, not with what could come."""
    document["metadata"]["name"] = f"headwater-{order.name}-dev"
    cluster = cluster_of(document)
    pods = pods_for_all(order.stages, order.node)
    spare = cluster["workerGroupSpecs"][0]["maxReplicas"]
    _size_workers(cluster, pods, order.node)
    cluster["workerGroupSpecs"][0] |= {"minReplicas": pods.most, "maxReplicas": max(pods.most, spare)}
    _mount_recipe(cluster["headGroupSpec"]["template"]["spec"], order)


def _fill_service(document: Document, order: Order) -> None:
    """A replica claims a whole pod, so that losing a pod costs one replica."""
    document["metadata"]["name"] = f"headwater-{order.name}"
    cluster = cluster_of(document)
    config = yaml.safe_load(document["spec"]["serveConfigV2"])
    (application,) = config["applications"]
    asked = max(order.service.fewest, application["args"].get("replicas", 0))  # an overlay may want more
    least = max(1, asked)  # somebody has to answer that the model is being loaded
    most = max(least, order.service.pieces) if cluster["enableInTreeAutoscaling"] else least
    pods = Pods(most, least, math.ceil(order.service.cpus), math.ceil(order.service.gpus))
    replicas = {"replicas": asked, "max_replicas": most} if asked < most else {"replicas": most}
    application["args"] = {
        "model_folder": f"{order.run}/rlhf/model",
        "model_name": order.name,
        **{name: value for name, value in order.service_args.items() if value is not None and name not in OURS},
        **replicas,
        "cpus": pods.cpus,
        **({"keys": KEYS} if order.service_args.get("keys") else {"insecure": True}),
    }
    document["spec"]["serveConfigV2"] = yaml.safe_dump(config, sort_keys=False)
    _size_workers(cluster, pods, order.node)
    cluster["workerGroupSpecs"][0]["replicas"] = least
    if order.service_args.get("keys"):
        _mount_keys(cluster["workerGroupSpecs"][0]["template"]["spec"])


def _mount_keys(spec: Document) -> None:
    """The file of the keys' hashes, as a Secret that is read again when it changes."""
    secret = {"secretName": "headwater-keys", "defaultMode": 0o440}
    spec["volumes"] = [*spec["volumes"], {"name": "keys", "secret": secret}]
    mount = {"name": "keys", "mountPath": str(Path(KEYS).parent), "readOnly": True}
    spec["containers"][0]["volumeMounts"] = [*spec["containers"][0]["volumeMounts"], mount]


FILL = {"RayJob": _fill_job, "RayCluster": _fill_cluster, "RayService": _fill_service}


def _size_workers(cluster: Document, pods: Pods, node: Node) -> None:
    """As many workers as `pods`, of its size; a cluster that does not scale itself has its full size all the time."""
    (group,) = cluster["workerGroupSpecs"]
    least = pods.least if cluster["enableInTreeAutoscaling"] else pods.most
    group |= {"replicas": pods.most, "minReplicas": least, "maxReplicas": pods.most}
    resources = group["template"]["spec"]["containers"][0]["resources"]
    limits = {name: value for name, value in resources["limits"].items() if name != GPU}
    limits |= {"cpu": str(pods.cpus), "memory": f"{math.ceil(pods.cpus * node.memory_per_cpu)}Gi"}
    gpus = {GPU: str(pods.gpus)} if pods.gpus else {}
    modest = resources["requests"] != resources["limits"]  # an overlay asks for less than it may take
    requests = {name: value for name, value in resources["requests"].items() if name != GPU} if modest else limits
    group["template"]["spec"]["containers"][0]["resources"] = {
        "requests": {**requests, **gpus},
        "limits": {**limits, **gpus},
    }


def _place(spec: Document, order: Order) -> None:
    """Say to a pod where the runs are and which image it runs."""
    for container in spec["containers"]:
        if order.image:
            container["image"] = order.image
        for variable in container.get("env", ()):
            if variable["name"] == "HEADWATER_RUN":
                variable["value"] = order.run
        for mount in container["volumeMounts"]:
            if mount["name"] == "runs":
                mount["mountPath"] = order.root
        if order.in_object_store:
            container["volumeMounts"] = _without_runs(container["volumeMounts"])
    if order.in_object_store:
        spec["volumes"] = _without_runs(spec["volumes"])
    if order.in_object_store and spec["containers"][0]["name"] in ("ray-head", "ray-worker"):
        _make_room(spec, math.ceil(order.disk_bytes * 1.25 / 2**30))


def _make_room(spec: Document, gib: int) -> None:
    """Scratch space for the pod's copy of what it works on in object storage."""
    for volume in spec["volumes"]:
        if volume["name"] == "scratch":
            volume["emptyDir"]["sizeLimit"] = f"{_gib(volume['emptyDir']['sizeLimit']) + gib}Gi"
            resources = spec["containers"][0]["resources"]
            before = resources["limits"][DISK]
            more = f"{_gib(before) + gib}Gi"
            resources["limits"] = {**resources["limits"], DISK: more}
            if resources["requests"][DISK] == before:
                resources["requests"] = {**resources["requests"], DISK: more}


def _without_runs(named: list[Document]) -> list[Document]:
    return [one for one in named if one["name"] != "runs"]


def _mount_recipe(spec: Document, order: Order) -> None:
    """Where the driver runs, the recipe is the one that the sizes come from."""
    spec["volumes"].append({"name": "recipe", "configMap": {"name": _recipe_name(order)}})
    mount = {"name": "recipe", "mountPath": str(Path(RECIPE).parent), "readOnly": True}
    spec["containers"][0]["volumeMounts"] = [*spec["containers"][0]["volumeMounts"], mount]


def _recipe_name(order: Order) -> str:
    return f"headwater-{order.name}-recipe"


def _recipe_map(order: Order) -> Document:
    labels = {"app.kubernetes.io/part-of": "headwater", COMPONENT: "foundation"}
    return {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": _recipe_name(order), "namespace": "headwater", "labels": labels},
        "data": {"recipe.yaml": order.recipe},
    }


def cluster_of(document: Document) -> Document:
    """The Ray cluster inside an object of KubeRay's."""
    spec = document["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def pod_specs(document: Document) -> list[Document]:
    """The pods that an object of KubeRay's starts: head, workers, and a job's submitter."""
    cluster = cluster_of(document)
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    submitter = document["spec"].get("submitterPodTemplate")
    return [group["template"]["spec"] for group in groups] + ([submitter["spec"]] if submitter else [])


# What the folder k8s/ uses of kustomize


def layer(folder: Path, below: Sequence[Document] = ()) -> list[Document]:
    """The documents of one kustomization: those `below` it and its own, patched, with what is copied between them."""
    kustomization = yaml.safe_load((folder / "kustomization.yaml").read_text(encoding="utf-8"))
    own = [folder / name for name in kustomization["resources"] if name.endswith(".yaml")]
    documents = [copy.deepcopy(document) for document in (*below, *_read(own))]
    for patch in kustomization.get("patches", ()):
        operations = yaml.safe_load(patch["patch"])
        for document, operation in itertools.product(_selected(documents, patch["target"]), operations):
            _apply(document, operation)
    for listed in kustomization.get("replacements", ()):
        for replacement in yaml.safe_load((folder / listed["path"]).read_text(encoding="utf-8")):
            _replace(documents, replacement)
    return documents


def _read(paths: Iterable[Path]) -> Iterator[Document]:
    for path in paths:
        yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def _selected(documents: Iterable[Document], target: dict[str, str]) -> list[Document]:
    """Documents whose kind, and name if one is given, match the target's (regular expressions)."""
    return [
        document
        for document in documents
        if re.fullmatch(target["kind"], document["kind"])
        and re.fullmatch(target.get("name", ".*"), document["metadata"]["name"])
    ]


def _apply(document: Document, operation: Document) -> None:
    """One operation of a JSON patch: add, replace or remove."""
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]]
    holder: Any = document
    for part in parents:
        holder = holder[_index(holder, part)]
    value = copy.deepcopy(operation.get("value"))
    if operation["op"] == "remove":
        del holder[_index(holder, last)]
    elif last == "-":
        holder.append(value)
    else:
        assert operation["op"] == "add" or last in holder or isinstance(holder, list), (
            f"nothing at {operation['path']}"
        )
        holder[_index(holder, last)] = value


def _index(holder: Any, part: str) -> Any:
    return int(part) if isinstance(holder, list) else part


def _replace(documents: list[Document], replacement: Document) -> None:
    """Copy what lies at the source's path to the targets' paths."""
    source = replacement["source"]
    (found,) = _selected(documents, source)
    value: Any = found
    for part in source["fieldPath"].split("."):
        value = value[part]
    for target in replacement["targets"]:
        for document in _selected(documents, target["select"]):
            for path in target["fieldPaths"]:
                *parents, last = path.split(".")
                holder = document
                for part in parents:
                    holder = holder.setdefault(part, {})
                holder[last] = copy.deepcopy(value)


# Files


class _Dumper(yaml.SafeDumper):
    """Text of several lines as it is, and nothing by reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.Node:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def as_yaml(documents: Iterable[Document]) -> str:
    """The documents as one YAML stream."""
    return yaml.dump_all(documents, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=119)


def by_component(documents: Iterable[Document]) -> dict[str, list[Document]]:
    """Documents that are applied together, by the name of their file."""
    files: dict[str, list[Document]] = {}
    for document in documents:
        files.setdefault(f"{document['metadata']['labels'][COMPONENT]}.yaml", []).append(document)
    return files


def write(documents: Iterable[Document], folder: Path) -> list[str]:
    """Write a file for each component into `folder`, all or none; an earlier rendering there is replaced."""
    files = by_component(documents)
    partial = folder.with_name(f".partial-{folder.name}")
    try:
        strange = sorted(path.name for path in folder.iterdir() if path.name not in files) if folder.exists() else []
        if strange:
            raise BadInput(Problem(f"{folder} holds {strange[0]}, which is no rendered manifest", "use another --out"))
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for name, members in files.items():
            (partial / name).write_text(as_yaml(members), encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except OSError as error:
        raise BadInput(Problem(f"cannot write to {folder}: {error}", "use --out with a folder you own")) from None
    return list(files)
