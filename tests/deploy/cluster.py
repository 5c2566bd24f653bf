"""A namespace of a real cluster with the `dev` overlay in it, load on it, and what becomes of its pods."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

import yaml

from tests.deploy.manifests import IMAGE, KUBERNETES
from tests.services import eventually

TOPIC = "smartflow.agent.outbox"
CHATS = 20
PER_BATCH = 20
# What a signal to end makes of a Java program.
_JAVA_ON_SIGTERM = 143
_LONGEST_START = 600


def why_no_cluster() -> str | None:
    """Return why there is no cluster to test on, or None."""
    if not os.environ.get("KUBECONFIG"):
        return "KUBECONFIG names no cluster"
    return None if shutil.which("kubectl") else "kubectl is not installed"


@dataclass(slots=True)
class Life:
    """What was seen of one pod: when it was told to end and was gone, and how its containers ended."""

    name: str
    grace: float
    told_at: float | None = None
    gone_at: float | None = None
    codes: dict[str, int] = field(default_factory=dict)
    restarts: dict[str, int] = field(default_factory=dict)


class Namespace:
    """A namespace that admits restricted pods only, removed with everything in it at the end."""

    def __init__(self) -> None:
        self.name = f"outbox-test-{secrets.token_hex(3)}"
        self.lives: dict[str, Life] = {}
        self._watch: subprocess.Popen[str] | None = None
        self._follower: threading.Thread

    def kubectl(self, *arguments: str, text: str | None = None, check: bool = True) -> str:
        """Run kubectl in the namespace and return its output; raises RuntimeError with what it says where it fails."""
        command = ["kubectl", "--namespace", self.name, *arguments]
        done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
        if check and done.returncode:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")
        return done.stdout

    def objects(self, kind: str, *arguments: str) -> list[dict[str, Any]]:
        """Return the objects of a kind."""
        items: list[dict[str, Any]] = json.loads(self.kubectl("get", kind, "--output", "json", *arguments))["items"]
        return items

    def __enter__(self) -> Self:
        self.kubectl("create", "namespace", self.name)
        levels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("enforce", "warn")]
        self.kubectl("label", "namespace", self.name, *levels)
        command = ["kubectl", "--namespace", self.name, "get", "pods", "--watch", "--output-watch-events", "-o", "json"]
        self._watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._follower = threading.Thread(target=self._follow, args=(self._watch.stdout,), daemon=True)
        self._follower.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._watch is not None:
            self._watch.terminate()
            self._watch.wait()
            self._follower.join()
        self.kubectl("delete", "namespace", self.name, "--wait=false")

    # --- what is in it -----------------------------------------------------------------------------------------------

    def apply(self, **configuration: str) -> None:
        """Apply the `dev` overlay as the README tells to, with these settings, and wait until it has rolled out."""
        with tempfile.TemporaryDirectory() as directory:
            kustomization: dict[str, Any] = {
                "apiVersion": "kustomize.config.k8s.io/v1beta1",
                "kind": "Kustomization",
                "resources": [os.path.relpath(KUBERNETES / "overlays/dev", Path(directory).resolve())],
                "configMapGenerator": [
                    {
                        "name": "outbox-connector",
                        "behavior": "merge",
                        "literals": [f"{name}={value}" for name, value in configuration.items()],
                    }
                ],
            }
            if image := os.environ.get("TEST_CONNECTOR_IMAGE"):
                name, _, tag = image.rpartition(":")
                kustomization["images"] = [{"name": IMAGE, "newName": name, "newTag": tag}]
            (Path(directory) / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), "utf-8")
            self.kubectl("delete", "job", "outbox-connector-setup", "--ignore-not-found")
            said = self.kubectl("apply", "--kustomize", directory)
        assert "Warning" not in said
        self.await_ready()

    def await_ready(self) -> None:
        """Wait until everything that was applied runs and is ready."""
        within = f"--timeout={_LONGEST_START}s"
        for workload in ("statefulset/postgres", "statefulset/kafka", "deployment/outbox-connector-sink"):
            self.kubectl("rollout", "status", workload, within)
        self.kubectl("wait", "--for=condition=complete", "job/outbox-connector-setup", within)

    def in_reader(self, *command: str) -> str:
        """Run a command in the reader's container and return its output."""
        return self.kubectl("exec", "postgres-0", "--container", "outbox-reader", "--", *command)

    def sql(self, statement: str) -> list[list[str]]:
        """Run a statement by psql in the database's pod, and return its records as text."""
        psql = (
            "psql --host=localhost --username=postgres --no-psqlrc --quiet --tuples-only --no-align -v ON_ERROR_STOP=1"
        )
        output = self.kubectl(
            *("exec", "--stdin", "postgres-0", "--container", "postgres", "--"),
            *("env", "PGPASSWORD=dev", *psql.split(), "app"),
            text=statement,
        )
        return [line.split("|") for line in output.splitlines()]

    # --- what becomes of its pods ------------------------------------------------------------------------------------

    def _follow(self, watch: IO[str] | None) -> None:
        assert watch is not None
        with watch:
            for line in watch:
                event = json.loads(line)
                self._see(event["type"], event["object"])

    def _see(self, kind: str, pod: Mapping[str, Any]) -> None:
        metadata, status = pod["metadata"], pod.get("status", {})
        grace = pod["spec"]["terminationGracePeriodSeconds"]
        life = self.lives.setdefault(metadata["uid"], Life(metadata["name"], grace))
        if metadata.get("deletionTimestamp") and life.told_at is None:
            life.told_at = time.monotonic()
        if kind == "DELETED":
            life.gone_at = time.monotonic()
        for container in status.get("containerStatuses", []):
            life.restarts[container["name"]] = container["restartCount"]
            for state in (container.get("lastState", {}), container["state"]):
                if "terminated" in state:
                    life.codes[container["name"]] = state["terminated"]["exitCode"]

    def ends(self) -> dict[str, list[float]]:
        """Return how many seconds pods took to end, by their names."""
        found: dict[str, list[float]] = {}
        for life in list(self.lives.values()):
            if life.told_at and life.gone_at:
                found.setdefault(life.name, []).append(round(life.gone_at - life.told_at, 1))
        return found

    def complaints(self) -> list[str]:
        """List the pods that did not end in time and by themselves, and every restart, whoever caused it."""
        found = []
        for life in list(self.lives.values()):
            if life.told_at and life.gone_at and life.gone_at - life.told_at > life.grace:
                found.append(f"{life.name} took {life.gone_at - life.told_at:.0f} s to end; it has {life.grace} s")
            allowed = {0, _JAVA_ON_SIGTERM} if life.name.startswith("kafka") else {0}
            found += [
                f"{life.name} {name} ended with {code}" for name, code in life.codes.items() if code not in allowed
            ]
            found += [f"{life.name} {name} restarted {count} times" for name, count in life.restarts.items() if count]
        for event in self.objects("events"):
            if event["reason"] == "Killing" and "probe" in event["message"]:
                found.append(f"{event['involvedObject']['name']}: {event['message']}")
        return found


