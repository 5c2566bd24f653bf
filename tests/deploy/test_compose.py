"""The image and the compose file, where Docker answers: built, brought up, and every container killed in turn."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from urllib.request import urlopen

import pytest

from connector.demo.embedded import free_port
from tests.deploy.manifests import CHECKOUT
from tests.services import eventually
from tests.services.containers import why_no_docker

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(why_no_docker() is not None, reason=f"Docker: {why_no_docker()}"),
]

_LONGEST = 300
_SERVICES = ("postgres", "kafka", "reader", "sink", "prometheus", "grafana")


def docker(*arguments: str, check: bool = True, env: dict[str, str] | None = None) -> str:
    """Run docker and return what it prints."""
    return _run(["docker", *arguments], check=check, env=env)


def _run(command: list[str], *, check: bool = True, env: dict[str, str] | None = None) -> str:
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=CHECKOUT, env={**os.environ, **(env or {})}
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout[-2000:]} {done.stderr[-4000:]}")
    return done.stdout


def _works(*command: str) -> bool:
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


def compose_command() -> list[str] | None:
    """Return Compose v2's command, or else the first Compose's, if there is either."""
    if _works("docker", "compose", "version"):
        return ["docker", "compose"]
    return ["docker-compose"] if shutil.which("docker-compose") else None


@pytest.fixture(scope="module")
def image() -> Iterator[str]:
    """Build the image, with a name of its own."""
    name = f"outbox-connector:test-{secrets.token_hex(4)}"
    docker("build", "--file", "deploy/docker/Dockerfile", "--tag", name, ".")
    yield name
    docker("image", "rm", "--force", name, check=False)


def inspect(what: str) -> dict[str, object]:
    """Return what Docker knows of an image or a container."""
    (found,) = json.loads(docker("inspect", what))
    return dict(found)


def test_the_image_runs_as_nobody_without_a_shell_or_a_writable_root(image: str) -> None:
    """Its user is a number that is not root's, it has labels and a health check, and it starts on a read-only root."""
    config = inspect(image)["Config"]
    assert isinstance(config, dict)
    assert int(config["User"].partition(":")[0]) > 0
    assert {f"org.opencontainers.image.{name}" for name in ("title", "version", "licenses")} <= set(config["Labels"])
    assert config["Healthcheck"]["Test"][0] == "CMD"
    assert config["Entrypoint"] == ["outbox-connector"]
    script = docker("run", "--rm", "--read-only", "--cap-drop=ALL", "--user=12345:12345", image, "setup", "--print-sql")
    assert "outbox_enqueue" in script


def test_the_image_holds_no_installer(image: str) -> None:
    """The environment that the connector runs in has neither pip nor what built it."""
    ours = "[p for p in sys.path if 'outbox' in p]"
    program = f"import sys; from importlib.metadata import distributions as d; print(*[x.name for x in d(path={ours})])"
    installed = docker("run", "--rm", "--entrypoint=python", image, "-c", program).split()
    assert "outbox-connector" in installed
    assert not {"pip", "hatchling", "setuptools"} & set(installed)


def test_a_command_ends_at_once_when_its_container_is_stopped(image: str) -> None:
    """SIGTERM ends also a command that has no work to drain, though it is its container's first process."""
    urls = {"CONNECTOR_DATABASE_URL": "postgresql://192.0.2.1/app", "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": "192.0.2.1:1"}
    options = [f"--env={name}={value}" for name, value in urls.items()]
    container = docker("run", "--detach", *options, image, "setup").strip()
    try:
        eventually(lambda: "connector" in docker("top", container), within=30, what="the start of setup")
        # Python itself takes a moment to the first line of ours.
        eventually(lambda: _handles_sigterm(container), within=30, what="the start of setup")
        docker("stop", "--time=30", container)
        state = inspect(container)["State"]
        assert isinstance(state, dict)
        assert state["ExitCode"] == 128 + 15
    finally:
        docker("rm", "--force", container)


def _handles_sigterm(container: str) -> bool:
    program = "import re; print(int(re.search(r'SigCgt:\\s*(\\w+)', open('/proc/1/status').read())[1], 16) >> 14 & 1)"
    return docker("exec", container, "python", "-c", program).strip() == "1"


