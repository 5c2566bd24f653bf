"""What Kustomize makes of deploy/kubernetes, and what a pod must be to be admitted as restricted."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import yaml

CHECKOUT = Path(__file__).parents[2]
KUBERNETES = CHECKOUT / "deploy/kubernetes"
IMAGE = "outbox-connector"

Manifest = dict[str, Any]

# What a component needs beside base, the example StatefulSet and the sidecar.
_NEEDS = {"autoscaling-lag-sasl": ("autoscaling-lag", "kafka-sasl")}
# What goes instead of the autoscaling that `production` has.
_INSTEAD_OF_CPU = {"autoscaling-lag", "autoscaling-lag-sasl", "static-membership"}
ON_PRODUCTION = "overlays/production and "

# The one in C, where PyYAML has it, reads ten times as fast.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}


@functools.cache
def _kustomize() -> tuple[str, ...] | None:
    if kustomize := shutil.which("kustomize"):
        return (kustomize, "build")
    kubectl = shutil.which("kubectl")
    return (kubectl, "kustomize") if kubectl else None


def render(directory: Path) -> list[Manifest]:
    """Return the resources of a kustomization; the test is skipped where there is no Kustomize."""
    command = _kustomize()
    if command is None:
        pytest.skip("neither kubectl nor kustomize is installed")
    done = subprocess.run([*command, str(directory)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "", "Kustomize warns"
    return [manifest for manifest in yaml.load_all(done.stdout, _LOADER) if manifest]


@functools.cache
def rendered(name: str) -> list[Manifest]:
    """Return the resources of what `names` lists: an overlay, or a component on the example or on `production`."""
    if name.startswith(ON_PRODUCTION):
        return _in_a_copy_of_production(name.removeprefix(ON_PRODUCTION).removeprefix("components/"))
    directory = KUBERNETES / name
    if not name.startswith("components/"):
        return render(directory)
    component = directory.name
    wanted = ["sidecar", *_NEEDS.get(component, ())]
    return compose(dict.fromkeys([*wanted, component]))


def compose(components: Sequence[str] | dict[str, None], **more: Any) -> list[Manifest]:
    """Return the resources of base and the example StatefulSet with these components; `more` is Kustomize's."""
    return kustomize(
        {
            "apiVersion": "kustomize.config.k8s.io/v1beta1",
            "kind": "Kustomization",
            "resources": ["../../base", "../../example-postgres"],
            "components": [f"../../components/{component}" for component in components],
            **more,
        }
    )


def kustomize(kustomization: Manifest) -> list[Manifest]:
    """Return the resources of a kustomization as one of `overlays` would have it."""
    with tempfile.TemporaryDirectory() as temporary:
        root = os.path.relpath(KUBERNETES, Path(temporary).resolve())
        moved = {**kustomization}
        for field in ("resources", "components"):
            moved[field] = [path.replace("../..", root, 1) for path in kustomization.get(field, [])]
        (Path(temporary) / "kustomization.yaml").write_text(yaml.safe_dump(moved), "utf-8")
        return render(Path(temporary))


def _in_a_copy_of_production(component: str) -> list[Manifest]:
    """Put a component where the overlay's comments tell to: before the last one, which gives each pod its account."""
    overlay = yaml.safe_load((KUBERNETES / "overlays/production/kustomization.yaml").read_text("utf-8"))
    *others, last = overlay["components"]
    assert last == "../../components/kafka-sasl"
    if component in _INSTEAD_OF_CPU:
        others.remove("../../components/autoscaling-cpu")
    wanted = [f"../../components/{name}" for name in (*_NEEDS.get(component, ()), component)]
    return kustomize({**overlay, "components": [*dict.fromkeys([*others, *wanted, last])]})


def names() -> list[str]:
    """List everything that is to be rendered."""
    overlays, components = (
        sorted(str(path.relative_to(KUBERNETES)) for path in KUBERNETES.glob(pattern))
        for pattern in ("overlays/*", "components/*")
    )
    return [*overlays, *components, *(f"{ON_PRODUCTION}{component}" for component in components)]


class Pod(NamedTuple):
    """A pod that a resource makes."""

    owner: str
    spec: Manifest
    labels: dict[str, str]

    @property
    def containers(self) -> list[Manifest]:
        """All its containers."""
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]

    @property
    def ours(self) -> list[Manifest]:
        """Those of its containers that run our image."""
        return [container for container in self.containers if _repository(container["image"]).endswith(IMAGE)]

    @property
    def is_ours(self) -> bool:
        """Whether every container runs our image."""
        return len(self.ours) == len(self.containers)


def _repository(image: str) -> str:
    return image.rpartition(":")[0] or image


def pods(manifests: Sequence[Manifest]) -> Iterator[Pod]:
    """Yield the pods that the resources make."""
    for manifest in manifests:
        spec = manifest.get("spec", {})
        if manifest["kind"] == "CronJob":
            spec = spec["jobTemplate"]["spec"]
        if manifest["kind"] in {"Deployment", "StatefulSet", "Job", "CronJob", "DaemonSet"}:
            template = spec["template"]
            owner = f"{manifest['kind']}/{manifest['metadata']['name']}"
            yield Pod(owner, template["spec"], template["metadata"].get("labels", {}))


def one(manifests: Sequence[Manifest], kind: str, prefix: str = "") -> Manifest:
    """Return the one resource of a kind whose name begins so; generated names end in a hash."""
    found = [m for m in manifests if m["kind"] == kind and m["metadata"]["name"].startswith(prefix)]
    assert len(found) == 1, f"{len(found)} resources {kind} {prefix}…"
    return found[0]


def violations(spec: Manifest) -> list[str]:
    """List what the restricted pod security standard refuses in a pod.

    https://kubernetes.io/docs/concepts/security/pod-security-standards/#restricted
    """
    pod = spec.get("securityContext", {})
    found = [name for name in ("hostNetwork", "hostPID", "hostIPC") if spec.get(name)]
    if pod.get("sysctls"):
        found.append("sysctls")
    for volume in spec.get("volumes", []):
        found += [f"volume {volume['name']} is a {kind}" for kind in set(volume) - {"name"} - _VOLUMES]
    for container in [*spec.get("initContainers", []), *spec["containers"]]:
        found += [f"{container['name']}: {what}" for what in _container_violations(container, pod)]
    return found


def _container_violations(container: Manifest, pod: Manifest) -> Iterator[str]:
    own = container.get("securityContext", {})
    capabilities = own.get("capabilities", {})
    effective = {**pod, **own}
    if own.get("privileged"):
        yield "privileged"
    if own.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation"
    if "ALL" not in capabilities.get("drop", []):
        yield "capabilities are not dropped"
    if set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"}:
        yield "capabilities are added"
    if effective.get("runAsNonRoot") is not True:
        yield "runAsNonRoot"
    if effective.get("runAsUser") == 0:
        yield "runs as root"
    if effective.get("seccompProfile", {}).get("type") not in {"RuntimeDefault", "Localhost"}:
        yield "seccompProfile"
    if own.get("procMount", "Default") != "Default":
        yield "procMount"
    if any(port.get("hostPort") for port in container.get("ports", [])):
        yield "hostPort"
