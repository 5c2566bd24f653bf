"""The Kubernetes manifests: they render, fit the schemas, are admitted as restricted, and know the connector."""

from __future__ import annotations

import base64
import copy
import functools
import json
import re
import signal
import subprocess
import sys
import textwrap
import tomllib
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubernetes_validate import SchemaNotFoundError, ValidationError, validate
from packaging.requirements import Requirement

from connector.cli import parser
from connector.settings import _target, load_settings
from tests.deploy.manifests import (
    CHECKOUT,
    IMAGE,
    KUBERNETES,
    Manifest,
    Pod,
    compose,
    names,
    one,
    pods,
    render,
    rendered,
    violations,
)
from tests.security.certificates import Authority

# The newest that the schemas are published for, and one that providers have stopped supporting.
VERSIONS = ("1.37", "1.28")
# Types that operators bring; the cluster test asks a server for those where it has them.
FOREIGN = {"keda.sh/v1alpha1", "monitoring.coreos.com/v1", "kafka.strimzi.io/v1"}
GRACE_BEYOND_SHUTDOWN = 2
A_WEEK = 7 * 24 * 60 * 60
WAITS = "Deployment/outbox-connector-operator"
# What a command needs, and so what is to be in its container's environment.
NEEDS = {"prune": frozenset({"database"})}
BOTH = frozenset({"database", "kafka"})


@functools.cache
def everything() -> dict[str, Manifest]:
    """Return each different resource of everything that can be rendered, by what it is."""
    return {json.dumps(m, sort_keys=True): m for m in chain.from_iterable(map(rendered, names()))}


def all_pods() -> Iterator[Pod]:
    """Yield the pods of everything that can be rendered."""
    return pods(list(everything().values()))


