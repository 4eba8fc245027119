"""The rules of policy.py, on every set of manifests; and for each rule a change that it has to notice."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import yaml

from cluster.manifests import COMPONENT, RAY_KINDS, Document, cluster_of
from tests.k8s.manifests_of import EVERYTHING, documents_of, kinds
from tests.k8s.policy import RULES, clusters, containers, environment, heads, pods, templates


@pytest.mark.parametrize("source", EVERYTHING)
def test_the_manifests_keep_to_every_rule(source):
    documents = documents_of(source)
    broken = {name: found for name, check in RULES.items() if (found := list(check(documents)))}
    assert not broken


def first(documents: list[Document], kind: str) -> Document:
    return kinds(documents, kind)[0]


def pod(documents: list[Document]) -> Document:
    return next(spec for _, spec in pods(documents))


def container(documents: list[Document]) -> Document:
    return pod(documents)["containers"][0]


def context(documents: list[Document]) -> Document:
    """Of the last container: the autoscaler's of the service."""
    return [found for _, found in containers(documents)][-1]["securityContext"]


def job(documents: list[Document]) -> Document:
    return first(documents, "RayJob")["spec"]


def cluster(documents: list[Document]) -> Document:
    return next(found for _, found in clusters(documents))


def policy(documents: list[Document], name: str) -> Document:
    return next(found["spec"] for found in documents if found["metadata"]["name"] == name)


def head(documents: list[Document]) -> Document:
    return next(found for _, found in heads(documents))


def budget(documents: list[Document]) -> Document:
    return first(documents, "PodDisruptionBudget")["spec"]


# Containers and objects that somebody might add, and that the rules must not overlook.


def added(documents: list[Document], where: str, **changes: Any) -> None:
    """A container beside the first pod's, or before it: confined as that one, but for `changes`; None leaves out."""
    spec = pod(documents)
    made = {**copy.deepcopy(spec["containers"][0]), "name": "added", **changes}
    kept = {name: value for name, value in made.items() if value is not None}
    spec.setdefault(where, []).append(kept)


def without(documents: list[Document], *names: str) -> Document:
    """A container's confinement without these fields."""
    return {name: value for name, value in container(documents)["securityContext"].items() if name not in names}


def deployed(documents: list[Document], kind: str = "Deployment", **changes: Any) -> None:
    """Something that makes pods and is not KubeRay's: a copy of the first pod, but for `changes`."""
    spec = {**copy.deepcopy(pod(documents)), **changes}
    labels = {"app.kubernetes.io/part-of": "headwater", COMPONENT: "foundation"}
    template: Document = {"metadata": {"labels": labels}, "spec": spec}
    template = {"jobTemplate": {"spec": {"template": template}}} if kind == "CronJob" else {"template": template}
    metadata = {"name": "x", "namespace": "headwater", "labels": labels}
    documents.append({"kind": kind, "metadata": metadata, "spec": template})


def served(documents: list[Document], **port: Any) -> None:
    """A service in front of the heads."""
    spec = {"selector": {"app.kubernetes.io/part-of": "headwater"}, "ports": [{"port": 80, **port}]}
    documents.append({"kind": "Service", "metadata": {"name": "x"}, "spec": spec})


def let_in(documents: list[Document], *ports: Document) -> None:
    """Everybody, to these ports of Ray's pods."""
    block = {"ipBlock": {"cidr": "0.0.0.0/0"}}
    policy(documents, "headwater-ray")["ingress"].append({"from": [block], "ports": list(ports)})


def serving(documents: list[Document], **changes: Any) -> None:
    """Other arguments of the service's application; None takes one away."""
    spec = first(documents, "RayService")["spec"]
    config = yaml.safe_load(spec["serveConfigV2"])
    arguments = {**config["applications"][0]["args"], **changes}
    config["applications"][0]["args"] = {name: value for name, value in arguments.items() if value is not None}
    spec["serveConfigV2"] = yaml.safe_dump(config)


