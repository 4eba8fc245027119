"""What the fields of a manifest may be called and hold: Kubernetes' own schemas, KubeRay's, and those that we use."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate.utils
import yaml

from cluster.manifests import Document

KUBERNETES = "1.37"
# A folder with KubeRay's custom resource definitions, as its releases carry them. They are not part of this project.
DEFINITIONS = os.environ.get("HEADWATER_KUBERAY_CRDS")

kubernetes_validate.utils.schema_contents = cache(kubernetes_validate.utils.schema_contents)

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "integer"}, {"type": "boolean"}
ANYTHING: dict[str, Any] = {"type": "object"}  # checked as a pod by Kubernetes' schema, or free by its nature
TEXTS = {"type": "object", "additionalProperties": {"type": "string"}}


def closed(required: tuple[str, ...] = (), **fields: Any) -> dict[str, Any]:
    return {"type": "object", "properties": fields, "required": list(required), "additionalProperties": False}


def several(item: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": item, "minItems": 1}


def one_of(*values: str) -> dict[str, Any]:
    return {"type": "string", "enum": list(values)}


# The fields of KubeRay 1.7 (ray.io/v1) that our manifests use, and no others.
GROUP = {"rayStartParams": TEXTS, "template": closed(("spec",), metadata=ANYTHING, spec=ANYTHING)}
CLUSTER = closed(
    ("headGroupSpec",),
    rayVersion=TEXT,
    authOptions=closed(mode=one_of("token", "disabled")),
    enableInTreeAutoscaling=FLAG,
    autoscalerOptions=closed(
        version=one_of("v1", "v2"),
        upscalingMode=one_of("Default", "Aggressive", "Conservative"),
        idleTimeoutSeconds=NUMBER,
        resources=ANYTHING,
        securityContext=ANYTHING,
        env=several(ANYTHING),
        volumeMounts=several(ANYTHING),
    ),
    gcsFaultToleranceOptions=closed(redisAddress=TEXT, redisPassword=closed(valueFrom=ANYTHING)),
    headGroupSpec=closed(("template",), serviceType=TEXT, **GROUP),
    workerGroupSpecs=several(
        closed(
            ("groupName", "maxReplicas", "minReplicas", "template"),
            groupName=TEXT,
            replicas=NUMBER,
            minReplicas=NUMBER,
            maxReplicas=NUMBER,
            **GROUP,
        )
    ),
)
RULE = closed(
    ("condition", "policy"),
    policy=one_of("DeleteCluster", "DeleteWorkers", "DeleteSelf", "DeleteNone"),
    condition=closed(jobStatus=one_of("SUCCEEDED", "FAILED"), jobDeploymentStatus=one_of("Failed"), ttlSeconds=NUMBER),
)
SPECS = {
    "RayCluster": CLUSTER,
    "RayJob": closed(
        ("entrypoint", "rayClusterSpec"),
        entrypoint=TEXT,
        submissionMode=one_of("K8sJobMode"),
        submitterConfig=closed(backoffLimit=NUMBER),
        submitterPodTemplate=closed(("spec",), metadata=ANYTHING, spec=ANYTHING),
        backoffLimit=NUMBER,
        preRunningDeadlineSeconds=NUMBER,
        activeDeadlineSeconds=NUMBER,
        deletionStrategy=closed(deletionRules=several(RULE)),
        shutdownAfterJobFinishes=FLAG,
        ttlSecondsAfterFinished=NUMBER,
        rayClusterSpec=CLUSTER,
    ),
    "RayService": closed(
        ("rayClusterConfig",),
        serveConfigV2=TEXT,
        excludeHeadPodFromServeSvc=FLAG,
        rayClusterDeletionDelaySeconds=NUMBER,
        upgradeStrategy=closed(type=TEXT),
        rayClusterConfig=CLUSTER,
    ),
}
OURS = {
    kind: closed(
        ("apiVersion", "kind", "metadata", "spec"),
        apiVersion=one_of("ray.io/v1"),
        kind=one_of(kind),
        metadata=ANYTHING,
        spec=spec,
    )
    for kind, spec in SPECS.items()
}


@cache
def definitions(folder: str) -> dict[str, dict[str, Any]]:
    """The schema of each kind in a folder of definitions, closed, and with any `metadata`."""
    found = [yaml.load(path.read_text(), Loader=LOADER) for path in sorted(Path(folder).glob("*.yaml"))]
    assert found, f"no definitions in {folder}"
    return {
        definition["spec"]["names"]["kind"]: _closed(version["schema"]["openAPIV3Schema"])
        for definition in found
        for version in definition["spec"]["versions"]
        if version["name"] == "v1"
    }


def _closed(schema: dict[str, Any]) -> dict[str, Any]:
    """An OpenAPI schema as a JSON schema in which an unknown field is an error, where the server would drop it."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    kept = {
        name: value for name, value in schema.items() if name in ("type", "enum", "minimum", "maximum", "required")
    }
    if "items" in schema:
        kept["items"] = _closed(schema["items"])
    if isinstance(schema.get("additionalProperties"), dict):
        kept["additionalProperties"] = _closed(schema["additionalProperties"])
    if "properties" in schema:
        kept["properties"] = {
            name: {"type": "object"} if name == "metadata" else _closed(field)
            for name, field in schema["properties"].items()
        }
        if not schema.get("x-kubernetes-preserve-unknown-fields"):
            kept["additionalProperties"] = False
    return kept


def kuberay_schemas() -> dict[str, dict[str, dict[str, Any]]]:
    """Every set of schemas for KubeRay's kinds that is at hand, by name."""
    return {"ours": OURS, **({"definitions": definitions(DEFINITIONS)} if DEFINITIONS else {})}


def kuberay_mistakes(document: Document, schemas: dict[str, dict[str, Any]]) -> list[str]:
    found = _validator(id(schemas), document["kind"], schemas).iter_errors(document)
    return [f"{error.json_path}: {error.message[:200]}" for error in found]


_VALIDATORS: dict[tuple[int, str], Any] = {}


def _validator(identity: int, kind: str, schemas: dict[str, dict[str, Any]]) -> Any:
    if (identity, kind) not in _VALIDATORS:
        _VALIDATORS[identity, kind] = jsonschema.Draft202012Validator(schemas[kind])
    return _VALIDATORS[identity, kind]


def core_mistake(document: Document) -> str | None:
    """What Kubernetes' own schema has against a document, an unknown field included."""
    try:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return f"{'.'.join(map(str, error.path))}: {error.message[:200]}"
    return None


def as_pod(template: Document) -> Document:
    """A pod template as the pod that it makes, which Kubernetes has a schema for."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "x", **template["metadata"]},
        "spec": template["spec"],
    }