class Load:
    """Messages enqueued by SQL, batch after batch, each exactly once, whatever becomes of the database meanwhile."""

    def __init__(self, namespace: Namespace, first: int) -> None:
        self._namespace = namespace
        self._first = first
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self.batches = 0
        self.interruptions = 0

    def _run(self) -> None:
        while not self._stop.is_set():
            low = self._first + self.batches * PER_BATCH
            try:
                self._namespace.sql(_enqueue(low, low + PER_BATCH - 1))
            except RuntimeError:
                self.interruptions += 1
                self._stop.wait(0.3)
            else:
                self.batches += 1

    def go_on(self, batches: int = 3) -> None:
        """Wait until so many more batches are enqueued."""
        wanted = self.batches + batches
        eventually(lambda: self.batches >= wanted, within=_LONGEST_START, what="the load to go on")

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        # The last batch may have been interrupted; whether it is in is for the database to say.


def _enqueue(low: int, high: int) -> str:
    chat = f"'chat-' || n % {CHATS}"
    payload = f"jsonb_build_object('user_id', n, 'chat_id', {chat}, 'role', 'user', 'message_content', 'message ' || n)"
    # A batch whose answer was lost is in already.
    return (
        f"select count(outbox_enqueue('chat_history_persist', '{TOPIC}', {chat}, {payload}))"
        f" from generate_series({low}, {high}) as n"
        f" where not exists (select from agent_outbox_messages where payload->>'message_content' = 'message {low}')"
    )


def prove(namespace: Namespace) -> int:
    """Wait until every message is consumed, hold history to the outbox row by row, and return how many there are."""
    eventually(
        lambda: namespace.sql("select count(*) from agent_outbox_messages where status <> 'consumed'") == [["0"]],
        within=180,
        what="every message to be consumed",
        ignoring=(RuntimeError,),
    )
    (found,) = namespace.sql(
        "select count(*), count(h.outbox_id), count(distinct h.outbox_id),"
        " count(*) filter (where h.message_content is distinct from o.payload->>'message_content'"
        "                  or h.chat_id is distinct from o.message_key),"
        " (select count(*) from chat_histories),"
        " (select count(*) from (select outbox_id < lag(outbox_id) over (partition by chat_id order by id) as early"
        "                          from chat_histories) as pairs where early)"
        " from agent_outbox_messages o left join chat_histories h on h.outbox_id = o.id"
    )
    messages = int(found[0])
    stored = [str(messages)] * 2
    assert found[1:3] == stored, f"lost or doubled: {found}"
    assert found[3:] == ["0", str(messages), "0"], f"altered, too many, or out of order: {found}"
    return messages


@contextmanager
def drained(namespace: Namespace, pod: str) -> Iterator[None]:
    """Drain the node that a pod is on, and let it take pods again at the end."""
    (found,) = [p for p in namespace.objects("pods") if p["metadata"]["name"] == pod]
    node = found["spec"]["nodeName"]
    try:
        namespace.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--force", "--timeout=300s")
        yield
    finally:
        namespace.kubectl("uncordon", node)
