"""The manifests are what they say, as far as that shows without a cluster.

kubectl renders base and overlays; the result is held against Kubernetes' own schemas, against the server's settings
and against the image that it runs.
"""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from service.settings import Settings
from stepcast.errors import ConfigError

ROOT = Path(__file__).parents[1]
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PORT = Settings.model_fields["port"].default

pytestmark = pytest.mark.kubectl
overlays = pytest.mark.parametrize("overlay", ["base", "overlays/dev", "overlays/prod"])


class Manifests:
    """What kubectl makes of a kustomization."""

    def __init__(self, directory: Path) -> None:
        run = subprocess.run(["kubectl", "kustomize", directory], capture_output=True, text=True)
        assert run.returncode == 0, run.stderr
        self.all: list[dict[str, Any]] = list(yaml.safe_load_all(run.stdout))

    def kind(self, kind: str) -> list[dict[str, Any]]:
        return [m for m in self.all if m["kind"] == kind]

    def one(self, kind: str, name: str) -> dict[str, Any]:
        (found,) = [m for m in self.kind(kind) if m["metadata"]["name"] == name]
        return found

    def pods(self) -> Iterator[dict[str, Any]]:
        for owner in self.kind("Deployment") + self.kind("StatefulSet"):
            yield owner["spec"]["template"]

    @property
    def service_pod(self) -> dict[str, Any]:
        return self.one("Deployment", "stepcast")["spec"]["template"]["spec"]

    @property
    def service(self) -> dict[str, Any]:
        (container,) = self.service_pod["containers"]
        return container

    def settings(self) -> dict[str, str]:
        """The STEPCAST_ variables of the service's container, as far as the manifests say them."""
        values: dict[str, str] = {}
        for source in self.service["envFrom"]:
            values |= self.one("ConfigMap", source["configMapRef"]["name"])["data"]
        return values | {e["name"]: e["value"] for e in self.service["env"] if "value" in e}


def render(overlay: str) -> Manifests:
    return Manifests(ROOT / "k8s" / overlay)


@overlays
def test_manifests_fit_kubernetes_schemas(overlay: str) -> None:
    """No unknown field and no wrong type, from the oldest promised Kubernetes (preStop sleep) to the newest."""
    manifests = render(overlay).all
    for version in ("1.30", kubernetes_validate.latest_version()):
        for manifest in manifests:
            kubernetes_validate.validate(manifest, version, strict=True)


def test_schema_check_refuses_a_wrong_manifest() -> None:
    manifest = render("base").one("Deployment", "stepcast")
    manifest["spec"]["template"]["spec"]["containers"][0]["readinesProbe"] = {}
    with pytest.raises(kubernetes_validate.ValidationError, match="readinesProbe"):
        kubernetes_validate.validate(manifest, "1.30", strict=True)


@pytest.mark.parametrize(
    ("overlay", "names"),
    [
        ("base", "Deployment/stepcast Service/stepcast"),
        ("overlays/dev", "Deployment/stepcast Service/stepcast"),
        (
            "overlays/prod",
            "Deployment/stepcast Service/stepcast HorizontalPodAutoscaler/stepcast PodDisruptionBudget/stepcast "
            "NetworkPolicy/stepcast",
        ),
    ],
)
def test_overlay_has_its_kinds(overlay: str, names: str) -> None:
    """Base and dev bring a Redis of their own, prod takes one from outside and leaves nothing of it behind."""
    own_redis = {f"{kind}/stepcast-redis" for kind in ("StatefulSet", "Service", "NetworkPolicy", "ConfigMap")}
    rendered = {
        f"{m['kind']}/{re.sub(r'-[a-z0-9]{10}$', '', m['metadata']['name'])}"  # without the content's hash
        for m in render(overlay).all
    }
    assert rendered == set(names.split()) | {"ConfigMap/stepcast-settings"} | (
        set() if overlay == "overlays/prod" else own_redis
    )


@overlays
def test_settings_are_known_to_the_server(overlay: str) -> None:
    """The server itself reads the container's variables; an unknown or wrong one stops its start."""
    manifests = render(overlay)
    settings = Settings.read(manifests.settings())
    assert settings.port == PORT
    assert settings.host == Settings.model_fields["host"].default  # the image's command says 0.0.0.0


@overlays
def test_no_service_link_becomes_a_setting(overlay: str) -> None:
    """Kubernetes would put STEPCAST_PORT=tcp://... for Service `stepcast` into every pod, and the start would fail."""
    with pytest.raises(ConfigError, match="STEPCAST_PORT"):
        Settings.read({"STEPCAST_PORT": f"tcp://10.0.0.1:{PORT}"})
    for pod in render(overlay).pods():
        assert pod["spec"]["enableServiceLinks"] is False