Break = Callable[[list[Document]], object]
NOTICED: set[tuple[str, int]] = set()
BREAKS: dict[str, list[Break]] = {
    "pods_are_not_root": [
        lambda all: pod(all)["securityContext"].pop("runAsNonRoot"),
        lambda all: context(all).update(runAsUser=0),
        lambda all: added(all, "initContainers", securityContext=None),
        lambda all: added(all, "containers", securityContext=without(all, "runAsNonRoot")),
        lambda all: deployed(all, securityContext={"runAsUser": 0}),
        lambda all: deployed(all, "CronJob", securityContext={}),
    ],
    "roots_are_read_only": [
        lambda all: context(all).update(readOnlyRootFilesystem=False),
        lambda all: added(all, "containers", securityContext=without(all, "readOnlyRootFilesystem")),
        lambda all: added(all, "initContainers", securityContext=without(all, "readOnlyRootFilesystem")),
    ],
    "privileges_do_not_grow": [
        lambda all: context(all).pop("allowPrivilegeEscalation"),
        lambda all: context(all).update(privileged=True),
        lambda all: added(all, "initContainers", securityContext={**without(all), "privileged": True}),
        lambda all: added(all, "ephemeralContainers", securityContext=without(all, "allowPrivilegeEscalation")),
    ],
    "capabilities_are_dropped": [
        lambda all: context(all).update(capabilities={"drop": ["ALL"], "add": ["NET_RAW"]}),
        lambda all: added(all, "initContainers", securityContext=without(all, "capabilities")),
        lambda all: deployed(all, containers=[{"name": "bare"}]),
    ],
    "seccomp_is_on": [
        lambda all: context(all).pop("seccompProfile"),
        lambda all: pod(all)["securityContext"].update(seccompProfile={"type": "Unconfined"}),
        lambda all: added(all, "containers", securityContext=without(all, "seccompProfile")),
        lambda all: deployed(all, "DaemonSet", securityContext={"runAsNonRoot": True, "runAsUser": 1000}),
    ],
    "resources_are_limited": [
        lambda all: container(all)["resources"]["limits"].pop("memory"),
        lambda all: cluster(all)["autoscalerOptions"].pop("resources"),
        lambda all: added(all, "initContainers", resources=None),
        lambda all: added(all, "containers", resources={"limits": {"cpu": "1"}}),
        lambda all: deployed(all, "Job", containers=[{"name": "bare"}]),
    ],
    "nothing_of_the_node_is_shared": [
        lambda all: pod(all).update(hostNetwork=True),
        lambda all: pod(all)["volumes"].append({"name": "node", "hostPath": {"path": "/"}}),
        lambda all: deployed(all, "DaemonSet", hostPID=True),
        lambda all: added(all, "containers", ports=[{"containerPort": 80, "hostPort": 80}]),
    ],
    "written_to_is_scratch_of_a_stated_size_or_the_runs": [
        lambda all: pod(all)["volumes"].append({"name": "more", "emptyDir": {}}),
        lambda all: pod(all)["volumes"].append({"name": "more", "emptyDir": {"medium": "Memory", "sizeLimit": "1Gi"}}),
        lambda all: deployed(all, volumes=[{"name": "more", "nfs": {"server": "x", "path": "/"}}]),
    ],
    "tokens_of_kubernetes_are_for_the_autoscaler_alone": [
        lambda all: pod(all).pop("automountServiceAccountToken"),
        lambda all: container(all)["volumeMounts"].append({"name": "kubernetes-token", "mountPath": "/token"}),
        lambda all: first(all, "ServiceAccount").pop("automountServiceAccountToken"),
        lambda all: added(all, "initContainers", volumeMounts=[{"name": "kubernetes-token", "mountPath": "/token"}]),
        lambda all: deployed(all, automountServiceAccountToken=True),
    ],
    "secrets_are_named_and_never_written_down": [
        lambda all: container(all)["env"].append({"name": "WANDB_API_KEY", "value": "x"}),
        lambda all: all.append({"kind": "Secret", "metadata": {"name": "x"}}),
        lambda all: added(all, "initContainers", env=[{"name": "REDIS_PASSWORD", "value": "x"}]),
        lambda all: deployed(all, containers=[{"name": "x", "env": [{"name": "AUTH_TOKEN", "value": "x"}]}]),
        lambda all: cluster(all).update(gcsFaultToleranceOptions={"redisPassword": {"value": "x"}}),
    ],
    "images_have_a_version_and_no_host": [
        lambda all: container(all).update(image="headwater"),
        lambda all: container(all).update(image="headwater:latest"),
        lambda all: container(all).update(image="images.example/headwater:0.1.0"),
        lambda all: added(all, "initContainers", image="busybox"),
        lambda all: deployed(all, containers=[{"name": "x", "image": "nginx:latest"}]),
    ],
    "the_network_denies_by_default": [
        lambda all: policy(all, "headwater-deny").update(policyTypes=["Ingress"]),
        lambda all: policy(all, "headwater-deny").update(ingress=[{}]),
    ],
    "dashboard_jobs_and_client_stay_in_the_namespace": [
        lambda all: policy(all, "headwater-ray")["ingress"].append({}),
        lambda all: policy(all, "headwater-ray")["ingress"].append({"from": [{"namespaceSelector": {}}]}),
        lambda all: policy(all, "headwater-ray")["ingress"].append(
            {"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 8265}]}
        ),
        lambda all: let_in(all, {"port": "dashboard"}),
        lambda all: let_in(all, {"port": 8000, "endPort": 9000}),
        lambda all: let_in(all, {"protocol": "TCP"}),
    ],
    "ports_that_are_named_exist": [
        lambda all: let_in(all, {"port": "dashbord"}),
        lambda all: policy(all, "headwater-https")["egress"][0].update(ports=[{"port": "https"}]),
        lambda all: served(all, targetPort="dashbord"),
        lambda all: served(all),
    ],
    "nothing_is_offered_outside_the_cluster": [
        lambda all: head(all).update(serviceType="LoadBalancer"),
        lambda all: all.append({"kind": "Service", "metadata": {"name": "x"}, "spec": {"type": "NodePort"}}),
        lambda all: all.append({"kind": "Service", "metadata": {"name": "x"}, "spec": {"externalIPs": ["192.0.2.1"]}}),
        lambda all: all.append({"kind": "Ingress", "metadata": {"name": "x"}, "spec": {}}),
        lambda all: all.append({"kind": "HTTPRoute", "metadata": {"name": "x"}, "spec": {}}),
    ],
    "ways_out_are_few_and_miss_the_clouds_credentials": [
        lambda all: policy(all, "headwater-https")["egress"].append({}),
        lambda all: policy(all, "headwater-https")["egress"][0]["to"][0]["ipBlock"].pop("except"),
        lambda all: policy(all, "headwater-https")["egress"][0].pop("ports"),
        lambda all: policy(all, "headwater-https")["egress"][0].update(ports=[{"protocol": "TCP"}]),
    ],
    "every_call_to_ray_carries_a_token": [
        lambda all: cluster(all)["authOptions"].update(mode="disabled"),
        lambda all: cluster(all).pop("rayVersion"),
    ],
    "the_namespace_refuses_what_is_not_confined": [
        lambda all: first(all, "Namespace")["metadata"]["labels"].pop("pod-security.kubernetes.io/enforce"),
        lambda all: first(all, "RayJob")["metadata"].update(namespace="default"),
    ],
    "disruptions_have_a_budget": [
        lambda all: budget(all).update(minAvailable="50%"),
        lambda all: all.remove(kinds(all, "PodDisruptionBudget")[1]),
    ],
    "heads_do_no_work": [lambda all: head(all)["rayStartParams"].pop("num-cpus")],
    "sizes_are_stated": [
        lambda all: cluster(all)["workerGroupSpecs"][0].update(maxReplicas=0),
        lambda all: cluster(all)["workerGroupSpecs"][0]["template"]["spec"]["containers"][0]["resources"][
            "limits"
        ].update(cpu="1500m"),
    ],
    "the_autoscaler_is_the_second": [
        lambda all: cluster(all)["autoscalerOptions"].update(version="v1"),
        lambda all: pod(all).update(restartPolicy="Always"),
    ],
    "jobs_have_deadlines_and_attempts": [
        lambda all: job(all).pop("activeDeadlineSeconds"),
        lambda all: job(all).pop("preRunningDeadlineSeconds"),
        lambda all: job(all).update(backoffLimit=0),
    ],
    "jobs_give_their_cluster_back": [
        lambda all: job(all).pop("deletionStrategy"),
        lambda all: job(all).update(shutdownAfterJobFinishes=True),
        lambda all: job(all)["deletionStrategy"]["deletionRules"].append(
            job(all)["deletionStrategy"]["deletionRules"][0]
        ),
        lambda all: job(all)["deletionStrategy"]["deletionRules"][0].update(policy="DeleteWorkers"),
    ],
    "jobs_are_submitted_by_a_confined_pod": [
        lambda all: job(all).update(submissionMode="SidecarMode"),
        lambda all: job(all).pop("submitterPodTemplate"),
    ],
    "a_job_for_the_journey_and_for_each_stage": [
        lambda all: all.remove(first(all, "RayJob")),
        lambda all: all.remove(first(all, "RayService")),
    ],
    "whoever_is_stopped_saves_first": [
        lambda all: container(all).pop("lifecycle"),
        lambda all: pod(all).update(terminationGracePeriodSeconds=30),
        lambda all: environment(container(all))["RAY_JOB_STOP_WAIT_TIME_S"].update(value="3"),
    ],
    "every_pod_of_a_job_sees_the_runs": [
        lambda all: environment(container(all))["HEADWATER_RUN"].update(value="/elsewhere/tiny"),
        lambda all: all.remove(first(all, "PersistentVolumeClaim")),
        lambda all: environment(container(all))["HEADWATER_RUN"].update(value="s3://bucket/tiny"),
        lambda all: cluster_of(first(all, "RayService"))["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
            "volumeMounts"
        ][1].pop("readOnly"),
    ],
    "the_service_is_ready_when_a_model_answers": [
        lambda all: cluster_of(first(all, "RayService"))["workerGroupSpecs"][0]["template"]["spec"]["containers"][0][
            "readinessProbe"
        ]["httpGet"].update(path="/healthz"),
    ],
    "the_services_keys_are_a_secret_or_it_is_called_open": [
        lambda all: serving(all, insecure=None),
        lambda all: serving(all, keys="/etc/headwater-keys/keys.json"),
        lambda all: serving(all, keys="/runs/keys.json", insecure=None),
    ],
    "names_leave_room_for_kuberays": [
        lambda all: first(all, "RayJob")["metadata"].update(name="x" * 48),
        lambda all: first(all, "RayJob")["metadata"].update(name="7b"),
        lambda all: all.append(first(all, "RayJob")),
    ],
    "everything_says_what_it_belongs_to": [
        lambda all: first(all, "Namespace")["metadata"]["labels"].pop(COMPONENT),
        lambda all: head(all)["template"]["metadata"]["labels"].update({"app.kubernetes.io/part-of": "x"}),
    ],
}


def test_each_rule_has_something_that_breaks_it():
    assert set(BREAKS) == set(RULES)


@pytest.mark.parametrize(
    ("name", "number"), [(name, number) for name, changes in BREAKS.items() for number in range(len(changes))]
)
def test_a_broken_rule_is_noticed(name, number):
    documents = documents_of("base")
    assert not list(RULES[name](documents))
    BREAKS[name][number](documents)
    assert list(RULES[name](documents))
    NOTICED.add((name, number))


def test_a_confined_addition_breaks_nothing():
    """Each of the changes above is noticed for what it changes, not for being there."""
    documents = documents_of("base")
    added(documents, "initContainers")
    added(documents, "containers")
    deployed(documents)
    deployed(documents, "CronJob")
    served(documents, targetPort="dashboard")
    documents[-1]["metadata"] |= {
        "namespace": "headwater",
        "labels": first(documents, "Namespace")["metadata"]["labels"],
    }
    unlike = {"names_leave_room_for_kuberays"}  # two objects are called x
    assert not {name for name, check in RULES.items() if list(check(documents))} - unlike


def test_what_was_checked_is_counted(table):
    everything = [documents_of(source) for source in EVERYTHING]
    counts = {
        "sets of manifests": len(everything),
        "documents": sum(map(len, everything)),
        "of which KubeRay's": sum(len(kinds(documents, *RAY_KINDS)) for documents in everything),
        "pods": sum(len(list(templates(documents))) for documents in everything),
        "containers": sum(len(list(containers(documents))) for documents in everything),
        "rules on each set": len(RULES),
        "changes noticed": len(NOTICED),
    }
    assert all(counts.values())
    table("manifests and rules checked", [f"{count:7,} {what}" for what, count in counts.items()])


# What each overlay is for


def workers_of(documents: list[Document], kind: str) -> list[Document]:
    return [cluster_of(document)["workerGroupSpecs"][0]["template"]["spec"] for document in kinds(documents, kind)]


def test_a_laptop_has_one_node():
    documents = documents_of("overlays/laptop")
    assert first(documents, "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteOnce"]
    for _, found in pods(documents):
        resources = found["containers"][0]["resources"]
        assert resources["requests"]["cpu"] in ("250m", "500m")
    assert first(documents_of("base"), "PersistentVolumeClaim")["spec"]["accessModes"] == ["ReadWriteMany"]


def test_gpus_are_asked_for_and_their_nodes_allowed():
    for kind in ("RayCluster", "RayJob"):
        for spec in workers_of(documents_of("overlays/gpu"), kind):
            resources = spec["containers"][0]["resources"]
            assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
            assert spec["containers"][0]["image"].endswith("-cuda")
            assert [toleration["key"] for toleration in spec["tolerations"]] == ["nvidia.com/gpu"]


def test_a_service_in_production_outlives_its_head():
    documents = documents_of("overlays/production")
    service = cluster_of(first(documents, "RayService"))
    fault_tolerance = service["gcsFaultToleranceOptions"]
    redis = first(documents, "Service")
    assert (
        fault_tolerance["redisAddress"] == f"redis://{redis['metadata']['name']}:{redis['spec']['ports'][0]['port']}"
    )
    wanted = fault_tolerance["redisPassword"]["valueFrom"]["secretKeyRef"]
    store = first(documents, "StatefulSet")["spec"]["template"]["spec"]["containers"][0]
    assert environment(store)["REDIS_PASSWORD"]["valueFrom"]["secretKeyRef"] == wanted
    assert service["workerGroupSpecs"][0]["minReplicas"] == 2
    assert all("gcsFaultToleranceOptions" not in cluster_of(found) for found in kinds(documents, "RayJob"))


def test_a_queue_counts_what_it_admits():
    for document in kinds(documents_of("overlays/kueue"), "RayCluster", "RayJob", "RayService"):
        assert document["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "headwater"
        assert cluster_of(document)["enableInTreeAutoscaling"] is False
        if document["kind"] == "RayJob":
            assert document["spec"]["shutdownAfterJobFinishes"] is True
            assert "deletionStrategy" not in document["spec"]


def test_volcano_places_jobs_whole():
    for document in kinds(documents_of("overlays/volcano"), "RayCluster", "RayJob", "RayService"):
        labels = document["metadata"]["labels"]
        assert labels["ray.io/scheduler-name"] == "volcano"
        assert labels["volcano.sh/queue-name"] == "headwater"
        if document["kind"] == "RayJob":
            assert cluster_of(document)["enableInTreeAutoscaling"] is False


def test_spot_workers_ask_to_save_and_heads_stay_on_ordinary_nodes():
    for document in kinds(documents_of("overlays/spot"), "RayJob"):
        group = cluster_of(document)["workerGroupSpecs"][0]["template"]["spec"]
        assert "--ask" in group["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert group["terminationGracePeriodSeconds"] < 120
        assert group["nodeSelector"] == {"headwater-capacity": "spot"}
        assert document["spec"]["backoffLimit"] >= 50
        on_demand = cluster_of(document)["headGroupSpec"]["template"]["spec"]
        assert "nodeSelector" not in on_demand
        assert "tolerations" not in on_demand
