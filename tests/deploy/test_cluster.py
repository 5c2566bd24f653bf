"""The `dev` overlay on a real cluster: pods come and go under load, and every message is stored once and in order.

`KUBECONFIG` names the cluster, on which the images must be found; `TEST_CONNECTOR_IMAGE` is the connector's, if not
that of the overlay. One of the tests drains the node that PostgreSQL is on.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from itertools import count

import pytest

from tests.deploy.cluster import PER_BATCH, Load, Namespace, drained, prove, why_no_cluster

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
    pytest.mark.skipif(why_no_cluster() is not None, reason=why_no_cluster() or ""),
]

SINKS = ("--selector", "app.kubernetes.io/name=outbox-connector,app.kubernetes.io/component=sink")
_numbers = count(step=1_000_000)


@pytest.fixture(scope="module")
def namespace() -> Iterator[Namespace]:
    """Give a namespace in which the overlay is ready."""
    with Namespace() as made:
        made.apply()
        yield made


def sink_names(namespace: Namespace) -> list[str]:
    """Return the names of the sinks' pods that are not ending."""
    pods = namespace.objects("pods", *SINKS)
    return [pod["metadata"]["name"] for pod in pods if "deletionTimestamp" not in pod["metadata"]]


def delete_postgres(namespace: Namespace) -> None:
    """Delete the pod of PostgreSQL and the reader."""
    namespace.kubectl("delete", "pod", "postgres-0")


def delete_sinks(namespace: Namespace) -> None:
    """Delete the pods of all sinks at once."""
    namespace.kubectl("delete", "pod", *SINKS)


def delete_broker(namespace: Namespace) -> None:
    """Delete the pod of the only broker."""
    namespace.kubectl("delete", "pod", "kafka-0")


def change_configuration(namespace: Namespace) -> None:
    """Apply the overlay with another setting."""
    before = set(sink_names(namespace))
    namespace.apply(CONNECTOR_LOG_LEVEL="debug")
    assert before.isdisjoint(sink_names(namespace))
    assert json.loads(namespace.kubectl("logs", "deployment/outbox-connector-sink").splitlines()[0])


def scale(namespace: Namespace) -> None:
    """Scale the sinks to three, and back."""
    for replicas in (3, 2):
        namespace.kubectl("scale", "deployment/outbox-connector-sink", f"--replicas={replicas}")
        namespace.kubectl("rollout", "status", "deployment/outbox-connector-sink", "--timeout=300s")
        assert len(sink_names(namespace)) == replicas


def drain(namespace: Namespace) -> None:
    """Drain the node of PostgreSQL, and let it take pods again."""
    with drained(namespace, "postgres-0"):
        pass


def nothing(namespace: Namespace) -> None:
    """Leave everything as it is."""


@pytest.mark.parametrize(
    "disturb", [nothing, delete_postgres, delete_sinks, delete_broker, change_configuration, scale, drain]
)
def test_every_message_is_stored_once_and_in_order(namespace: Namespace, disturb: Callable[[Namespace], None]) -> None:
    """Under load, whatever becomes of the pods: nothing is lost, doubled or reordered, and every end is orderly."""
    with Load(namespace, next(_numbers)) as load:
        load.go_on()
        disturb(namespace)
        namespace.await_ready()
        load.go_on()
    messages = prove(namespace)
    assert messages >= load.batches * PER_BATCH
    # For the record of a run: `pytest -rP` shows it.
    sys.stdout.write(f"{messages} messages; enqueueing failed {load.interruptions} times; ends: {namespace.ends()}\n")
    assert namespace.complaints() == []


def test_the_doctor_finds_nothing_wrong(namespace: Namespace) -> None:
    """What the README has a user run to verify it says that everything is in order."""
    namespace.await_ready()
    assert namespace.in_reader("outbox-connector", "doctor")


def test_the_reader_beside_the_database_is_ready(namespace: Namespace) -> None:
    """The reader in PostgreSQL's pod reaches the database and Kafka."""
    namespace.await_ready()
    page = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8080/readyz').read().decode())"
    assert json.loads(namespace.in_reader("python", "-c", page))["ok"] is True