def command(container: Manifest) -> str:
    """Return the command of the connector that a container of ours runs, or an empty text."""
    return container.get("args", [""])[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("name", names())
def test_every_overlay_and_component_renders(name: str) -> None:
    """Kustomize puts each together without a warning, and nothing is in it twice."""
    manifests = rendered(name)
    identities = [(m["apiVersion"], m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(identities)) == len(identities)
    assert not [m for m in manifests if "namespace" in m["metadata"]], "the namespace is for who applies it to choose"


@pytest.mark.parametrize("version", VERSIONS)
def test_every_resource_fits_the_schema(version: str) -> None:
    """Each resource has the fields that Kubernetes has, with the types they have there, and no others."""
    problems = []
    for manifest in everything().values():
        try:
            validate(manifest, version, strict=True)
        except ValidationError as error:
            problems.append(f"{manifest['kind']}/{manifest['metadata']['name']}: {error.message}")
        except SchemaNotFoundError:
            if manifest["apiVersion"] not in FOREIGN:
                problems.append(f"{manifest['kind']}: no such type in {version}")
    assert problems == []


def test_the_schemas_see_a_misspelt_field() -> None:
    """The check of the schemas can fail."""
    deployment = copy.deepcopy(one(rendered("overlays/dev"), "Deployment"))
    deployment["spec"]["template"]["spec"]["terminationGracePeriod"] = 1
    with pytest.raises(ValidationError):
        validate(deployment, VERSIONS[0], strict=True)


def test_every_pod_is_admitted_as_restricted() -> None:
    """The restricted pod security standard refuses nothing."""
    assert {pod.owner: found for pod in all_pods() if (found := violations(pod.spec))} == {}


SPOILED: dict[str, Callable[[Manifest, Manifest], object]] = {
    "hostNetwork": lambda spec, _: spec.update(hostNetwork=True),
    "hostPath": lambda spec, _: spec["volumes"].append({"name": "host", "hostPath": {"path": "/"}}),
    "allowPrivilegeEscalation": lambda _, own: own.pop("allowPrivilegeEscalation"),
    "capabilities are not dropped": lambda _, own: own.pop("capabilities"),
    "capabilities are added": lambda _, own: own["capabilities"].update(add=["SYS_ADMIN"]),
    "runAsNonRoot": lambda spec, _: spec["securityContext"].pop("runAsNonRoot"),
    "runs as root": lambda _, own: own.update(runAsUser=0),
    "seccompProfile": lambda spec, _: spec["securityContext"].pop("seccompProfile"),
    "privileged": lambda _, own: own.update(privileged=True),
}


@pytest.mark.parametrize("what", SPOILED)
def test_the_check_of_the_standard_sees_each_violation(what: str) -> None:
    """A pod that breaks one rule of the standard is found to."""
    spec = copy.deepcopy(next(pods([one(rendered("overlays/dev"), "Deployment")])).spec)
    assert violations(spec) == []
    SPOILED[what](spec, spec["containers"][0]["securityContext"])
    assert [found for found in violations(spec) if what in found]


def test_our_pods_ask_for_no_more_than_they_need() -> None:
    """Our containers write nowhere, get no API token, and no variables for Services; every container has its bounds."""
    for pod in all_pods():
        if pod.is_ours:
            assert pod.spec["automountServiceAccountToken"] is False, pod.owner
            assert pod.spec["enableServiceLinks"] is False, pod.owner
        for container in pod.ours:
            assert container["securityContext"]["readOnlyRootFilesystem"] is True, pod.owner
        for container in pod.containers:
            for bound in ("requests", "limits"):
                assert set(container["resources"][bound]) == {"cpu", "memory"}, f"{pod.owner} {container['name']}"


def test_every_command_exists() -> None:
    """What our containers are started with is a command that the connector has, with its options, or only waits."""
    for pod in all_pods():
        for container in pod.ours:
            assert ("command" in container) == (pod.owner == WAITS)
            if pod.owner != WAITS:
                parser().parse_args(container["args"])


def test_the_pod_for_those_on_call_waits_until_it_is_told_to_end() -> None:
    """What it is started with goes on, and ends at once and in order on SIGTERM."""
    (container,) = next(pods([one(rendered("components/operator"), "Deployment", "outbox-connector-operator")])).ours
    # A container's first process gets no signal that it neither handles nor blocks; here it is blocked from the start.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
    waiting = subprocess.Popen([sys.executable, *container["command"][1:]], stderr=subprocess.PIPE)
    signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        waiting.send_signal(signal.SIGTERM)
        assert (waiting.wait(10), waiting.stderr.read() if waiting.stderr else b"") == (0, b"")
    finally:
        waiting.kill()
        waiting.communicate()


def test_liveness_knows_nothing_of_other_services() -> None:
    """Liveness is /livez and readiness /readyz, on the port of the settings: no outage elsewhere makes a restart."""
    served = [(pod, c) for pod in all_pods() for c in pod.ours if command(c) in {"reader", "sink"}]
    for pod, container in served:
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        for probe in ("startupProbe", "livenessProbe"):
            assert container[probe]["httpGet"]["path"] == "/livez", pod.owner
        for probe in [name for name in container if name.endswith("Probe")]:
            assert ports[container[probe]["httpGet"]["port"]] == load_settings({}, needs=frozenset()).http_port
        if pod.is_ours:
            assert container["readinessProbe"]["httpGet"]["path"] == "/readyz", pod.owner
        else:
            # It would take the database out of its Service while Kafka is away.
            assert "readinessProbe" not in container, pod.owner


def test_the_sidecar_joins_the_pod_and_changes_nothing_else_in_it() -> None:
    """A StatefulSet with the label gets the reader; what was in its pod stays as it was, and so do other pods."""
    plain = {m["metadata"]["name"]: m for m in compose([]) if m["kind"] == "StatefulSet"}
    beside = {m["metadata"]["name"]: m for m in rendered("components/sidecar") if m["kind"] == "StatefulSet"}
    before, after = plain["postgres"]["spec"]["template"], beside["postgres"]["spec"]["template"]
    names_before = [container["name"] for container in before["spec"]["containers"]]
    kept = [container for container in after["spec"]["containers"] if container["name"] in names_before]
    assert kept == before["spec"]["containers"]
    assert {container["name"] for container in after["spec"]["containers"]} == {*names_before, "outbox-reader"}
    for field in set(before["spec"]) - {"containers", "volumes"}:
        assert after["spec"][field] == before["spec"][field]
    kafka = one(rendered("overlays/dev"), "StatefulSet", "kafka")
    assert [container["name"] for container in kafka["spec"]["template"]["spec"]["containers"]] == ["kafka"]


def test_only_pods_whose_names_last_are_static_members() -> None:
    """A sink is told its pod's name where it comes back under it, and nowhere else."""
    for pod in all_pods():
        for container in pod.ours:
            told = [entry for entry in container.get("env", []) if entry["name"] == "CONNECTOR_POD_NAME"]
            assert bool(told) == (command(container) == "sink" and pod.owner.startswith("StatefulSet/")), pod.owner


@pytest.mark.parametrize("name", names())
def test_the_environment_is_what_the_connector_knows(name: str, tmp_path: Path) -> None:
    """Every variable is a setting, every file it names is mounted, and the connector itself accepts the whole."""
    manifests = rendered(name)
    for pod in pods(manifests):
        for number, container in enumerate(pod.ours):
            directory = tmp_path / f"{pod.owner.replace('/', '-')}-{number}"
            environment = _environment(container, pod, manifests, directory)
            assert [variable for variable in environment if _target(variable) is None] == []
            environment.setdefault("CONNECTOR_KAFKA_BOOTSTRAP_SERVERS", "kafka:9092")
            needs = NEEDS.get(command(container), BOTH)
            settings = load_settings(environment, needs=needs)
            if "kafka" in needs and settings.kafka_options:
                _logs_in(settings.kafka_options, pod)
            grace = pod.spec["terminationGracePeriodSeconds"]
            if command(container) in {"reader", "sink"}:
                assert grace > settings.shutdown_seconds + GRACE_BEYOND_SHUTDOWN, pod.owner
            # Beside PostgreSQL it must wait: a pod with an ended container is not ready, and gets no connections.
            assert (settings.start_deadline_seconds > A_WEEK) != pod.is_ours, pod.owner


def _logs_in(options: Mapping[str, str], pod: Pod) -> None:
    """See that a pod has an account of its own, if only one does."""
    component = "reader" if not pod.is_ours else pod.labels["app.kubernetes.io/component"]
    assert options["sasl.username"] == f"outbox-connector-kafka-{component}"
    assert {"sasl.password", "ssl.ca.location"} <= options.keys()


def test_a_port_in_the_configmap_does_not_part_probes_and_processes() -> None:
    """The ConfigMap is for all pods; the port is that of each container's own probes, whatever it says."""
    for pod in all_pods():
        for container in pod.ours:
            if any(name.endswith("Probe") for name in container):
                assert {"name": "CONNECTOR_HTTP_PORT", "value": "8080"} in container["env"], pod.owner


def test_the_port_beside_the_database_can_be_moved_as_the_page_says() -> None:
    """The patch of docs/deploy.md moves the sidecar's port, for its probes and for the monitor too."""
    page = (CHECKOUT / "docs/deploy.md").read_text("utf-8")
    (patches,) = [
        block for block in re.findall(r"```yaml\n(.*?)```", page, re.DOTALL) if "CONNECTOR_HTTP_PORT" in block
    ]
    manifests = compose(["sidecar"], **yaml.safe_load(patches))
    (reader,) = next(pods([one(manifests, "StatefulSet")])).ours
    (port,) = reader["ports"]
    told = [entry["value"] for entry in reader["env"] if entry["name"] == "CONNECTOR_HTTP_PORT"]
    assert (port["name"], told) == ("outbox-http", [str(port["containerPort"])])
    assert port["containerPort"] != load_settings({}, needs=frozenset()).http_port
    assert {reader[probe]["httpGet"]["port"] for probe in reader if probe.endswith("Probe")} == {port["name"]}


def test_by_one_label_all_that_is_ours_is_found_and_nothing_else() -> None:
    """Uninstalling goes by the label `part-of`: every resource has it, but what holds the user's data does not."""
    yours = {"postgres", "kafka"}
    for manifest in everything().values():
        if manifest["kind"] == "Secret":
            continue
        labelled = manifest["metadata"].get("labels", {}).get("app.kubernetes.io/part-of") == "outbox-connector"
        assert labelled == (manifest["metadata"]["name"] not in yours), f"{manifest['kind']} {manifest['metadata']}"


def _environment(container: Manifest, pod: Pod, manifests: list[Manifest], directory: Path) -> dict[str, str]:
    """Return a container's environment with the files of its volumes in `directory`."""
    directory.mkdir()
    environment: dict[str, str] = {}
    for source in container.get("envFrom", []):
        environment |= one(manifests, "ConfigMap", source["configMapRef"]["name"])["data"]
    environment |= {entry["name"]: entry.get("value", "a-name") for entry in container.get("env", [])}
    authority = Authority(directory, "ca").certificate.read_text("utf-8")
    files = dict(_mounted(container, pod, manifests, authority))
    for variable, value in environment.items():
        if variable.endswith(("_FILE", "_LOCATION")):
            path = directory / variable
            path.write_text(files[value], "utf-8")
            environment[variable] = str(path)
    return environment


def _mounted(container: Manifest, pod: Pod, manifests: list[Manifest], authority: str) -> Iterator[tuple[str, str]]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    for name, path in mounts.items():
        volume = volumes[name]
        if "secret" in volume:
            secret = volume["secret"]["secretName"]
            made = [m for m in manifests if m["kind"] == "Secret" and m["metadata"]["name"] == secret]
            # A Secret that the user brings.
            data = made[0]["data"] if made else {"database-url": base64.b64encode(b"postgresql://me:secret@db/app")}
            yield from ((f"{path}/{key}", base64.b64decode(value).decode()) for key, value in data.items())
        for source in volume.get("projected", {}).get("sources", []):
            yield from ((f"{path}/{item['path']}", authority) for item in source["secret"]["items"])


def test_every_secret_is_a_file() -> None:
    """No container of ours has a secret in its environment."""
    for pod in all_pods():
        for container in pod.ours:
            for entry in container.get("env", []):
                assert "secretKeyRef" not in entry.get("valueFrom", {}), pod.owner
            assert not [source for source in container.get("envFrom", []) if "secretRef" in source], pod.owner
    for manifest in everything().values():
        if manifest["kind"] == "ConfigMap":
            assert not [key for key in manifest["data"] if "PASSWORD" in key or "DATABASE_URL" in key]


def test_whatever_selects_pods_selects_some() -> None:
    """Each Service, budget, policy and monitor names labels that pods of ours have."""
    made = compose([*("sidecar", "reader-standalone", "monitoring", "network-policy", "pod-disruption-budget")])
    labels = [pod.labels for pod in pods(made)]
    for manifest in made:
        spec = manifest.get("spec", {})
        selector = spec.get("podSelector", spec.get("selector"))
        if selector is None:
            continue
        expected = selector if manifest["kind"] == "Service" else selector.get("matchLabels", {})
        exist = {expression["key"] for expression in selector.get("matchExpressions", [])}
        assert any(expected.items() <= found.items() and exist <= set(found) for found in labels), manifest["kind"]


def test_what_scales_the_sinks_leaves_their_number_alone() -> None:
    """With an autoscaler the Deployment names no number, which every apply would set back; partitions are the bound."""
    partitions = load_settings({}, needs=frozenset()).topic_partitions
    for name, kind, most in (
        ("autoscaling-cpu", "HorizontalPodAutoscaler", "maxReplicas"),
        ("autoscaling-lag", "ScaledObject", "maxReplicaCount"),
    ):
        manifests = rendered(f"components/{name}")
        assert "replicas" not in one(manifests, "Deployment", "outbox-connector-sink")["spec"]
        assert one(manifests, kind)["spec"][most] == partitions


def test_the_names_of_topics_and_group_are_the_defaults() -> None:
    """What the manifests for other operators name is what the connector uses without being told."""
    settings = load_settings({}, needs=frozenset())
    trigger = one(rendered("components/autoscaling-lag"), "ScaledObject")["spec"]["triggers"][0]["metadata"]
    assert (trigger["topic"], trigger["consumerGroup"]) == (settings.topics[0], settings.group_id)
    topics = [m for m in rendered("components/strimzi") if m["kind"] == "KafkaTopic"]
    assert {m["metadata"]["name"] for m in topics} == {*settings.topics, settings.dead_letter_topic}
    assert {m["spec"]["partitions"] for m in topics} == {settings.topic_partitions}
    sasl = one(rendered("components/kafka-sasl"), "Deployment")["spec"]["template"]["spec"]["containers"][0]["env"]
    users = {m["metadata"]["name"] for m in rendered("components/strimzi") if m["kind"] == "KafkaUser"}
    assert next(entry["value"] for entry in sasl if entry["name"] == "CONNECTOR_KAFKA_SASL_USERNAME") in users


def test_rules_and_dashboard_are_those_of_the_files() -> None:
    """PrometheusRule and ConfigMap say what deploy/observability says; if not, run components/monitoring/generate."""
    manifests = rendered("components/monitoring")
    observability = CHECKOUT / "deploy/observability"
    assert one(manifests, "PrometheusRule")["spec"] == yaml.safe_load((observability / "rules.yaml").read_text("utf-8"))
    dashboard = one(manifests, "ConfigMap", "outbox-connector-dashboard")["data"]["outbox-connector.json"]
    assert dashboard == (observability / "dashboard.json").read_text("utf-8")


def test_the_image_is_this_version() -> None:
    """Every overlay and the Dockerfile name the version that pyproject.toml has."""
    version = _project()["version"]
    for overlay in ("overlays/dev", "overlays/production"):
        for pod in pods(rendered(overlay)):
            assert {container["image"].rpartition(":")[2] for container in pod.ours} <= {version}
    assert f"ARG VERSION={version}\n" in (CHECKOUT / "deploy/docker/Dockerfile").read_text("utf-8")
    assert f"{IMAGE}:{version}" in (CHECKOUT / "deploy/compose.yaml").read_text("utf-8")


def _project() -> Manifest:
    project: dict[str, Any] = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["project"]
    return project


def test_the_locked_dependencies_satisfy_the_project() -> None:
    """What the image installs is what pyproject.toml asks for, each with its hashes: run deploy/docker/lock."""
    project = _project()
    extras = re.findall(r"--extra (\w+)", (CHECKOUT / "deploy/docker/lock").read_text("utf-8"))
    wanted = [*project["dependencies"], *chain.from_iterable(project["optional-dependencies"][e] for e in extras)]
    built_with = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))["build-system"]["requires"]
    for file, requirements in (("requirements.txt", wanted), ("requirements-build.txt", built_with)):
        text = (CHECKOUT / "deploy/docker" / file).read_text("utf-8")
        blocks = re.findall(r"^([\w.-]+)==(\S+)(.*(?:\n .*)*)", text, re.MULTILINE)
        locked = {name: version for name, version, _ in blocks}
        assert all("--hash=sha256:" in rest for _, _, rest in blocks)
        for requirement in map(Requirement, requirements):
            assert requirement.specifier.contains(locked[requirement.name]), f"{file}: {requirement}"


