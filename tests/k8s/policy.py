"""What every set of manifests has to keep to: each rule yields what breaks it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import yaml

from cluster.manifests import COMPONENT, LONGEST_OBJECT, RAY_KINDS, Document, cluster_of
from tests.k8s.manifests_of import kinds

Rule = Callable[[list[Document]], Iterator[str]]
RULES: dict[str, Rule] = {}

INSIDE = {8265, 10001, 6379}  # dashboard and Jobs API, client, GCS
SECRET = re.compile(r"KEY|TOKEN|PASSWORD|SECRET")
STAGES = {"ingest", "tokenizer", "shards", "pretrain", "sft", "rank", "reward", "rlhf", "evaluate"}


def rule(check: Rule) -> Rule:
    RULES[check.__name__] = check
    return check


# What the rules look at


def templates(holder: Any) -> Iterator[Document]:
    """Every pod template in a document, wherever it stands and whatever makes pods of it; a pod is one itself."""
    if isinstance(holder, dict):
        if isinstance(holder.get("spec"), dict) and "containers" in holder["spec"]:
            yield holder
        for value in holder.values():
            yield from templates(value)
    elif isinstance(holder, list):
        for value in holder:
            yield from templates(value)


def pods(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every pod, with a name to tell it by."""
    for document in documents:
        for template in templates(document):
            first = template["spec"]["containers"][0]["name"]
            yield f"{document['kind']} {document['metadata']['name']} {first}", template["spec"]


def within(spec: Document) -> list[Document]:
    """Every container of a pod: sidecars, and those that come before or are added later."""
    names = ("initContainers", "containers", "ephemeralContainers")
    return [container for name in names for container in spec.get(name, ())]