class Project:
    """The compose file brought up, with names and ports of its own."""

    def __init__(self, image: str, command: list[str]) -> None:
        self._name = f"outbox{secrets.token_hex(3)}"
        self._command = [*command, "--project-name", self._name, "--file", "deploy/compose.yaml"]
        self.prometheus_port = free_port()
        self._env = {
            "CONNECTOR_IMAGE": image,
            "POSTGRES_PORT": str(free_port()),
            "KAFKA_PORT": str(free_port()),
            "GRAFANA_PORT": str(free_port()),
            "PROMETHEUS_PORT": str(self.prometheus_port),
        }

    def compose(self, *arguments: str, check: bool = True) -> str:
        """Run Compose on the file."""
        return _run([*self._command, *arguments], check=check, env=self._env)

    def container(self, service: str) -> str:
        """Return the id of a service's container."""
        return docker(
            "ps",
            *("--all", "--quiet", f"--filter=label=com.docker.compose.project={self._name}"),
            f"--filter=label=com.docker.compose.service={service}",
        ).strip()

    def state(self, service: str) -> dict[str, object]:
        """Return the state of a service's container."""
        state = inspect(self.container(service))["State"]
        assert isinstance(state, dict)
        return state

    def is_well(self, service: str) -> bool:
        """Tell whether a service runs and, where it has a health check, passes it."""
        state = self.state(service)
        health = state.get("Health") or {"Status": "healthy"}
        assert isinstance(health, dict)
        return state["Running"] is True and health["Status"] == "healthy"

    def sql(self, statement: str) -> str:
        """Run a statement by psql in the database's container."""
        psql = (
            "psql --host=localhost --username=postgres --no-psqlrc --quiet --tuples-only --no-align -v ON_ERROR_STOP=1"
        )
        environment = ("--env", "PGPASSWORD=compose")
        return docker("exec", *environment, self.container("postgres"), *psql.split(), "-c", statement, "app").strip()

    def enqueue(self, number: int) -> bool:
        """Enqueue a message by SQL, as an application would; tell whether the database took it."""
        payload = f'{{"user_id": 1, "chat_id": "chat", "role": "user", "message_content": "message {number}"}}'
        try:
            self.sql(f"select outbox_enqueue('chat_history_persist', 'smartflow.agent.outbox', 'chat', '{payload}')")
        except RuntimeError:
            return False
        return True

    def stored(self) -> list[str]:
        """Return the messages in history, in its order."""
        return self.sql("select message_content from chat_histories order by id").splitlines()


@pytest.fixture(scope="module")
def project(image: str) -> Iterator[Project]:
    """Bring everything up, and take it down with its data."""
    command = compose_command()
    if command is None:
        pytest.skip("neither docker compose nor docker-compose is installed")
    made = Project(image, command)
    # Where an image cannot be had, what only shows the metrics is left out.
    watching = [service for service, image_ in _images(made).items() if _can_have(image_)]
    with ExitStack() as stack:
        stack.callback(made.compose, "down", "--volumes", "--timeout=60")
        made.compose("up", "--detach", "setup", "reader", "sink", *watching)
        yield made


def _images(project: Project) -> dict[str, str]:
    lines = [line.strip() for line in project.compose("config").splitlines()]
    images = [line.removeprefix("image: ") for line in lines if line.startswith("image: ")]
    return {name: image for name in ("prometheus", "grafana") for image in images if f"/{name}" in image}


def _can_have(image: str) -> bool:
    return _works("docker", "image", "inspect", image) or _works("docker", "pull", image)


def test_one_command_brings_a_message_from_sql_to_history(project: Project) -> None:
    """When the command has ended, everything is healthy or about to be, and a message enqueued by SQL is stored."""
    state = project.state("setup")
    assert (state["Running"], state["ExitCode"]) == (False, 0)
    before = len(project.stored())
    assert project.enqueue(before)
    eventually(lambda: len(project.stored()) == before + 1, within=_LONGEST, what="the message in history")
    for service in filter(project.container, _SERVICES):
        eventually(partial(project.is_well, service), within=_LONGEST, what=f"{service} healthy")


def kill(container: str) -> None:
    """End a container's first process with SIGKILL, as a crash would, for Docker to start it again.

    Where it is not on this machine `docker kill` does it, after which Docker does not restart by itself.
    """
    state = inspect(container)["State"]
    assert isinstance(state, dict)
    groups = Path(f"/proc/{state['Pid']}/cgroup")
    if os.geteuid() == 0 and groups.exists() and container in groups.read_text("utf-8"):
        os.kill(state["Pid"], signal.SIGKILL)
    else:
        docker("kill", container)
        docker("start", container)


@pytest.mark.parametrize("service", _SERVICES)
def test_the_pipeline_recovers_when_a_container_is_killed(project: Project, service: str) -> None:
    """A killed container comes back; what is enqueued around it is stored once and in order."""
    if not project.container(service):
        pytest.skip(f"the image of {service} cannot be had")
    before = len(project.stored())
    assert project.enqueue(before)
    started = project.state(service)["StartedAt"]
    kill(project.container(service))
    eventually(lambda: project.state(service)["StartedAt"] != started, within=_LONGEST, what=f"{service} started again")
    eventually(lambda: project.is_well(service), within=_LONGEST, what=f"{service} healthy again")
    eventually(lambda: project.enqueue(before + 1), within=_LONGEST, what="the database")
    expected = [f"message {number}" for number in range(before + 2)]
    eventually(lambda: project.stored() == expected, within=_LONGEST, what="both messages in history")


def test_prometheus_scrapes_reader_and_sink(project: Project) -> None:
    """Prometheus, where its image can be had, sees a leading reader and a sink, and has loaded the rules."""
    if not project.container("prometheus"):
        pytest.skip("the image of Prometheus cannot be had")

    def ask(path: str) -> str:
        with urlopen(f"http://127.0.0.1:{project.prometheus_port}/api/v1/{path}", timeout=5) as answer:
            return str(answer.read().decode())

    def sees(query: str) -> bool:
        return bool(json.loads(ask(f"query?query={query}"))["data"]["result"])

    for query in ("outbox_connector_leader==1", "outbox_connector_consumed_total"):
        eventually(partial(sees, query), within=_LONGEST, what=query, ignoring=(OSError,))
    assert "OutboxNoLeader" in ask("rules")
