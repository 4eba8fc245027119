"""`headwater k8s render`: sizes, names and commands come from the recipe, and what can't run is refused."""

from __future__ import annotations

import dataclasses
import json
import shlex
from itertools import product

import pytest
import yaml

from cluster import leaving, manifests
from cluster.errors import BadInput
from cluster.manifests import COMPONENT, RECIPE, Need, Node, cluster_of, pods_for, pods_for_all
from cluster.preflight import Piece, starving_problems
from pipelines import deploy
from pipelines.__main__ import _parser, main
from pipelines.recipe import load_recipe, shipped
from pipelines.stage import NAMES, load_stages
from tests.k8s.manifests_of import EVERYTHING, GPU, KUSTOMIZED, RENDERED, documents_of, kinds, order_of
from tests.k8s.policy import pods

ELASTIC = ("pretrain.workers=2", "pretrain.min_workers=1")


def by_component(documents):
    return {document["metadata"]["labels"][COMPONENT]: document for document in kinds(documents, "RayJob")}


def capacity(document) -> dict[str, float]:
    """What Ray will count on the workers of a cluster."""
    (group,) = cluster_of(document)["workerGroupSpecs"]
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = float(limits.get("nvidia.com/gpu", 0))
    return {"CPU": group["replicas"] * float(limits["cpu"]), "GPU": group["replicas"] * gpus}


# Sizes


@pytest.mark.parametrize("source", EVERYTHING)
def test_every_cluster_is_large_enough_for_its_stages(source):
    recipe, settings, *_ = RENDERED.get(source, ("tiny", ()))
    demands = {stage.name: stage.demand(load_recipe(recipe, settings)) for stage in load_stages()}
    documents = documents_of(source)
    for component, job in by_component(documents).items():
        for name in NAMES if component == "journey" else (component,):
            assert capacity(job)["CPU"] >= demands[name].cpus
            if source not in KUSTOMIZED:
                assert capacity(job)["GPU"] >= demands[name].gpus
    (development,) = kinds(documents, "RayCluster")
    assert capacity(development)["CPU"] >= max(demand.cpus for demand in demands.values())


@pytest.mark.parametrize(
    ("pieces", "cpus", "gpus", "shared"),
    product((1, 2, 5, 16), (0.5, 0.75, 1, 3, 7.5), (0, 0.5, 1, 3), (0, 0.25, 0.5)),
)
def test_every_piece_has_a_place_and_so_has_the_data(pieces, cpus, gpus, shared):
    node = Node(cpus=8, gpus=4)
    pods = pods_for(Need("x", pieces, cpus, gpus, shared), node)
    fit = int((pods.cpus - shared) / cpus + 1e-9)
    if gpus:
        fit = min(fit, int(pods.gpus / gpus + 1e-9))
    assert pods.most * fit >= pieces
    assert (pods.most - 1) * fit < pieces, "no pod too many"
    assert pods.cpus <= node.cpus
    assert pods.gpus <= node.gpus


@pytest.mark.parametrize(
    ("pieces", "least", "cpus", "gpus", "shared"),
    product((2, 5, 16), (1, 2), (0.3, 0.75, 0.9, 3), (0, 0.5, 1), (0.05, 0.25)),
)
def test_workers_whose_number_is_not_fixed_leave_ray_data_something_in_every_pod(pieces, least, cpus, gpus, shared):
    """They take all the room of a pod, which has whole CPUs."""
    node = Node(cpus=8, gpus=4)
    pods = pods_for(Need("x", pieces, cpus, gpus, shared, least=least), node)
    worker = Piece("worker", "", cpus, gpus, least, pieces)

    def starves(size: int) -> bool:
        return bool(starving_problems("x", worker, shared, [{"CPU": size, "GPU": pods.gpus}]))

    assert not starves(pods.cpus) or all(map(starves, range(pods.cpus, node.cpus + 1))), "no pod would do"
    fit = min(int(pods.cpus / cpus + 1e-9), int(pods.gpus / gpus + 1e-9) if gpus else pieces)
    assert pods.least <= pods.most
    assert pods.most * fit >= pieces
    assert pods.least * fit >= least


def test_a_job_whose_workers_may_be_fewer_has_room_for_all_and_waits_for_the_fewest():
    settings = ("pretrain.workers=4", "pretrain.min_workers=1", "pretrain.global_batch=8", "pretrain.micro_batch=2")
    order = order_of("micro", settings, cpus=1)
    documents = manifests.render(order)
    (group,) = cluster_of(by_component(documents)["pretrain"])["workerGroupSpecs"]
    assert (group["replicas"], group["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"]) == (4, "1")
    (group,) = cluster_of(by_component(documents)["journey"])["workerGroupSpecs"]
    assert (group["minReplicas"], group["maxReplicas"]) == (1, 4)


