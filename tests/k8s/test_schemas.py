"""Every manifest against the schemas of Kubernetes and of KubeRay, in which a misspelt field is a mistake."""

from __future__ import annotations

import copy
import json

import pytest

from cluster import manifests
from cluster.manifests import RAY_KINDS, cluster_of
from tests.k8s.manifests_of import EVERYTHING, KUSTOMIZED, documents_of, key, kinds
from tests.k8s.schemas import OURS, SPECS, as_pod, core_mistake, kuberay_mistakes, kuberay_schemas

SCHEMAS = kuberay_schemas()


@pytest.mark.parametrize("folder", KUSTOMIZED)
def test_kubectl_and_the_renderer_build_the_same(folder):
    documents = manifests.layer(manifests.K8S / "base")
    if folder != "base":
        documents = manifests.layer(manifests.K8S / folder, documents)
    built = {key(document): document for document in documents_of(folder)}
    assert {key(document): document for document in documents} == built


@pytest.mark.parametrize("schemas", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("source", EVERYTHING)
def test_kuberays_objects_keep_to_its_schema(source, schemas):
    for document in kinds(documents_of(source), *RAY_KINDS):
        assert not kuberay_mistakes(document, schemas), key(document)


@pytest.mark.parametrize("source", EVERYTHING)
def test_everything_else_and_every_pod_keeps_to_kubernetes_schema(source):
    for document in documents_of(source):
        for checked in _unseen(core_documents(document)):
            assert core_mistake(checked) is None, key(document)


_seen: set[str] = set()


def _unseen(documents):
    """Most pods are alike, and one check takes a while."""
    for document in documents:
        if (text := json.dumps(document, sort_keys=True)) not in _seen:
            yield document
            _seen.add(text)


def core_documents(document):
    if document["kind"] not in RAY_KINDS:
        return [document]
    cluster = cluster_of(document)
    submitter = document["spec"].get("submitterPodTemplate")
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    return [as_pod(template) for template in (*templates, *([submitter] if submitter else []))]


BREAKS = {
    "spec.backofLimit": ("RayJob", lambda spec: spec.update(backofLimit=3)),
    "spec.rayClusterSpec.autoscalerOption": (
        "RayJob",
        lambda spec: spec["rayClusterSpec"].update(autoscalerOption={}),
    ),
    "deletionRules.ttl": (
        "RayJob",
        lambda spec: spec["deletionStrategy"]["deletionRules"][0]["condition"].update(ttl=1),
    ),
    "workerGroupSpecs.minReplica": ("RayCluster", lambda spec: spec["workerGroupSpecs"][0].update(minReplica=1)),
    "replicas as text": ("RayCluster", lambda spec: spec["workerGroupSpecs"][0].update(replicas="1")),
    "authOptions.mode": ("RayCluster", lambda spec: spec["authOptions"].update(mode="tokens")),
    "no head": ("RayCluster", lambda spec: spec.pop("headGroupSpec")),
    "serveConfig": ("RayService", lambda spec: spec.update(serveConfig="")),
}


@pytest.mark.parametrize("schemas", SCHEMAS.values(), ids=SCHEMAS)
@pytest.mark.parametrize("name", BREAKS)
def test_a_mistake_in_kuberays_fields_is_found(name, schemas):
    kind, damage = BREAKS[name]
    document = kinds(documents_of("base"), kind)[0]
    damage(document["spec"])
    assert kuberay_mistakes(document, schemas)


def test_a_mistake_in_a_pod_or_a_policy_is_found():
    pod = core_documents(kinds(documents_of("base"), "RayCluster")[0])[0]
    for path, name in ((("spec",), "enableServiceLink"), (("spec", "containers", 0, "securityContext"), "runAsRoot")):
        broken = copy.deepcopy(pod)
        holder = broken
        for part in path:
            holder = holder[part]
        holder[name] = False
        assert name in core_mistake(broken)
    policy = kinds(documents_of("base"), "NetworkPolicy")[0]
    policy["spec"]["podSelectors"] = {}
    assert "podSelectors" in core_mistake(policy)


def test_our_list_of_fields_is_kuberays():
    """Where KubeRay's definitions are at hand, each of our fields is one of theirs and of the same type."""
    theirs = SCHEMAS.get("definitions", OURS)
    for kind, spec in SPECS.items():
        assert not list(_differences(spec, theirs[kind]["properties"]["spec"], kind))


def _differences(ours, theirs, path):
    if ours.get("type") != theirs.get("type"):
        yield f"{path}: {ours.get('type')} is {theirs.get('type')}"
    if not set(ours.get("enum", ())) <= set(theirs.get("enum", ours.get("enum", ()))):
        yield f"{path}: {ours['enum']} are {theirs['enum']}"
    for name, field in ours.get("properties", {}).items():
        if name not in theirs.get("properties", {}):
            yield f"{path}.{name} is unknown"
        elif name not in ("spec", "metadata"):
            yield from _differences(field, theirs["properties"][name], f"{path}.{name}")
    if "items" in ours:
        yield from _differences(ours["items"], theirs["items"], f"{path}[]")
