"""Services in Docker, through testcontainers, on a host port that stays the same over restarts."""

from __future__ import annotations

import functools
import shutil
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer


@functools.cache
def why_no_docker() -> str | None:
    """Return why Docker cannot be used, or None if it answers."""
    docker = shutil.which("docker")
    if docker is None:
        return "not installed"
    command = [docker, "info", "--format", "{{.ServerVersion}}"]
    try:
        answer = subprocess.run(command, capture_output=True, timeout=3, check=False)
    except subprocess.TimeoutExpired:
        return "does not answer within 3 s"
    return None if answer.returncode == 0 and answer.stdout.strip() else "does not answer"


@functools.cache
def docker_host() -> str:
    """Return the address under which containers publish their ports."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from testcontainers.core.docker_client import DockerClient  # noqa: PLC0415 (slow, and only with Docker)

        return DockerClient().host()


class Container:
    """One container with one published port."""

    def __init__(
        self, image: str, *, inner_port: int, port: int, env: Mapping[str, str], command: Sequence[str] = ()
    ) -> None:
        self.port = port
        self._image = image
        self._inner_port = inner_port
        self._env = env
        self._command = command
        self._container: DockerContainer | None = None

    def start(self) -> None:
        """Create the container, or start it again with the data it has."""
        if self._container is not None:
            self._container.get_wrapped_container().start()
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from testcontainers.core.config import testcontainers_config  # noqa: PLC0415 (slow, and only with Docker)
            from testcontainers.core.container import DockerContainer  # noqa: PLC0415

            if not _can_have(testcontainers_config.ryuk_image):
                testcontainers_config.ryuk_disabled = True
            container = DockerContainer(self._image).with_bind_ports(self._inner_port, self.port)
            for name, value in self._env.items():
                container = container.with_env(name, value)
            if self._command:
                container = container.with_command(list(self._command))
            self._container = container.start()

    def signal(self, name: str) -> None:
        """Send a signal to its main process and wait until the container has ended; nothing if it is down."""
        if self._container is not None:
            wrapped = self._container.get_wrapped_container()
            wrapped.reload()
            if wrapped.status == "running":
                wrapped.kill(signal=name)
                wrapped.wait(timeout=30)

    def remove(self) -> None:
        """Remove it with its data."""
        if self._container is not None:
            self._container.stop()
            self._container = None


@functools.cache
def _can_have(image: str) -> bool:
    """Tell whether an image is here or can be pulled."""
    docker = shutil.which("docker") or "docker"
    commands = [[docker, "image", "inspect", image], [docker, "pull", "--quiet", image]]
    return any(subprocess.run(c, capture_output=True, check=False, timeout=120).returncode == 0 for c in commands)