def test_sizes_by_hand():
    node = Node(cpus=17, gpus=4)
    # 4 workers of 4 CPUs and a GPU, and a quarter of a CPU to read with, fill a pod of 17 CPUs and 4 GPUs.
    training = Need("pretrain", 16, 4, 1, 0.25)
    assert pods_for(training, node) == manifests.Pods(most=4, least=4, cpus=17, gpus=4)
    reading = Need("ingest", 1, 0.5)
    assert pods_for(reading, node) == manifests.Pods(most=1, least=1, cpus=1, gpus=0)
    assert pods_for_all([training, reading], node) == manifests.Pods(most=4, least=1, cpus=17, gpus=4)


def test_a_large_recipe():
    documents = documents_of("large")
    jobs = by_component(documents)
    (group,) = cluster_of(jobs["journey"])["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 1, 4)
    (group,) = cluster_of(jobs["pretrain"])["workerGroupSpecs"]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (4, 4, 4)
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["memory"], limits["nvidia.com/gpu"]) == ("17", "68Gi", "4")
    (group,) = cluster_of(jobs["ingest"])["workerGroupSpecs"]
    assert "nvidia.com/gpu" not in group["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert {mount["mountPath"] for _, spec in pods(documents) for mount in spec["containers"][0]["volumeMounts"]} == {
        "/tmp",
        "/mnt/runs",
        "/etc/headwater",
    }


def test_overlays_add_up():
    (group,) = cluster_of(by_component(documents_of("large on spot"))["pretrain"])["workerGroupSpecs"]
    keys = {toleration["key"] for toleration in group["template"]["spec"]["tolerations"]}
    assert keys == {"nvidia.com/gpu", "headwater-capacity"}
    queued = by_component(documents_of("large in a queue"))["journey"]
    (group,) = cluster_of(queued)["workerGroupSpecs"]
    assert group["replicas"] == group["minReplicas"] == group["maxReplicas"] == 4


def test_a_laptop_asks_for_less_than_it_may_take():
    (group,) = cluster_of(by_component(documents_of("tiny laptop"))["pretrain"])["workerGroupSpecs"]
    resources = group["template"]["spec"]["containers"][0]["resources"]
    assert resources["limits"]["cpu"] == "2"
    assert resources["requests"]["cpu"] == "250m"


# Commands and names


@pytest.mark.parametrize("source", EVERYTHING)
def test_every_command_is_one_that_the_project_has(source):
    for component, job in by_component(documents_of(source)).items():
        python, flag, module, *words = shlex.split(job["spec"]["entrypoint"])
        assert (python, flag, module) == ("python", "-m", "pipelines")
        chosen, rest = _parser().parse_known_args(words)
        assert not rest
        assert chosen.verb.__name__ == ("run" if component == "journey" else "one_stage")
        assert getattr(chosen, "stage", "journey") == component
        assert chosen.recipe in (*shipped(), RECIPE)
    hooks = {
        tuple(container["lifecycle"]["preStop"]["exec"]["command"])
        for _, spec in pods(documents_of(source))
        for container in spec["containers"]
        if "lifecycle" in container
    }
    for python, flag, module, *words in hooks:
        assert (python, flag, module) == ("python", "-m", leaving.__name__)
        leaving._parser().parse_args(words)


@pytest.mark.parametrize("source", RENDERED)
def test_the_driver_reads_the_recipe_that_the_sizes_come_from(source, tmp_path):
    recipe, settings, _, root = RENDERED[source]
    documents = documents_of(source)
    (carried,) = kinds(documents, "ConfigMap")
    (tmp_path / "recipe.yaml").write_text(carried["data"]["recipe.yaml"])
    assert load_recipe(str(tmp_path / "recipe.yaml")) == load_recipe(recipe, settings)
    for job in kinds(documents, "RayJob"):
        assert RECIPE in job["spec"]["entrypoint"]
        assert job["spec"]["entrypoint"].endswith(f" --runs {root}")
        spec = cluster_of(job)["headGroupSpec"]["template"]["spec"]
        assert {"name": "recipe", "configMap": {"name": carried["metadata"]["name"]}} in spec["volumes"]
        assert f"{spec['containers'][0]['volumeMounts'][-1]['mountPath']}/recipe.yaml" == RECIPE


def test_object_storage_needs_no_volume():
    documents = documents_of("tiny in object storage")
    assert not kinds(documents, "PersistentVolumeClaim")
    for _, spec in pods(documents):
        assert "runs" not in {volume["name"] for volume in spec.get("volumes", ())}
    container = next(spec["containers"][0] for _, spec in pods(documents))
    variables = {variable["name"]: variable for variable in container["env"]}
    assert variables["HEADWATER_RUN"]["value"] == "s3://bucket/some/prefix/tiny"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION", "WANDB_API_KEY"):
        assert variables[name]["valueFrom"]["secretKeyRef"]["key"] == name


