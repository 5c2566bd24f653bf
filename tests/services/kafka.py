"""Kafka for the tests: named by the environment, in Docker, Apache Kafka from Maven, or the embedded broker."""

from __future__ import annotations

import functools
import os
import re
import resource
import secrets
import shutil
import signal
import subprocess
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ClassVar

import pytest
from confluent_kafka import Consumer, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from connector.demo.embedded import QUICK_GROUP, EmbeddedBroker, broker_answers, free_port, spawn
from tests.services.choice import Candidate
from tests.services.containers import Container, docker_host, why_no_docker
from tests.services.eventually import eventually
from tests.services.maven import fetched
from tests.services.proxy import TcpProxy

APACHE_KAFKA = "4.3.1"
SLF4J = "org.slf4j:slf4j-simple:1.7.36"
IMAGE = "apache/kafka:4.1.0"
# Many brokers, each for a short while: what a JVM does to be fast later would be most of what they do.
_SHORT_LIVED = ("-Xmx1g", "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC")
# One that is measured with: left to itself a JVM has so little room for new objects that it stops for 10 to 20 ms each
# second or two, and the slowest hundredth of the messages would tell of nothing else.
_LONG_LIVED_HEAP = ("-Xmx1g", "-Xms1g", "-Xmn640m")
_LONG_LIVED_COLLECTOR = "-XX:+UseParallelGC"
EMBEDDED_IS_FORGETFUL = "the embedded broker keeps nothing on disk; needs Apache Kafka"
EMBEDDED_IS_INCOMPLETE = (
    "the embedded broker refuses no topic and no size, and knows groups and logs in outline only; needs Apache Kafka"
)


class Kafka:
    """A Kafka cluster; this base class is one that somebody else runs."""

    kind = "external"
    durable = True
    complete = True
    """Whether it refuses topics that nobody made and messages beyond their topic's limit, and answers as Kafka does."""
    # Short, so that a group is quick to notice that a consumer was killed.
    consumer_options: ClassVar[Mapping[str, str]] = {"session.timeout.ms": "6000", "heartbeat.interval.ms": "1000"}

    def __init__(self, bootstrap_servers: str) -> None:
        self._bootstrap_servers = bootstrap_servers

    @property
    def bootstrap_servers(self) -> str:
        """Where clients find it, the same over restarts."""
        return self._bootstrap_servers

    def start(self) -> None:
        """Start the broker and wait until it answers; nothing if it runs."""
        eventually(lambda: broker_answers(self.bootstrap_servers), within=60, what=f"{self.kind} Kafka's answer")

    def stop(self) -> None:
        """Stop the broker; nothing if it is down, or somebody else's."""

    def kill(self) -> None:
        """End the broker as a crash would; nothing if it is down."""
        self.stop()

    def restart(self) -> None:
        """Stop it, then start it on the same port, with the same data if it is durable."""
        self.stop()
        self.start()

    def close(self) -> None:
        """Stop it for good."""
        self.kill()

    def lend(self, to: int) -> dict[str, Any] | None:
        """Return what the process of this test run with that number makes a `LentKafka` of, if it is to have no own."""
        del to
        return None

    def proxy(self) -> TcpProxy:
        """Return a proxy through which clients find a broker that names the proxy, not itself, as its address.

        Clients that use `bootstrap_servers` go past it. The test is skipped if the broker's addresses are not ours.
        """
        pytest.skip(f"the {self.kind} Kafka names no proxy as its address; needs Apache Kafka as a child process")

    def limit_producers(self, bytes_a_second: int | None) -> None:
        """Give every producer a quota, or none; the test is skipped where that needs a tool that we have not."""
        del bytes_a_second
        pytest.skip(f"quotas of the {self.kind} Kafka are not ours to change; needs Apache Kafka as a child process")

    def second_broker(self) -> Kafka:
        """Start another broker of the same cluster; the test is skipped where we cannot."""
        pytest.skip(f"the {self.kind} Kafka gets no second broker; needs Apache Kafka as a child process")

    def refuse_to_grow(self) -> None:
        """Let the broker's disk take nothing more until it starts again; the test is skipped where we cannot."""
        pytest.skip(f"the disk of the {self.kind} Kafka is not ours; needs Apache Kafka as a child process, on Linux")

    def admin(self) -> AdminClient:
        """Return a new client for topics, groups and offsets."""
        return AdminClient({"bootstrap.servers": self.bootstrap_servers, "log_level": 0})

    @contextmanager
    def topic(
        self, partitions: int = 6, config: Mapping[str, str] | None = None, replication: int = 1
    ) -> Iterator[str]:
        """Give a fresh topic's name, and delete it afterwards with those whose names go on from it."""
        name = f"test-{secrets.token_hex(6)}"
        admin = self.admin()
        new = NewTopic(name, partitions, replication, config=dict(config or {}))
        for created in admin.create_topics([new]).values():
            created.result(20)
        eventually(
            lambda: _is_led(admin, name, partitions), within=20, what=f"topic {name}", ignoring=(KafkaException,)
        )
        try:
            yield name
        finally:
            with suppress(KafkaException):
                # Kept until the end: a client that is thrown away takes its answers with it.
                admin = self.admin()
                topics = [topic for topic in admin.list_topics(timeout=5).topics if topic.startswith(name)]
                for deleted in (admin.delete_topics(topics) if topics else {}).values():
                    deleted.result(20)