def containers(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    """Every container, the autoscalers' among them."""
    for name, spec in pods(documents):
        for container in within(spec):
            yield f"{name}/{container['name']}", container
    for document in kinds(documents, *RAY_KINDS):
        if "autoscalerOptions" in cluster_of(document):
            yield f"{document['metadata']['name']} autoscaler", cluster_of(document)["autoscalerOptions"]


def clusters(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for document in kinds(documents, *RAY_KINDS):
        yield f"{document['kind']} {document['metadata']['name']}", cluster_of(document)


def heads(documents: list[Document]) -> Iterator[tuple[str, Document]]:
    for name, cluster in clusters(documents):
        yield name, cluster["headGroupSpec"]


def environment(container: Document) -> dict[str, Document]:
    return {variable["name"]: variable for variable in container.get("env", ())}


def confinement(holder: Document) -> Document:
    return holder.get("securityContext", {})


def numbers(documents: list[Document]) -> dict[str, set[int]]:
    """The ports of containers by their names."""
    found: dict[str, set[int]] = {}
    for _, container in containers(documents):
        for port in container.get("ports", ()):
            found.setdefault(port.get("name", ""), set()).add(port["containerPort"])
    return found


def opens(allowed: Document, wanted: set[int], documents: list[Document]) -> bool:
    """Whether a rule of a NetworkPolicy lets one of these ports through, named, in a range, or as any port."""
    for port in allowed.get("ports") or [{}]:
        first = port.get("port")
        if first is None or (isinstance(first, str) and wanted & numbers(documents).get(first, wanted)):
            return True
        if isinstance(first, int) and wanted & set(range(first, port.get("endPort", first) + 1)):
            return True
    return False


def any_port(allowed: Document) -> bool:
    return not allowed.get("ports") or any("port" not in port for port in allowed["ports"])


# How pods are confined


@rule
def pods_are_not_root(documents):
    for name, spec in pods(documents):
        if not confinement(spec).get("runAsNonRoot") or not confinement(spec).get("runAsUser"):
            yield name
    for name, container in containers(documents):
        if not confinement(container).get("runAsNonRoot") or confinement(container).get("runAsUser") == 0:
            yield name


@rule
def roots_are_read_only(documents):
    yield from _without(documents, "readOnlyRootFilesystem", True)


@rule
def privileges_do_not_grow(documents):
    yield from _without(documents, "allowPrivilegeEscalation", False)
    for name, container in containers(documents):
        if confinement(container).get("privileged"):
            yield name


@rule
def capabilities_are_dropped(documents):
    yield from _without(documents, "capabilities", {"drop": ["ALL"]})


@rule
def seccomp_is_on(documents):
    yield from _without(documents, "seccompProfile", {"type": "RuntimeDefault"})
    for name, spec in pods(documents):
        if confinement(spec).get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield name


def _without(documents: list[Document], field: str, value: Any) -> Iterator[str]:
    for name, container in containers(documents):
        if confinement(container).get(field) != value:
            yield name


@rule
def resources_are_limited(documents):
    for name, container in containers(documents):
        resources = container.get("resources", {})
        for part in ("requests", "limits"):
            if not {"cpu", "memory", "ephemeral-storage"} <= set(resources.get(part, ())):
                yield f"{name} {part}"


@rule
def nothing_of_the_node_is_shared(documents):
    for name, spec in pods(documents):
        if any(spec.get(field) for field in ("hostNetwork", "hostPID", "hostIPC")):
            yield name
        if any("hostPath" in volume for volume in spec.get("volumes", ())):
            yield name
        if any("hostPort" in port for container in within(spec) for port in container.get("ports", ())):
            yield name


@rule
def written_to_is_scratch_of_a_stated_size_or_the_runs(documents):
    for name, spec in pods(documents):
        for volume in spec.get("volumes", ()):
            if "emptyDir" in volume and "sizeLimit" not in volume["emptyDir"]:
                yield f"{name} {volume['name']}"
            if set(volume) - {"name", "emptyDir", "projected", "persistentVolumeClaim", "configMap", "secret"}:
                yield f"{name} {volume['name']}"
            if "medium" in volume.get("emptyDir", {}):
                yield f"{name} {volume['name']} counts as memory"


@rule
def tokens_of_kubernetes_are_for_the_autoscaler_alone(documents):
    for name, spec in pods(documents):
        if spec.get("automountServiceAccountToken") is not False:
            yield name
        tokens = {volume["name"] for volume in spec.get("volumes", ()) if "projected" in volume}
        for container in within(spec):
            if tokens & {mount["name"] for mount in container.get("volumeMounts", ())}:
                yield f"{name}/{container['name']}"
    for account in kinds(documents, "ServiceAccount"):
        if account.get("automountServiceAccountToken") is not False:
            yield account["metadata"]["name"]


@rule
def secrets_are_named_and_never_written_down(documents):
    for document in kinds(documents, "Secret"):
        yield document["metadata"]["name"]
    for name, container in containers(documents):
        for variable in environment(container).values():
            if SECRET.search(variable["name"]) and "secretKeyRef" not in variable.get("valueFrom", {}):
                yield f"{name} {variable['name']}"
    for name, cluster in clusters(documents):
        password = cluster.get("gcsFaultToleranceOptions", {}).get("redisPassword", {})
        if "value" in password:
            yield name


@rule
def images_have_a_version_and_no_host(documents):
    for name, container in containers(documents):
        image = container.get("image", "headwater:0.1.0")
        if not re.fullmatch(r"[a-z0-9-]+(/[a-z0-9-]+)?:[a-z0-9.-]*\d[a-z0-9.-]*", image):
            yield f"{name} {image}"


# Who talks with whom


@rule
def the_network_denies_by_default(documents):
    denied = [
        policy
        for policy in kinds(documents, "NetworkPolicy")
        if policy["spec"]["podSelector"] == {} and set(policy["spec"]["policyTypes"]) == {"Ingress", "Egress"}
    ]
    if not any({"ingress", "egress"}.isdisjoint(policy["spec"]) for policy in denied):
        yield "no policy that denies"


@rule
def dashboard_jobs_and_client_stay_in_the_namespace(documents):
    for policy in kinds(documents, "NetworkPolicy"):
        for allowed in policy["spec"].get("ingress", ()):
            outside = "from" not in allowed or any(
                "namespaceSelector" in peer or "ipBlock" in peer for peer in allowed["from"]
            )
            if outside and opens(allowed, INSIDE, documents):
                yield policy["metadata"]["name"]


@rule
def nothing_is_offered_outside_the_cluster(documents):
    for name, head in heads(documents):
        if head["serviceType"] != "ClusterIP":
            yield name
    for document in documents:
        spec = document.get("spec", {})
        if document["kind"] in ("Ingress", "Gateway", "HTTPRoute", "TCPRoute", "Route"):
            yield document["metadata"]["name"]
        if document["kind"] == "Service" and (spec.get("type", "ClusterIP") != "ClusterIP" or "externalIPs" in spec):
            yield document["metadata"]["name"]


@rule
def ports_that_are_named_exist(documents):
    """A rule for a port that nobody has lets nothing through, and a service leads nowhere, without a word."""
    known = set(numbers(documents))
    for policy in kinds(documents, "NetworkPolicy"):
        for allowed in (*policy["spec"].get("ingress", ()), *policy["spec"].get("egress", ())):
            for port in allowed.get("ports", ()):
                if isinstance(port.get("port"), str) and port["port"] not in known:
                    yield policy["metadata"]["name"]
    for service in kinds(documents, "Service"):
        for port in service["spec"].get("ports", ()):
            if port.get("targetPort", port["port"]) not in _ports_behind(service, documents):
                yield service["metadata"]["name"]


def _ports_behind(service: Document, documents: list[Document]) -> set[int | str]:
    """Names and numbers of the ports of the pods that a service selects."""
    wanted = service["spec"].get("selector", {}).items()
    chosen = [template for template in templates(documents) if wanted <= template["metadata"]["labels"].items()]
    found = [
        port for template in chosen for container in within(template["spec"]) for port in container.get("ports", ())
    ]
    return {value for port in found for value in (port.get("name"), port["containerPort"]) if value}


@rule
def ways_out_are_few_and_miss_the_clouds_credentials(documents):
    for policy in kinds(documents, "NetworkPolicy"):
        for allowed in policy["spec"].get("egress", ()):
            for peer in allowed.get("to", [{}]):
                block = peer.get("ipBlock")
                if not peer or (block and (any_port(allowed) or "169.254.0.0/16" not in block.get("except", ()))):
                    yield policy["metadata"]["name"]


@rule
def every_call_to_ray_carries_a_token(documents):
    for name, cluster in clusters(documents):
        if cluster.get("authOptions") != {"mode": "token"} or not cluster.get("rayVersion"):
            yield name


@rule
def the_namespace_refuses_what_is_not_confined(documents):
    for namespace in kinds(documents, "Namespace"):
        if namespace["metadata"]["labels"].get("pod-security.kubernetes.io/enforce") != "restricted":
            yield namespace["metadata"]["name"]
    for document in documents:
        if document["kind"] != "Namespace" and document["metadata"].get("namespace") != "headwater":
            yield document["metadata"]["name"]


@rule
def disruptions_have_a_budget(documents):
    budgets = kinds(documents, "PodDisruptionBudget")
    numbers = [budget["spec"]["selector"]["matchLabels"] for budget in budgets if _kept(budget) >= 1]
    if not any(labels.get("ray.io/node-type") == "head" for labels in numbers):
        yield "heads"
    if not any(labels.get(COMPONENT) == "service" for labels in numbers):
        yield "replicas"


def _kept(budget: Document) -> int:
    """Pods that a drain leaves; 0 for a percentage, which Kubernetes refuses for pods without a controller."""
    kept = budget["spec"].get("minAvailable", 0)
    return kept if isinstance(kept, int) else 0


# How Ray is run


@rule
def heads_do_no_work(documents):
    for name, head in heads(documents):
        if head["rayStartParams"].get("num-cpus") != "0":
            yield name


@rule
def sizes_are_stated(documents):
    for name, cluster in clusters(documents):
        for group in cluster["workerGroupSpecs"]:
            if not 1 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
                yield name
            resources = group["template"]["spec"]["containers"][0]["resources"]
            if not resources["limits"]["cpu"].isdigit():
                yield f"{name}: Ray counts whole CPUs"


@rule
def the_autoscaler_is_the_second(documents):
    for name, cluster in clusters(documents):
        if cluster["enableInTreeAutoscaling"]:
            if cluster["autoscalerOptions"]["version"] != "v2":
                yield name
            groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
            if any("restartPolicy" in group["template"]["spec"] for group in groups):
                yield f"{name}: KubeRay replaces pods, and restarts none"


@rule
def jobs_have_deadlines_and_attempts(documents):
    for job in kinds(documents, "RayJob"):
        fields = ("activeDeadlineSeconds", "preRunningDeadlineSeconds", "backoffLimit")
        if not all(job["spec"].get(field, 0) > 0 for field in fields):
            yield job["metadata"]["name"]


@rule
def jobs_give_their_cluster_back(documents):
    """KubeRay refuses rules beside shutdownAfterJobFinishes, a rule twice, and workers deleted under an autoscaler."""
    for job in kinds(documents, "RayJob"):
        spec, rules = job["spec"], job["spec"].get("deletionStrategy", {}).get("deletionRules", [])
        ends = {rule["condition"].get("jobStatus") for rule in rules if rule["policy"] == "DeleteCluster"}
        twice = len({str((rule["policy"], rule["condition"])) for rule in rules}) < len(rules)
        if bool(rules) == bool(spec.get("shutdownAfterJobFinishes")) or twice:
            yield job["metadata"]["name"]
        if rules and not {"SUCCEEDED", "FAILED"} <= ends:
            yield job["metadata"]["name"]
        if any(rule["policy"] == "DeleteWorkers" for rule in rules):
            yield job["metadata"]["name"]


@rule
def jobs_are_submitted_by_a_confined_pod(documents):
    for job in kinds(documents, "RayJob"):
        if job["spec"]["submissionMode"] != "K8sJobMode" or "submitterPodTemplate" not in job["spec"]:
            yield job["metadata"]["name"]


@rule
def a_job_for_the_journey_and_for_each_stage(documents):
    found = {job["metadata"]["labels"][COMPONENT] for job in kinds(documents, "RayJob")}
    yield from {"journey", *STAGES} ^ found
    if len(kinds(documents, "RayCluster")) != 1 or len(kinds(documents, "RayService")) != 1:
        yield "one cluster and one service"


@rule
def whoever_is_stopped_saves_first(documents):
    """The hook waits less long than Kubernetes does, and Ray's own wait for a driver no longer."""
    for name, spec in pods(documents):
        container = spec["containers"][0]
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        serves = any(port.get("name") == "serve" for port in container.get("ports", ()))
        if container["name"] in ("ray-head", "ray-worker") and not serves:
            patience = spec["terminationGracePeriodSeconds"]
            if "cluster.leaving" not in hook or int(hook[-1]) >= patience:
                yield name
            if container["name"] == "ray-head":
                wait = environment(container).get("RAY_JOB_STOP_WAIT_TIME_S", {}).get("value", "3")
                if not int(hook[-1] if hook else 0) <= int(wait) < patience or "--ask" not in hook:
                    yield name


@rule
def every_pod_of_a_job_sees_the_runs(documents):
    """A volume where the root is a path, none where it is object storage; the service may not write to it."""
    claims = {claim["metadata"]["name"] for claim in kinds(documents, "PersistentVolumeClaim")}
    for name, spec in pods(documents):
        container = spec["containers"][0]
        run = environment(container).get("HEADWATER_RUN", {}).get("value", "")
        mounts = {mount["name"]: mount for mount in container.get("volumeMounts", ())}
        if run.startswith("s3://") and ("runs" in mounts or claims):
            yield name
        if run.startswith("/") and not (run.startswith(mounts["runs"]["mountPath"]) and claims):
            yield name
        serves = any(port.get("name") == "serve" for port in container.get("ports", ()))
        if serves and not mounts.get("runs", {"readOnly": True}).get("readOnly"):
            yield name


@rule
def the_service_is_ready_when_a_model_answers(documents):
    for service in kinds(documents, "RayService"):
        (group,) = cluster_of(service)["workerGroupSpecs"]
        container = group["template"]["spec"]["containers"][0]
        config = yaml.safe_load(service["spec"]["serveConfigV2"])
        if container["readinessProbe"]["httpGet"] != {"path": "/readyz", "port": config["http_options"]["port"]}:
            yield service["metadata"]["name"]


@rule
def the_services_keys_are_a_secret_or_it_is_called_open(documents):
    for service in kinds(documents, "RayService"):
        (application,) = yaml.safe_load(service["spec"]["serveConfigV2"])["applications"]
        keys, name = application["args"].get("keys"), service["metadata"]["name"]
        if bool(keys) == bool(application["args"].get("insecure")):
            yield name
        for group in cluster_of(service)["workerGroupSpecs"] if keys else ():
            spec = group["template"]["spec"]
            secrets = {volume["name"] for volume in spec["volumes"] if "secret" in volume}
            mounts = [mount for mount in spec["containers"][0]["volumeMounts"] if mount["name"] in secrets]
            if not any(keys.startswith(f"{mount['mountPath']}/") and mount.get("readOnly") for mount in mounts):
                yield f"{name}: {keys} is of no Secret"


@rule
def names_leave_room_for_kuberays(documents):
    for document in kinds(documents, *RAY_KINDS):
        name = document["metadata"]["name"]
        if len(name) > LONGEST_OBJECT or not re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name):
            yield name
    yield from sorted(name for name, count in _counts(documents).items() if count > 1)


def _counts(documents: list[Document]) -> dict[str, int]:
    keys = [f"{document['kind']} {document['metadata']['name']}" for document in documents]
    return {key: keys.count(key) for key in keys}


@rule
def everything_says_what_it_belongs_to(documents):
    for document in documents:
        labels = document["metadata"].get("labels", {})
        if labels.get("app.kubernetes.io/part-of") != "headwater" or COMPONENT not in labels:
            yield document["metadata"]["name"]
    for document in kinds(documents, *RAY_KINDS):
        groups = [cluster_of(document)["headGroupSpec"], *cluster_of(document)["workerGroupSpecs"]]
        templates = [group["template"] for group in groups]
        templates += [document["spec"]["submitterPodTemplate"]] if "submitterPodTemplate" in document["spec"] else []
        if any(template["metadata"]["labels"]["app.kubernetes.io/part-of"] != "headwater" for template in templates):
            yield f"{document['metadata']['name']}: the network would not let it through"