def test_object_storage_is_copied_to_scratch_space_with_room_for_it():
    settings = ("model.preset=7b",)
    order, there = order_of("tiny", settings), order_of("tiny", settings, root="s3://bucket/runs")
    for (_, disk), (_, objects) in zip(pods(manifests.render(order)), pods(manifests.render(there)), strict=True):
        if disk["containers"][0]["name"] in ("ray-head", "ray-worker"):
            before, after = (_scratch(spec) for spec in (disk, objects))
            assert (after - before) * 2**30 > order.disk_bytes
            limits = [spec["containers"][0]["resources"]["limits"]["ephemeral-storage"] for spec in (disk, objects)]
            assert int(limits[1].removesuffix("Gi")) - int(limits[0].removesuffix("Gi")) == after - before


def _scratch(spec) -> int:
    (size,) = [volume["emptyDir"]["sizeLimit"] for volume in spec["volumes"] if volume["name"] == "scratch"]
    return int(size.removesuffix("Gi"))


def test_the_volume_holds_what_the_stages_leave():
    small = manifests.render(order_of("tiny"))
    assert kinds(small, "PersistentVolumeClaim")[0]["spec"]["resources"]["requests"]["storage"] == "20Gi"
    settings = ("model.preset=7b",)
    order = order_of("tiny", settings)
    (claim,) = kinds(manifests.render(order), "PersistentVolumeClaim")
    storage = int(claim["spec"]["resources"]["requests"]["storage"].removesuffix("Gi"))
    assert storage * 2**30 > order.disk_bytes > 20 * 2**30


# What is refused


def refused(order, *overlays) -> str:
    with pytest.raises(BadInput) as error:
        manifests.render(order, overlays)
    return str(error.value)


@pytest.mark.parametrize(
    ("settings", "root", "node", "said"),
    [
        (("name=My.Run",), "/runs", {}, "small letters"),
        (("name=" + "x" * 28,), "/runs", {}, "27 characters at most"),
        ((), "runs", {}, "absolute path or s3://BUCKET/PREFIX"),
        ((), "/", {}, "can't keep runs at '/'"),
        ((), "/runs; true", {}, "can't keep runs"),
        ((), "/runs/../etc", {}, "can't keep runs"),
        ((), "s3://", {}, "can't keep runs"),
        (("pretrain.cpus_per_worker=9",), "/runs", {}, "9 CPUs, and 0.25 beside it, the largest pod has 8"),
        (("pretrain.cpus_per_worker=8",), "/runs", {}, "--pod-cpus"),
        (("sft.gpus_per_worker=2",), "/runs", {"gpus": 1}, "2 GPUs, the largest pod has 1"),
        ((), "/runs", {"cpus": 0}, "holds no Ray worker"),
        ((), "/runs", {"gpus": -1}, "holds no Ray worker"),
        ((), "/runs", {"memory_per_cpu": 1}, "2 GiB at least"),
        ((*ELASTIC, "pretrain.cpus_per_worker=1"), "/runs", {"cpus": 2}, "leave Ray Data 0"),
        (("cluster.address=ray://head:10001",), "/runs", {}, "cluster.address is 'ray://head:10001'"),
    ],
)
def test_what_can_not_run_is_refused(settings, root, node, said):
    assert said in refused(order_of("tiny", settings, root, **node))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        (("ingest.folder={here}", "ingest.folder_licence=unknown"), "ingest.folder is '{here}'"),
        (("ingest.folder=texts", "ingest.folder_licence=unknown"), "ingest.folder is 'texts'"),
        (("ingest.folder=~/texts", "ingest.folder_licence=unknown"), "ingest.folder is '~/texts'"),
        (("ingest.folder=/runs/../etc", "ingest.folder_licence=unknown"), "ingest.folder is '/runs/../etc'"),
        (("sft.sources=[{{name: mine, path: {here}}}]",), "the path of 'mine' in sft.sources is '{here}'"),
        (("rank.preferences=[{{name: mine, path: {here}}}]",), "the path of 'mine' in rank.preferences is '{here}'"),
        (("ingest.sources=[{{name: mine, path: 'stdlib:', block_list: {here}}}]",), "the block_list of ingest's"),
        (("tokenizer.from_folder={here}",), "tokenizer.from_folder is '{here}'"),
    ],
)
def test_what_lies_on_this_machine_alone_is_refused_by_name(tmp_path, monkeypatch, settings, named):
    monkeypatch.setattr("llm.adoption.adopted_size", lambda folder: 600)
    monkeypatch.setattr("pipelines.schema.adopted_size", lambda folder: 600)
    order = order_of("tiny", tuple(one.format(here=tmp_path) for one in settings))
    assert f"{named.format(here=tmp_path)}" in refused(order)