@overlays
def test_ports_are_the_servers(overlay: str) -> None:
    manifests = render(overlay)
    assert manifests.service["ports"] == [{"name": "http", "containerPort": PORT}]
    (port,) = manifests.one("Service", "stepcast")["spec"]["ports"]
    assert (port["port"], port["targetPort"]) == (PORT, "http")
    pod = manifests.one("Deployment", "stepcast")["spec"]["template"]
    assert pod["metadata"]["annotations"]["prometheus.io/port"] == str(PORT)


@overlays
def test_probes_ask_what_the_server_answers(overlay: str) -> None:
    service = render(overlay).service
    for probe, path in [("startup", "live"), ("liveness", "live"), ("readiness", "ready")]:
        assert service[f"{probe}Probe"]["httpGet"] == {"path": f"/healthz/{path}", "port": "http"}
    startup = service["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= 60, "time to load and prove models"


@overlays
def test_pods_run_with_the_least_rights(overlay: str) -> None:
    for pod in render(overlay).pods():
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] > 0
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for container in spec["containers"]:
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
            assert container["resources"]["requests"].keys() == {"cpu", "memory"}
            assert "memory" in container["resources"]["limits"]


@overlays
def test_service_pod_runs_as_the_images_user(overlay: str) -> None:
    context = render(overlay).service_pod["securityContext"]
    users = re.findall(r"^USER (\S+)$", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    assert len(set(users)) == 1
    assert f"{context['runAsUser']}:{context['runAsGroup']}" in users


@pytest.mark.parametrize(
    ("overlay", "image"),
    [
        ("base", "stepcast-service"),
        ("overlays/dev", "stepcast-service:dev"),
        ("overlays/prod", f"registry.example.com/stepcast-service:{VERSION}"),
    ],
)
def test_image_is_the_one_that_is_built(overlay: str, image: str) -> None:
    """Prod names the version of the project, never a tag that moves."""
    assert render(overlay).service["image"] == image


@overlays
def test_names_and_selectors_lead_somewhere(overlay: str) -> None:
    manifests = render(overlay)
    labels = [pod["metadata"]["labels"] for pod in manifests.pods()]
    maps = {m["metadata"]["name"] for m in manifests.kind("ConfigMap")}

    def matches(selector: Mapping[str, str]) -> bool:
        return sum(selector.items() <= pod.items() for pod in labels) == 1

    for service in manifests.kind("Service"):
        assert matches(service["spec"]["selector"])
    for policy in manifests.kind("NetworkPolicy"):
        assert matches(policy["spec"]["podSelector"]["matchLabels"])
    for budget in manifests.kind("PodDisruptionBudget"):
        assert matches(budget["spec"]["selector"]["matchLabels"])
    for spread in manifests.service_pod.get("topologySpreadConstraints", []):
        assert matches(spread["labelSelector"]["matchLabels"])
    for scaler in manifests.kind("HorizontalPodAutoscaler"):
        target = scaler["spec"]["scaleTargetRef"]
        manifests.one(target["kind"], target["name"])
    for pod in manifests.pods():
        for volume in pod["spec"]["volumes"]:
            assert "configMap" not in volume or volume["configMap"]["name"] in maps
    for stateful in manifests.kind("StatefulSet"):
        manifests.one("Service", stateful["spec"]["serviceName"])


@overlays
def test_pod_outlives_its_drain(overlay: str) -> None:
    """SIGTERM comes after preStop; then drain_s for open requests, drain_s for waiting steps, and the store's end."""
    manifests = render(overlay)
    pre_stop_s = manifests.service["lifecycle"]["preStop"]["sleep"]["seconds"]
    drain_s = Settings.read(manifests.settings()).drain_s
    assert manifests.service_pod["terminationGracePeriodSeconds"] >= pre_stop_s + 2 * drain_s + 5
    rolling = manifests.one("Deployment", "stepcast")["spec"]["strategy"]["rollingUpdate"]
    assert rolling == {"maxUnavailable": 0, "maxSurge": 1}


@pytest.mark.parametrize("overlay", ["base", "overlays/dev"])
def test_store_is_the_rendered_redis(overlay: str) -> None:
    manifests = render(overlay)
    host, port = re.fullmatch(r"redis://([a-z-]+):(\d+)/0", Settings.read(manifests.settings()).store).groups()  # type: ignore[union-attr]
    assert manifests.one("Service", host)["spec"]["ports"][0]["port"] == int(port)
    assert manifests.one("StatefulSet", host)["spec"]["volumeClaimTemplates"][0]["metadata"]["name"] == "sessions"


def test_prod_takes_store_and_keys_from_a_secret() -> None:
    """Passwords and keys are in no manifest, and without the Secret no pod starts."""
    manifests = render("overlays/prod")
    secret = {
        e["name"]: (e["valueFrom"]["secretKeyRef"]["name"], e["valueFrom"]["secretKeyRef"]["key"])
        for e in manifests.service["env"]
    }
    assert secret == {
        "STEPCAST_STORE": ("stepcast-secrets", "store-url"),
        "STEPCAST_API_KEYS": ("stepcast-secrets", "api-keys"),
    }
    assert not any(e["valueFrom"]["secretKeyRef"].get("optional") for e in manifests.service["env"])
    assert not secret.keys() & manifests.settings().keys()
    assert manifests.kind("Secret") == []


def test_prod_keeps_replicas_through_change() -> None:
    manifests = render("overlays/prod")
    assert "replicas" not in manifests.one("Deployment", "stepcast")["spec"], "the autoscaler's, not ours"
    assert manifests.one("HorizontalPodAutoscaler", "stepcast")["spec"]["minReplicas"] == 3
    assert manifests.one("PodDisruptionBudget", "stepcast")["spec"]["maxUnavailable"] == 1
    spread = manifests.service_pod["topologySpreadConstraints"]
    assert [s["topologyKey"] for s in spread] == ["topology.kubernetes.io/zone", "kubernetes.io/hostname"]
    (resources,) = [c["resources"] for c in manifests.service_pod["containers"]]
    assert resources["limits"]["memory"] == resources["requests"]["memory"]


def test_prod_autoscaler_fires_before_a_worker_is_at_its_limit() -> None:
    """Utilization is a share of the request, and one worker's event loop takes one core at most."""
    manifests = render("overlays/prod")
    (metric,) = manifests.one("HorizontalPodAutoscaler", "stepcast")["spec"]["metrics"]
    resources = manifests.service["resources"]
    cores = float(resources["requests"]["cpu"]) * metric["resource"]["target"]["averageUtilization"] / 100
    assert Settings.read(manifests.settings()).workers == 1
    assert 0.5 <= cores <= 0.8
    assert float(resources["limits"]["cpu"]) > 1, "the limit must not be what ends its growth"


def test_prod_lets_scrapes_and_ingress_controllers_in() -> None:
    (policy,) = render("overlays/prod").kind("NetworkPolicy")
    (rule,) = policy["spec"]["ingress"]
    (names,) = [
        expression["values"]
        for source in rule["from"]
        for expression in source.get("namespaceSelector", {}).get("matchExpressions", [])
    ]
    assert names == ["ingress-nginx", "monitoring"]


def test_models_volume_of_the_operations_page_renders(tmp_path: Path) -> None:
    """The patch that the documentation shows for models on a volume fits the base."""
    page = (ROOT / "docs" / "operations.md").read_text()
    (patch,) = re.findall(r"```yaml\n(# models-volume\.yaml\n.*?)```", page, flags=re.DOTALL)
    shutil.copytree(ROOT / "k8s" / "base", tmp_path / "base")
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "models-volume.yaml").write_text(patch)
    (tmp_path / "site" / "kustomization.yaml").write_text(
        "resources: [../base]\npatches: [{path: models-volume.yaml}]\n"
    )
    manifests = Manifests(tmp_path / "site")
    kubernetes_validate.validate(manifests.one("Deployment", "stepcast"), "1.30", strict=True)
    mounts = {m["name"]: m["mountPath"] for m in manifests.service["volumeMounts"]}
    assert mounts == {"tmp": "/tmp", "models": manifests.settings()["STEPCAST_MODELS"]}


def test_redis_container_has_room_for_a_rewrite() -> None:
    """A rewrite of the append-only file forks; in the worst case every page is there twice."""
    conf = (ROOT / "k8s" / "base" / "redis.conf").read_text()
    (maxmemory_mb,) = re.findall(r"^maxmemory (\d+)mb$", conf, flags=re.MULTILINE)
    for overlay in ("base", "overlays/dev"):
        (container,) = render(overlay).one("StatefulSet", "stepcast-redis")["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["memory"] == f"{2 * int(maxmemory_mb) // 1024}Gi"
