"""The kustomize base and its overlays: valid, consistent with themselves, and with the services that they start."""

import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from retriever_service.config import Backend, RetrieverSettings
from tests.deploy.rendered import (
    BASE,
    ROOT,
    container,
    loaded_settings,
    named,
    of_kind,
    settings_of,
    tool,
    workload,
)

SERVICES = ["retriever", "generator"]
WIRE_NAMES = {
    "retriever": "rag.retriever.v1.RetrieverService",
    "generator": "rag.generator.v1.GeneratorService",
}


def pod_labels(service: str) -> dict[str, str]:
    labels: dict[str, str] = workload(service)["spec"]["template"]["metadata"]["labels"]
    return labels


def matches(selector: dict[str, str], labels: dict[str, str]) -> bool:
    return bool(selector) and selector.items() <= labels.items()


@pytest.mark.parametrize("overlay", ["base", "changing", "gpu", "milvus"])
@pytest.mark.parametrize("version", ["1.30", "1.32", "1.34"])
def test_manifests_are_valid_under_the_strict_schemas(tmp_path: Path, version: str, overlay: str) -> None:
    rendered = tmp_path / "rendered.yaml"
    command = [tool("kubectl"), "kustomize", str(BASE.parent / overlay)]
    done = subprocess.run(command, capture_output=True, check=True)
    rendered.write_bytes(done.stdout)
    command = [tool("kubernetes-validate"), "--strict", "--kubernetes-version", version, str(rendered)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr


@pytest.mark.parametrize("service", SERVICES)
def test_selectors_of_workload_service_and_budget_match_the_pods(service: str) -> None:
    labels = pod_labels(service)
    assert matches(workload(service)["spec"]["selector"]["matchLabels"], labels)
    assert matches(named("Service", service)["spec"]["selector"], labels)
    assert matches(named("PodDisruptionBudget", service)["spec"]["selector"]["matchLabels"], labels)


def test_no_selector_matches_the_pods_of_the_other_service() -> None:
    for service, other in (SERVICES, SERVICES[::-1]):
        assert not matches(named("Service", service)["spec"]["selector"], pod_labels(other))


@pytest.mark.parametrize("service", SERVICES)
def test_services_are_headless_and_their_ports_are_the_containers(service: str) -> None:
    spec = named("Service", service)["spec"]
    assert spec["clusterIP"] == "None"
    ports = {port["name"]: port["containerPort"] for port in container(service)["ports"]}
    assert {port["targetPort"]: port["port"] for port in spec["ports"]} == ports


def test_the_statefulset_is_governed_by_its_headless_service() -> None:
    assert workload("retriever")["spec"]["serviceName"] == named("Service", "retriever")["metadata"]["name"]


@pytest.mark.parametrize("service", SERVICES)
def test_every_configmap_key_is_a_setting_and_its_value_is_accepted(service: str) -> None:
    settings = loaded_settings(service)
    fields = {f"RAG_{service.upper()}_{name.upper()}" for name in type(settings).model_fields}
    assert set(settings_of(service)) <= fields
    assert not workload(service)["spec"]["template"]["spec"]["enableServiceLinks"]


@pytest.mark.parametrize("service", SERVICES)
def test_the_pod_gets_its_settings_from_the_generated_configmap(service: str) -> None:
    [source] = container(service)["envFrom"]
    expected = named("ConfigMap", f"{service}-settings")["metadata"]["name"]
    assert source == {"configMapRef": {"name": expected}}


@pytest.mark.parametrize("service", SERVICES)
def test_probes_ask_the_grpc_port_for_names_that_the_server_answers(service: str) -> None:
    from rag_serving.health import LIVENESS

    pod = container(service)
    settings = loaded_settings(service)
    ports = {port["name"]: port["containerPort"] for port in pod["ports"]}
    assert ports == {"grpc": settings.grpc_port, "http": settings.http_port}
    names = {
        "startupProbe": LIVENESS,
        "livenessProbe": LIVENESS,
        "readinessProbe": WIRE_NAMES[service],
    }
    for probe, name in names.items():
        assert pod[probe]["grpc"] == {"port": settings.grpc_port, "service": name}


@pytest.mark.parametrize("service", SERVICES)
def test_the_services_listen_where_kubelet_and_clients_can_reach_them(service: str) -> None:
    settings = loaded_settings(service)
    assert (settings.grpc_host, settings.http_host) == ("0.0.0.0", "0.0.0.0")


@pytest.mark.parametrize("service", SERVICES)
def test_kubernetes_waits_longer_than_a_drain_takes(service: str) -> None:
    settings = loaded_settings(service)
    grace_s = workload(service)["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s >= settings.shutdown_delay_s + settings.drain_timeout_s + 10


@pytest.mark.parametrize("service", SERVICES)
def test_a_budget_leaves_room_to_evict_a_pod(service: str) -> None:
    budget = named("PodDisruptionBudget", service)["spec"]["minAvailable"]
    assert budget < workload(service)["spec"]["replicas"]


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_runs_unprivileged_with_its_needs_stated(service: str) -> None:
    pod = workload(service)["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    for one in [*pod["containers"], *pod.get("initContainers", [])]:
        assert one["securityContext"]["readOnlyRootFilesystem"] is True
        assert one["securityContext"]["allowPrivilegeEscalation"] is False
        assert one["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= set(one["resources"]["requests"])
        assert "memory" in one["resources"]["limits"]


@pytest.mark.parametrize("service", SERVICES)
def test_every_mounted_volume_and_claim_exists(service: str) -> None:
    spec = workload(service)["spec"]
    pod = spec["template"]["spec"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    volumes |= {claim["metadata"]["name"] for claim in spec.get("volumeClaimTemplates", [])}
    for one in [*pod["containers"], *pod.get("initContainers", [])]:
        assert {mount["name"] for mount in one["volumeMounts"]} <= volumes
    claims = {claim["metadata"]["name"] for claim in of_kind("PersistentVolumeClaim")}
    asked = {v["persistentVolumeClaim"]["claimName"] for v in pod["volumes"] if "persistentVolumeClaim" in v}
    assert asked <= claims


@pytest.mark.parametrize("service", SERVICES)
def test_folders_of_the_settings_lie_on_mounted_volumes(service: str) -> None:
    mounts = [mount["mountPath"] for mount in container(service)["volumeMounts"]]
    folders = [value for value in settings_of(service).values() if value.startswith("/")]
    assert folders
    assert all(any(folder.startswith(f"{mount}/") for mount in mounts) for folder in folders)


def test_the_generator_asks_the_retrievers_headless_service() -> None:
    port = named("Service", "retriever")["spec"]["ports"][0]["port"]
    assert f"dns:///retriever:{port}" in settings_of("generator").values()


def test_index_is_copied_once_and_never_half(tmp_path: Path) -> None:
    """A pod killed during the copy must start over, not serve what had arrived."""
    [init] = workload("retriever")["spec"]["template"]["spec"]["initContainers"]
    volume, artifacts = tmp_path / "volume", tmp_path / "artifacts"
    script = init["args"][0].replace("/var/lib/ragpair", str(volume)).replace("/artifacts", str(artifacts))
    (artifacts / "index").mkdir(parents=True)
    (artifacts / "index" / "manifest.json").write_text("1")
    (volume / "index.copying").mkdir(parents=True)
    (volume / "index.copying" / "half").write_text("cut short")

    def start() -> None:
        subprocess.run([*init["command"], script], check=True)

    start()
    assert [path.name for path in (volume / "index").iterdir()] == ["manifest.json"]
    (artifacts / "index" / "manifest.json").write_text("2")
    start()
    assert (volume / "index" / "manifest.json").read_text() == "1"


def test_images_are_tagged_with_the_version_of_the_distribution() -> None:
    import tomllib

    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    for service in SERVICES:
        assert container(service)["image"] == f"ragpair-{service}:{version}"


def test_base_has_no_file_that_kustomize_does_not_read() -> None:
    kustomization = yaml.safe_load((BASE / "kustomization.yaml").read_text())
    read = {*kustomization["resources"], "kustomization.yaml"}
    read |= {name for one in kustomization["configMapGenerator"] for name in one["envs"]}
    assert {path.name for path in BASE.iterdir()} == read


def test_milvus_overlay_keeps_nothing_on_disk_and_its_settings_are_the_retrievers() -> None:
    spec = workload("retriever", overlay="milvus")["spec"]
    pod = spec["template"]["spec"]
    assert not spec["volumeClaimTemplates"]
    assert not pod["initContainers"]
    served = container("retriever", overlay="milvus")
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in served["volumeMounts"]} <= volumes
    [source, token] = served["envFrom"]
    config_map = named("ConfigMap", "retriever-settings", overlay="milvus")
    assert source["configMapRef"]["name"] == config_map["metadata"]["name"]
    assert token["secretRef"]["optional"]
    loaded = loaded_settings("retriever", overlay="milvus")
    assert loaded.backend is Backend.MILVUS
    assert settings_of("retriever", overlay="milvus")["RAG_RETRIEVER_MILVUS_URI"] == loaded.milvus_uri
    assert str(loaded.activation_root) in {mount["mountPath"] for mount in served["volumeMounts"]}


@pytest.mark.parametrize("overlay", ["base", "changing", "gpu", "milvus"])
def test_no_retriever_takes_changes_that_the_others_do_not_see(overlay: str) -> None:
    """Two with a copy each took changes from callers that go round them: a search saw them or not, by turns."""
    settings = loaded_settings("retriever", overlay=overlay)
    alone = workload("retriever", overlay=overlay)["spec"]["replicas"] == 1
    assert settings.read_only is (overlay in {"base", "gpu"})
    assert settings.read_only or alone or settings.backend is Backend.MILVUS


def test_node_of_the_only_retriever_can_be_drained() -> None:
    budget = named("PodDisruptionBudget", "retriever", overlay="changing")["spec"]
    assert budget.get("minAvailable") is None
    assert budget["maxUnavailable"] == 1


@pytest.mark.parametrize("service", SERVICES)
def test_gpu_overlay_puts_each_service_on_a_node_with_the_gpus_that_it_asks_for(service: str) -> None:
    pod = workload(service, overlay="gpu")["spec"]["template"]["spec"]
    assert pod["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
    assert pod["tolerations"] == [{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}]
    served, plain = container(service, overlay="gpu"), container(service)
    assert served["resources"]["limits"] == {**plain["resources"]["limits"], "nvidia.com/gpu": 1}
    assert served["resources"]["requests"] == plain["resources"]["requests"]
    images = {one["image"] for one in [*pod["containers"], *pod.get("initContainers", [])]}
    assert images == {f"{plain['image']}-gpu"}


def test_gpu_overlay_says_every_setting_of_the_index_on_gpus() -> None:
    names = {name for name in RetrieverSettings.model_fields if name.startswith("index_")} - {"index_folder"}
    said = settings_of("retriever", overlay="gpu").keys() - settings_of("retriever").keys()
    assert said == {f"RAG_RETRIEVER_{name.upper()}" for name in names}
    loaded = loaded_settings("retriever", overlay="gpu")
    assert loaded.index_devices == "all"
    assert not loaded.memory_map


def test_gpu_overlay_names_the_generators_devices_so_that_it_never_decodes_on_the_cpu_unnoticed() -> None:
    loaded = loaded_settings("generator", overlay="gpu")
    limits = container("generator", overlay="gpu")["resources"]["limits"]
    assert loaded.devices == tuple(f"cuda:{number}" for number in range(limits["nvidia.com/gpu"]))
    assert loaded.dtype == "bfloat16"


def test_update_of_the_generator_on_gpus_waits_for_no_spare_gpu() -> None:
    strategy = workload("generator", overlay="gpu")["spec"]["strategy"]
    assert strategy == {"rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}}


@pytest.mark.parametrize("kept", SERVICES)
def test_either_service_can_be_on_gpus_alone(tmp_path: Path, kept: str) -> None:
    shutil.copytree(BASE.parent, tmp_path / "k8s")
    kustomization = tmp_path / "k8s" / "gpu" / "kustomization.yaml"
    overlay = yaml.safe_load(kustomization.read_text())
    kustomization.write_text(yaml.safe_dump({**overlay, "components": [kept]}))
    command = [tool("kubectl"), "kustomize", str(kustomization.parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    on_gpus = {
        one["metadata"]["name"]
        for one in yaml.safe_load_all(done.stdout)
        if one["kind"] in {"StatefulSet", "Deployment"}
        and "nvidia.com/gpu" in one["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    }
    assert on_gpus == {kept}