class LentKafka(Kafka):
    """One that another process of this test run has started, and will stop."""

    def __init__(self, kind: str, bootstrap_servers: str, ports: tuple[int, int] | None = None) -> None:
        """Take the ports of a proxy: where the broker is behind it, and where clients look for it."""
        super().__init__(bootstrap_servers)
        self.kind = kind
        self._ports = ports

    def proxy(self) -> TcpProxy:
        if self._ports is None:
            return super().proxy()
        behind, before = self._ports
        return TcpProxy("127.0.0.1", behind, before)


class EmbeddedKafka(Kafka):
    """The memory-only broker of the wheel."""

    kind = "embedded"
    durable = False
    complete = False
    consumer_options = QUICK_GROUP

    def __init__(self, directory: Path) -> None:
        self._broker = EmbeddedBroker(directory)

    @property
    def bootstrap_servers(self) -> str:
        return self._broker.bootstrap_servers

    def start(self) -> None:
        self._broker.start()

    def stop(self) -> None:
        self._broker.stop()


class ApacheKafka(Kafka):
    """Apache Kafka as a child process: one node that is broker and controller."""

    kind = "apache"

    def __init__(
        self,
        directory: Path,
        *,
        listeners: Mapping[str, str] | None = None,
        settings: Mapping[str, str] | None = None,
        users: Mapping[str, str] | None = None,
        joining: ApacheKafka | None = None,
        long_lived: bool = False,
        borrowers: int = 1,
    ) -> None:
        """Prepare; `listeners` are more of them, each with its security protocol, and `users` may log in by SCRAM.

        A broker that is `joining` another becomes the second one of its cluster. One that is `long_lived` works up to
        its full speed, and seldom stops to collect garbage. Each of its `borrowers` may have a proxy at a time.
        """
        self._jvm_options = (*_LONG_LIVED_HEAP, _LONG_LIVED_COLLECTOR) if long_lived else _SHORT_LIVED
        self._joining = joining
        self._cluster: str = joining._cluster if joining else uuid.uuid4().hex[:22]
        self._more_listeners = dict(listeners or {})
        self._more_settings = dict(settings or {})
        self._users = dict(users or {})
        self._more_ports = {name: free_port() for name in self._more_listeners}
        self._directory = directory
        self._port = free_port()
        self._controller_port = free_port()
        self._proxies = [(free_port(), free_port()) for _ in range(borrowers)]
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def bootstrap_servers(self) -> str:
        return f"127.0.0.1:{self._port}"

    def servers_of(self, listener: str) -> str:
        """Return where clients find a listener that was asked for, by the host's name."""
        return f"localhost:{self._more_ports[listener]}"

    def lend(self, to: int) -> dict[str, Any] | None:
        ports = self._proxies[to % len(self._proxies)]
        return {"kind": self.kind, "bootstrap_servers": self.bootstrap_servers, "ports": ports}

    def proxy(self) -> TcpProxy:
        behind, before = self._proxies[0]
        return TcpProxy("127.0.0.1", behind, before)

    def limit_producers(self, bytes_a_second: int | None) -> None:
        quota = "producer_byte_rate"
        change = ["--delete-config", quota] if bytes_a_second is None else ["--add-config", f"{quota}={bytes_a_second}"]
        where = ["--bootstrap-server", self.bootstrap_servers, "--entity-type", "clients", "--entity-default"]
        self._run_tool("kafka.admin.ConfigCommand", *where, "--alter", *change)

    def second_broker(self) -> Kafka:
        # Made before there is a choice of brokers, so that groups keep their offsets here.
        Consumer({"bootstrap.servers": self.bootstrap_servers, "group.id": "first"}).committed(
            [TopicPartition("none", 0)], timeout=20
        )
        name = f"{self._directory.name}-second-{secrets.token_hex(4)}"
        broker = ApacheKafka(self._directory.with_name(name), joining=self)
        broker.start()
        eventually(lambda: len(self.admin().list_topics(timeout=5).brokers) == 2, within=30, what="two brokers")
        return broker

    def refuse_to_grow(self) -> None:
        if self._process is None or not hasattr(resource, "prlimit"):
            super().refuse_to_grow()
            return
        _, hard = resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE)
        resource.prlimit(self._process.pid, resource.RLIMIT_FSIZE, (1, hard))

    def start(self) -> None:
        if self._process is not None and self._process.poll() is None:
            return
        properties = self._directory / "server.properties"
        if not properties.exists():
            self._format(properties)
        self._process = self._java("kafka.Kafka", str(properties))
        eventually(self._answers, within=60, what="Apache Kafka's answer")

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def _end(self, how: signal.Signals) -> None:
        if self._process is None:
            return
        self._process.send_signal(how)
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    def _answers(self) -> bool:
        if self._process is not None and self._process.poll() is not None:
            log = (self._directory / "kafka.log").read_text(encoding="utf-8", errors="replace")
            raise RuntimeError(f"Apache Kafka ended with code {self._process.returncode}:\n{log[-2000:]}")
        return broker_answers(self.bootstrap_servers)

    def _format(self, properties: Path) -> None:
        self._directory.mkdir(parents=True, exist_ok=True)
        settings = _broker_settings(
            listeners=f"PLAINTEXT://127.0.0.1:{self._port},CONTROLLER://127.0.0.1:{self._controller_port}",
            advertised=f"PLAINTEXT://{self.bootstrap_servers}",
            controller=f"127.0.0.1:{self._controller_port}",
        )
        settings["log.dirs"] = str(self._directory / "data")
        if self._joining is not None:
            settings |= {
                "process.roles": "broker",
                "node.id": "2",
                "controller.quorum.voters": f"1@127.0.0.1:{self._joining._controller_port}",
            }
            settings["listeners"] = settings["listeners"].replace(
                f",CONTROLLER://127.0.0.1:{self._controller_port}", ""
            )
        for number, (behind, before) in enumerate(self._proxies):
            settings["listeners"] += f",PROXIED{number}://127.0.0.1:{behind}"
            settings["advertised.listeners"] += f",PROXIED{number}://127.0.0.1:{before}"
            settings["listener.security.protocol.map"] += f",PROXIED{number}:PLAINTEXT"
        for name, protocol in self._more_listeners.items():
            settings["listeners"] += f",{name}://127.0.0.1:{self._more_ports[name]}"
            settings["advertised.listeners"] += f",{name}://{self.servers_of(name)}"
            settings["listener.security.protocol.map"] += f",{name}:{protocol}"
        settings |= self._more_settings
        draft = properties.with_suffix(".draft")
        draft.write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
        scram = [
            argument
            for name, password in self._users.items()
            for argument in ("--add-scram", f"SCRAM-SHA-512=[name={name},password={password}]")
        ]
        self._run_tool("kafka.tools.StorageTool", "format", "-t", self._cluster, "-c", str(draft), *scram)
        draft.rename(properties)

    def _run_tool(self, *command: str) -> None:
        tool = self._java(*command)
        try:
            code = tool.wait(60)
        finally:
            tool.kill()
            tool.wait()
        if code != 0:
            raise RuntimeError(f"{command[0]} failed: {(self._directory / 'kafka.log').read_text()[-2000:]}")

    def _java(self, *command: str) -> subprocess.Popen[bytes]:
        java = shutil.which("java") or "java"
        options = [*self._jvm_options, "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
        with (self._directory / "kafka.log").open("ab") as log:
            return spawn(
                [java, *options, "-cp", f"{apache_kafka_libraries()}/*", *command],
                stdout=log.fileno(),
                env={name: os.environ[name] for name in ("PATH", "JAVA_HOME") if name in os.environ},
                cwd=self._directory,
            )


class ContainerKafka(Kafka):
    """Apache Kafka in a container, which lives until the end of the test run."""

    kind = "docker"

    def __init__(self, *, long_lived: bool = False) -> None:
        """Prepare; `long_lived` is as for `ApacheKafka`."""
        port = free_port()
        settings = _broker_settings(
            listeners="PLAINTEXT://:9092,CONTROLLER://:9093",
            advertised=f"PLAINTEXT://{docker_host()}:{port}",
            controller="localhost:9093",
        )
        env = {f"KAFKA_{name.upper().replace('.', '_')}": value for name, value in settings.items()}
        if long_lived:
            # By itself its start script would choose another collector, and a JVM that is given two refuses to start.
            env |= {"KAFKA_HEAP_OPTS": " ".join(_LONG_LIVED_HEAP), "KAFKA_JVM_PERFORMANCE_OPTS": _LONG_LIVED_COLLECTOR}
        self._container = Container(IMAGE, inner_port=9092, port=port, env=env)

    @property
    def bootstrap_servers(self) -> str:
        return f"{docker_host()}:{self._container.port}"

    def lend(self, to: int) -> dict[str, Any] | None:
        del to
        return {"kind": self.kind, "bootstrap_servers": self.bootstrap_servers}

    def start(self) -> None:
        self._container.start()
        super().start()

    def stop(self) -> None:
        self._container.signal("SIGTERM")

    def kill(self) -> None:
        self._container.signal("SIGKILL")

    def close(self) -> None:
        self._container.remove()


def kafka_candidates(
    environ: Mapping[str, str], *, long_lived: bool = False, borrowers: int = 1
) -> list[Candidate[Kafka]]:
    """Return the ways to have a Kafka, best first, that is `long_lived` or not, for so many `borrowers` at a time.

    `TEST_KAFKA_BOOTSTRAP_SERVERS` names a running one; `TEST_KAFKA=apache` refuses the embedded broker,
    `TEST_KAFKA=embedded` refuses all others.
    """
    wanted = environ.get("TEST_KAFKA")
    if wanted not in (None, "apache", "embedded"):
        raise pytest.UsageError(f"TEST_KAFKA is apache or embedded, not {wanted!r}")
    candidates: list[Candidate[Kafka]] = []
    if servers := environ.get("TEST_KAFKA_BOOTSTRAP_SERVERS"):
        reason = "TEST_KAFKA_BOOTSTRAP_SERVERS"
        candidates.append(Candidate("the running cluster", reason, lambda _: Kafka(servers), external=True))
    reason = f"TEST_KAFKA={wanted}" if wanted else "the first that can be had"
    if wanted != "embedded":
        problem = why_no_docker()
        in_docker = None if problem else functools.partial(_in_container, long_lived=long_lived)
        candidates.append(Candidate(f"{IMAGE} in Docker", problem or reason, in_docker))
        problem = _why_no_apache_kafka()
        apache = None if problem else functools.partial(ApacheKafka, long_lived=long_lived, borrowers=borrowers)
        candidates.append(Candidate(f"Apache Kafka {APACHE_KAFKA}", problem or reason, apache))
    if wanted != "apache":
        candidates.append(Candidate("the embedded broker", reason, EmbeddedKafka))
    return candidates


def _in_container(_: Path, *, long_lived: bool) -> Kafka:
    return ContainerKafka(long_lived=long_lived)


def _is_led(admin: AdminClient, topic: str, partitions: int) -> bool:
    """Tell whether each partition's leader knows that it is one, which is a moment after the metadata say so."""
    if len(admin.list_topics(topic, timeout=5).topics[topic].partitions) != partitions:
        return False
    latest = OffsetSpec.latest()  # type: ignore[no-untyped-call]
    ends = admin.list_offsets({TopicPartition(topic, number): latest for number in range(partitions)})
    return all(end.result().offset >= 0 for end in ends.values())


def _broker_settings(*, listeners: str, advertised: str, controller: str) -> dict[str, str]:
    return {
        "process.roles": "broker,controller",
        "node.id": "1",
        "controller.quorum.voters": f"1@{controller}",
        "controller.listener.names": "CONTROLLER",
        "listeners": listeners,
        "advertised.listeners": advertised,
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "inter.broker.listener.name": "PLAINTEXT",
        "auto.create.topics.enable": "false",
        # So that a test can forbid something.
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "true",
        # A broker that was killed is let in again only when its last session has expired.
        "broker.heartbeat.interval.ms": "500",
        "broker.session.timeout.ms": "4000",
        "group.initial.rebalance.delay.ms": "0",
        "offsets.topic.num.partitions": "1",
        "offsets.topic.replication.factor": "1",
        "transaction.state.log.min.isr": "1",
        "transaction.state.log.num.partitions": "1",
        "transaction.state.log.replication.factor": "1",
    }


def _why_no_apache_kafka() -> str | None:
    java = shutil.which("java")
    if java is None or shutil.which("mvn") is None:
        return "needs java and mvn"
    answer = subprocess.run([java, "-version"], capture_output=True, text=True, timeout=30, check=False).stderr
    version = re.search(r'version "(\d+)', answer)
    return None if version and int(version[1]) >= 17 else "needs Java 17"


@functools.cache
def apache_kafka_libraries() -> Path:
    """Return the folder of Apache Kafka's jars.

    Raises RuntimeError, with what Maven said, if they cannot be had.
    """
    return fetched("kafka", APACHE_KAFKA, [f"org.apache.kafka:kafka_2.13:{APACHE_KAFKA}", SLF4J])
