"""The Kubernetes manifests as a cluster would see them: rendered by kubectl, then held against the published schemas.

KubeRay's own rules (CEL) are not evaluated, and kinds of the Prometheus operator have no schema here.
"""

import copy
import gzip
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from operators.metrics import name_of
from stages.config.errors import Category
from stages.config.graph import Stage
from stages.config.request import Cost
from tests.places import REPOSITORY

KUBERNETES = REPOSITORY / "infra" / "kubernetes"
CRDS = REPOSITORY.parent / "shared" / "data" / "kuberay-crds"
RENDERED = ("base", "overlays/cpu", "overlays/gpu", "overlays/multi-node", "smoke-test")
KUBERNETES_VERSION = "1.34"
WITHOUT_SCHEMA = {"PodMonitor"}
SECRETS = {
    "athanor-s3": {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"},
    "athanor-mlflow": {"user", "password", "admin-password", "flask-secret", "backend-store-uri"},
    "athanor-ray": {"auth_token"},
    "athanor-endpoints": {"ATHANOR_SEAL_KEY", "ATHANOR_ENDPOINT_API_KEY", "ATHANOR_JUDGE_API_KEY"},
}


@lru_cache
def rendered(folder: str) -> tuple[dict[str, Any], ...]:
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed: nothing renders the kustomizations")
    done = subprocess.run(
        ["kubectl", "kustomize", str(KUBERNETES / folder)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return tuple(yaml.safe_load_all(done.stdout))


@lru_cache
def ray_validator(kind: str) -> Any:
    """By the strict JSON Schema of KubeRay's own kind; the API server, too, refuses a field that is not in it."""
    file = CRDS / f"ray.io_{kind.lower()}s.yaml.gz"
    if not file.exists():
        pytest.skip(f"{file} is not there: KubeRay's CRDs come with the project's shared data, not with the code")
    definition = yaml.load(gzip.decompress(file.read_bytes()), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    version = next(version for version in definition["spec"]["versions"] if version["name"] == "v1")
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: dict[str, Any]) -> dict[str, Any]:
    """A CRD's structural schema as JSON Schema that knows no field but the named ones."""
    made = dict(schema)
    if made.pop("x-kubernetes-int-or-string", False):
        made.pop("type", None)
        made.setdefault("anyOf", [{"type": "integer"}, {"type": "string"}])
    if "properties" in made:
        made["properties"] = {name: strict(value) for name, value in made["properties"].items()}
        if made["properties"].keys() == {"apiVersion", "kind", "metadata", "spec", "status"}:
            made["properties"]["metadata"] = {"type": "object"}  # the API server's own, in no CRD
        if not made.get("x-kubernetes-preserve-unknown-fields"):
            made.setdefault("additionalProperties", False)
    if isinstance(made.get("additionalProperties"), dict):
        made["additionalProperties"] = strict(made["additionalProperties"])
    if "items" in made:
        made["items"] = strict(made["items"])
    return made


def validate(document: dict[str, Any]) -> None:
    """Raise when an API server would refuse the document for its form."""
    if document["apiVersion"].startswith("ray.io/"):
        ray_validator(document["kind"]).validate(document)
    elif document["kind"] not in WITHOUT_SCHEMA:
        kubernetes_validate.validate(document, KUBERNETES_VERSION, strict=True)


def named(folder: str, kind: str, name: str) -> dict[str, Any]:
    return next(d for d in rendered(folder) if (d["kind"], d["metadata"]["name"]) == (kind, name))


def pod_specs(node: Any) -> Iterator[dict[str, Any]]:
    """Every pod specification in a document, however deep."""
    if isinstance(node, dict):
        if "containers" in node:
            yield node
        for value in node.values():
            yield from pod_specs(value)
    elif isinstance(node, list):
        for value in node:
            yield from pod_specs(value)


@pytest.mark.parametrize("folder", RENDERED)
def test_every_document_meets_its_schema(folder: str) -> None:
    for document in rendered(folder):
        try:
            validate(document)
        except pytest.skip.Exception:
            raise
        except Exception as error:
            raise AssertionError(f"{document['kind']} {document['metadata']['name']}: {error}") from error


FREE_FORM = {
    *("annotations", "clusterSelector", "data", "labels", "limits", "matchLabels", "nodeSelector", "rayStartParams"),
    *("requests", "selector"),
}
"""Maps whose names are the user's: nobody can tell a typo there."""
KINDS = ("ConfigMap", "Deployment", "Job", "Namespace", "NetworkPolicy", "RayCluster", "RayJob", "Service")


def fields(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """The path of every field of a document whose name the schema gives."""
    if isinstance(node, list):
        for index, value in enumerate(node):
            yield from fields(value, (*path, index))
    elif isinstance(node, dict):
        for name, value in node.items():
            yield (*path, name)
            if name != "metadata" and name not in FREE_FORM:
                yield from fields(value, (*path, name))


def is_valid(document: dict[str, Any]) -> bool:
    try:
        validate(document)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError):
        return False
    return True


def test_the_kinds_below_are_all_there_are() -> None:
    assert {d["kind"] for folder in RENDERED for d in rendered(folder)} - WITHOUT_SCHEMA == set(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_typo_in_any_field_of_any_kind_is_caught(kind: str) -> None:
    document = next(d for folder in RENDERED for d in rendered(folder) if d["kind"] == kind)
    tried, missed = set[tuple](), []
    for path in fields(document):
        shape = tuple(step for step in path if isinstance(step, str))
        if shape in tried or shape in (("apiVersion",), ("kind",)):
            continue
        tried.add(shape)
        broken = copy.deepcopy(document)
        node = broken
        for step in path[:-1]:
            node = node[step]
        node[f"{path[-1]}x"] = node.pop(path[-1])
        if is_valid(broken):
            missed.append(".".join(shape))
    assert missed == []


@pytest.mark.parametrize(
    ("folder", "kind", "name", "path", "typo"),
    [
        ("overlays/gpu", "RayCluster", "athanor", ("spec",), "enableInTreeAutoscalin"),
        ("overlays/gpu", "RayCluster", "athanor", ("spec", "workerGroupSpecs", 1), "maxReplica"),
        ("smoke-test", "RayJob", "smoke-test", ("spec",), "entryPoint"),
    ],
)
def test_a_misspelt_field_of_kuberay_is_caught(folder: str, kind: str, name: str, path: tuple, typo: str) -> None:
    broken = copy.deepcopy(named(folder, kind, name))
    node = broken
    for step in path:
        node = node[step]
    node[typo] = True
    with pytest.raises(jsonschema.ValidationError, match=typo):
        validate(broken)


@pytest.mark.parametrize("folder", RENDERED)
def test_every_pod_may_run_under_the_restricted_standard(folder: str) -> None:
    """Kubernetes' Pod Security Standard `restricted`, which the namespace enforces."""
    for document in rendered(folder):
        for pod in pod_specs(document):
            where = f"{document['kind']} {document['metadata']['name']}"
            assert pod["securityContext"]["runAsNonRoot"] is True, where
            assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, where
            assert not any(key in pod for key in ("hostNetwork", "hostPID", "hostIPC")), where
            for container in (*pod["containers"], *pod.get("initContainers", ())):
                assert container["securityContext"]["allowPrivilegeEscalation"] is False, where
                assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}, where
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys(), where
            assert all(volume.keys() & {"emptyDir", "configMap", "secret"} for volume in pod.get("volumes", ())), where


def test_every_ray_node_gets_the_keys_of_endpoints_and_starts_without_them() -> None:
    """Airflow's task pods have the same ATHANOR_SEAL_KEY from the Secret `airflow-athanor`."""
    for folder in ("overlays/cpu", "overlays/gpu", "overlays/multi-node"):
        spec = named(folder, "RayCluster", "athanor")["spec"]
        groups = [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        assert len(groups) > 1
        for group in groups:
            (container,) = group["template"]["spec"]["containers"]
            assert {"secretRef": {"name": "athanor-endpoints", "optional": True}} in container["envFrom"]


@pytest.mark.parametrize("folder", RENDERED)
def test_secrets_are_named_but_not_in_the_manifests(folder: str) -> None:
    text = json.dumps(rendered(folder))
    assert not [document for document in rendered(folder) if document["kind"] == "Secret"]
    for reference in find_key(rendered(folder), "secretKeyRef"):
        assert reference["key"] in SECRETS[reference["name"]], f"{reference} is not in docs/DEPLOY.md's table"
    for reference in find_key(rendered(folder), "secretRef"):
        assert reference["name"] in SECRETS
    assert "PersistentVolumeClaim" not in text


def find_key(node: Any, key: str) -> Iterator[Any]:
    if isinstance(node, dict):
        yield from ([node[key]] if key in node else [])
        for value in node.values():
            yield from find_key(value, key)
    elif isinstance(node, list | tuple):
        for value in node:
            yield from find_key(value, key)


@pytest.mark.parametrize("folder", RENDERED)
def test_no_service_sets_variables_in_pods(folder: str) -> None:
    """A Service named `mlflow` would set MLFLOW_PORT=tcp://10.0.0.1:5000, which `mlflow server` takes for its own."""
    for document in rendered(folder):
        assert all(pod["enableServiceLinks"] is False for pod in pod_specs(document)), document["metadata"]["name"]


def test_a_pod_that_no_policy_names_can_reach_only_dns() -> None:
    policies = [d["spec"] for d in rendered("base") if d["kind"] == "NetworkPolicy"]
    unnamed = [policy for policy in policies if policy["podSelector"] == {}]
    assert any(sorted(policy["policyTypes"]) == ["Egress", "Ingress"] for policy in unnamed)
    ports = {port["port"] for policy in unnamed for rule in policy.get("egress", ()) for port in rule["ports"]}
    assert ports == {53}
    assert not any(policy.get("ingress") for policy in unnamed)


def test_ray_asks_for_its_token_and_grows_by_itself() -> None:
    spec = named("overlays/gpu", "RayCluster", "athanor")["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "athanor-ray"}
    assert spec["enableInTreeAutoscaling"] is True
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert groups.keys() == {"cpu", "gpu"}
    gpu = groups["gpu"]["template"]["spec"]["containers"][0]
    assert (groups["gpu"]["minReplicas"], gpu["resources"]["limits"]["nvidia.com/gpu"]) == (0, 1)
    assert gpu["image"].endswith("-cuda")


def test_ray_runs_the_version_of_the_lock_file() -> None:
    pinned = [line for line in (REPOSITORY / "constraints.txt").read_text().splitlines() if line.startswith("ray==")]
    assert pinned == [f"ray=={named('base', 'RayCluster', 'athanor')['spec']['rayVersion']}"]


def test_a_training_job_over_machines_gets_whole_machines() -> None:
    spec = named("overlays/multi-node", "RayCluster", "athanor")["spec"]
    group = next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")
    pod = group["template"]["spec"]
    assert pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    rule = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"][0]
    assert rule["topologyKey"] == "kubernetes.io/hostname"
    assert named("overlays/multi-node", "PodMonitor", "ray")


def test_every_document_renders_in_the_namespace_of_its_policies() -> None:
    for folder in RENDERED:
        spaces = {d["metadata"].get("namespace") for d in rendered(folder) if d["kind"] != "Namespace"}
        assert spaces == {"athanor"}, folder


def test_the_helm_values_are_yaml_and_name_the_release_of_the_images() -> None:
    values = yaml.safe_load((KUBERNETES / "helm" / "airflow-values.yaml").read_text())
    pinned = (REPOSITORY / "constraints.txt").read_text().splitlines()
    assert f"apache-airflow=={values['airflowVersion']}" in pinned
    bundle = values["dagProcessor"]["dagBundleConfigList"][0]["kwargs"]
    assert values["defaultAirflowTag"].startswith(bundle["tracking_ref"].removeprefix("v"))


def test_airflow_and_rays_workers_have_the_same_store_and_the_same_open_folders() -> None:
    values = yaml.safe_load((KUBERNETES / "helm" / "airflow-values.yaml").read_text())
    airflow = {entry["name"]: entry["value"] for entry in values["env"]}
    lines = (KUBERNETES / "base" / "athanor.env").read_text().splitlines()
    ray = dict(line.split("=", 1) for line in lines if not line.startswith("#"))
    for name in (
        "ARTIFACT_STORE",
        "ATHANOR_ENDPOINTS",
        "ATHANOR_JUDGE_ENDPOINTS",
        "ATHANOR_SOURCE_ROOTS",
        "AWS_REGION",
        "MLFLOW_TRACKING_URI",
    ):
        assert airflow[name] == ray[name], name


def test_every_metric_of_a_stage_gets_its_name_in_prometheus_and_the_dashboard_knows_no_other() -> None:
    """As the StatsD exporter reads globs: a `*` stands for what lies between two dots."""
    values = yaml.safe_load((KUBERNETES / "helm" / "airflow-values.yaml").read_text())
    patterns = {entry["match"]: entry["name"] for entry in values["statsd"]["extraMappings"]}
    globs = {re.compile(re.escape(match).replace(r"\*", r"[^.]+")): name for match, name in patterns.items()}
    spent = [name for name in Cost.model_fields if name.endswith("_seconds")]
    emitted = ["built", "hit", "work", "wait", *spent, *(f"failed.{c.value}" for c in Category)]
    used = set()
    for what in emitted:
        sent = f"airflow.{name_of(Stage.SFT, what)}"
        (name,) = [name for glob, name in globs.items() if glob.fullmatch(sent)]
        used.add(name)
    assert used == set(patterns.values())
    dashboard = (KUBERNETES / "monitoring" / "athanor.json").read_text()
    drawn = set(re.findall(r"athanor_stage_\w+", dashboard))
    assert {re.sub("_(sum|count)$", "", name) for name in drawn} <= used