def test_what_lies_with_the_runs_or_in_object_storage_is_seen():
    for path, root in (
        ("/runs/texts", "/runs"),
        ("s3://bucket/texts", "/runs"),
        ("s3://bucket/texts", "s3://bucket/runs"),
    ):
        order = dataclasses.replace(order_of("tiny", root=root), paths=deployed(path))
        assert manifests.render(order)
    order = dataclasses.replace(order_of("tiny", root="s3://bucket/runs"), paths=deployed("/runs/texts"))
    assert "ingest.folder is '/runs/texts', which no pod sees" in refused(order)


def deployed(path: str) -> tuple[tuple[str, str], ...]:
    """The paths of an order for a recipe with that folder."""
    recipe = load_recipe("tiny", (f"ingest.folder={path}", "ingest.folder_licence=unknown"))
    return tuple((name, one) for name, one in deploy.paths(recipe) if one and not deploy.ELSEWHERE.match(one))


def test_an_installation_without_the_folder_says_so(monkeypatch, tmp_path):
    monkeypatch.setattr(manifests, "K8S", tmp_path / "k8s")
    assert "from a checkout" in refused(order_of("tiny"))


def test_all_problems_are_told_at_once():
    said = refused(order_of("tiny", ("name=A", *GPU[1:5]), "runs", cpus=2), "gpus")
    assert all(word in said for word in ("'A'", "'runs'", "no overlay 'gpus'", "gpu, kueue, laptop", "pretrain: one"))


def test_the_command_writes_all_files_or_none(tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["k8s", "render", "tiny", "name=mine", "--out", str(out)]) == 0
    names = {path.name for path in out.iterdir()}
    assert names == {f"{name}.yaml" for name in ("foundation", "development", "journey", "service", *NAMES)}
    assert capsys.readouterr().out.split() == [str(out / name) for name in _in_order(out, names)]
    written = [document for path in out.iterdir() for document in yaml.safe_load_all(path.read_text())]
    rendered = manifests.render(order_of("tiny", ("name=mine",)))
    assert sorted(map(json.dumps, written)) == sorted(map(json.dumps, rendered))

    assert main(["k8s", "render", "tiny", "name=Mine", "--out", str(tmp_path / "no")]) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
    assert main(["k8s", "render", "tiny", "--overlay", "laptop", "--out", str(out)]) == 0, "a rendering is replaced"
    (out / "mine.txt").write_text("mine")
    assert main(["k8s", "render", "tiny", "--out", str(out)]) == 2
    assert (out / "mine.txt").exists()
    assert "mine.txt" in capsys.readouterr().err


def _in_order(out, names):
    """Files in the order in which their components first appear."""
    components = [document["metadata"]["labels"][COMPONENT] for document in manifests.render(order_of("tiny"))]
    return [f"{name}.yaml" for name in dict.fromkeys(components)]


def test_a_place_that_can_not_be_written_to_is_bad_input(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["k8s", "render", "tiny", "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write to" in capsys.readouterr().err


def test_the_help_names_every_overlay(capsys):
    with pytest.raises(SystemExit):
        main(["k8s", "render", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert all(name in said for name in manifests.overlays())


def test_without_a_folder_the_manifests_are_printed(capsys):
    assert main(["k8s", "render", "micro", "--overlay", "gpu", "--image", "mine:1", "--set", "pretrain.steps=70"]) == 0
    documents = list(yaml.safe_load_all(capsys.readouterr().out))
    (carried,) = kinds(documents, "ConfigMap")
    assert yaml.safe_load(carried["data"]["recipe.yaml"])["pretrain"]["steps"] == 70
    assert {container["image"] for _, spec in pods(documents) for container in spec["containers"]} == {"mine:1"}


# The page


PAGE = (manifests.K8S / "README.md").read_text()


def test_the_page_names_every_file_of_the_folder():
    for path in manifests.K8S.glob("base/*.yaml"):
        assert path.name in PAGE or path.name == "kustomization.yaml"
    for name in manifests.overlays():
        assert name in PAGE.split("## What to apply")[0]


def test_the_pages_commands_are_ones_that_the_project_has():
    commands = [line.split("#")[0].strip() for line in PAGE.splitlines() if line.strip().startswith("headwater ")]
    assert len(commands) >= 3
    for line in commands:
        chosen, _ = _parser().parse_known_args(shlex.split(line)[1:])
        assert set(getattr(chosen, "overlay", ())) <= set(manifests.overlays())


def test_the_page_invents_no_seconds():
    table = PAGE.split("## What each failure costs")[1]
    assert "not measured on Kubernetes" in table