def test_the_kustomizations_of_the_readme_render(tmp_path: Path) -> None:
    """What the README's deploy section has a user write, and the copy of `production` that it makes, can be applied."""
    readme = (CHECKOUT / "README.md").read_text("utf-8")
    written = re.findall(r"my-outbox/kustomization.yaml <<'END'\n(.*?)^ *END$", readme, re.DOTALL | re.MULTILINE)
    (copying,) = re.findall(r"^ *(sed .*my-outbox/kustomization.yaml)$", readme, re.MULTILINE)
    (tmp_path / "deploy").symlink_to(CHECKOUT / "deploy")
    mine = tmp_path / "my-outbox"
    mine.mkdir()
    statefulset = (KUBERNETES / "example-postgres/statefulset.yaml").read_text("utf-8")
    (mine / "postgres.yaml").write_text(statefulset, "utf-8")
    for text in written:
        (mine / "kustomization.yaml").write_text(textwrap.dedent(text), "utf-8")
        _holds_reader_and_sink(render(mine), "registry.example.com/outbox-connector:0.1.0")
    shell = ["bash", "-euc", copying]
    subprocess.run(shell, cwd=tmp_path, check=True)
    _holds_reader_and_sink(render(mine), "outbox-connector:0.1.0")
    assert len(written) == 2


def _holds_reader_and_sink(manifests: list[Manifest], image: str) -> None:
    ours = [container for pod in pods(manifests) for container in pod.ours]
    assert {"reader", "sink", "setup"} <= {command(container) for container in ours}
    assert {container["image"] for container in ours} == {image}
