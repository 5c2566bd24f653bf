"""Kafka's accounts of deploy/kubernetes/components/strimzi: each may do what it is for, on a real broker."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psycopg
import pytest
import yaml
from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    ResourcePatternType,
    ResourceType,
    ScramCredentialInfo,
    ScramMechanism,
    UserScramCredentialUpsertion,
)
from psycopg.types.json import Jsonb

from connector.kafka import Kafka
from tests.integration.scenario import is_streaming
from tests.security.certificates import Authority
from tests.security.services import SCRAM
from tests.services import Database, Process, eventually
from tests.services.kafka import ApacheKafka

USERS = Path(__file__).parents[2] / "deploy/kubernetes/components/strimzi/users.yaml"
PASSWORD = "account-pa55word"  # noqa: S105 - opens nothing but a broker that lives for a minute
PARTITIONS = 6
PROCESSES = ("setup", "reader", "sink", "operator", "console")


@pytest.fixture
def kafka(broker: ApacheKafka) -> ApacheKafka:
    """The broker of this folder."""
    return broker


@pytest.fixture
def topic() -> str:
    """The name of a topic that nobody has made yet; the group is called so too."""
    return f"test-{secrets.token_hex(6)}"


@pytest.fixture
def accounts(
    broker: ApacheKafka, authority: Authority, topic: str, connector_env: dict[str, str]
) -> Iterator[dict[str, dict[str, str]]]:
    """The environment of each process as its account, with the rights of users.yaml for topics and a group of ours."""
    admin = broker.admin()
    users = list(yaml.safe_load_all(USERS.read_text("utf-8")))
    names = {process: f"{topic}-{process}" for process in PROCESSES}
    assert {user["metadata"]["name"] for user in users} == {f"outbox-connector-kafka-{name}" for name in PROCESSES}
    _let_log_in(admin, list(names.values()))
    rights = [
        right
        for user in users
        for acl in user["spec"]["authorization"]["acls"]
        for right in _rights(names[user["metadata"]["name"].rpartition("-")[2]], acl, topic)
    ]
    for made in admin.create_acls(rights).values():
        made.result(20)
    yield {
        process: {
            **connector_env,
            "CONNECTOR_TOPICS": topic,
            "CONNECTOR_DEAD_LETTER_TOPIC": f"{topic}.dead",
            "CONNECTOR_GROUP_ID": topic,
            "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS": broker.servers_of(SCRAM),
            "CONNECTOR_KAFKA_SECURITY_PROTOCOL": "SASL_SSL",
            "CONNECTOR_KAFKA_SSL_CA_LOCATION": str(authority.certificate),
            "CONNECTOR_KAFKA_SASL_MECHANISM": "SCRAM-SHA-512",
            "CONNECTOR_KAFKA_SASL_USERNAME": name,
            "CONNECTOR_KAFKA_SASL_PASSWORD": PASSWORD,
        }
        for process, name in names.items()
    }
    anything = (ResourceType.ANY, None, ResourcePatternType.ANY)
    ours = [
        AclBindingFilter(*anything, f"User:{name}", None, AclOperation.ANY, AclPermissionType.ANY)  # type: ignore[arg-type]
        for name in names.values()
    ]
    for removed in admin.delete_acls(ours).values():
        removed.result(20)
    for deleted in admin.delete_topics([topic, f"{topic}.dead"]).values():
        deleted.result(20)


def _let_log_in(admin: AdminClient, names: list[str]) -> None:
    how = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
    for made in admin.alter_user_scram_credentials(
        [UserScramCredentialUpsertion(name, how, PASSWORD.encode()) for name in names]
    ).values():
        made.result(20)


def _rights(account: str, acl: Mapping[str, Any], topic: str) -> Iterator[AclBinding]:
    """Give a user's rights as Kafka has them, about a topic and a group of the test's."""
    resource = acl["resource"]
    if resource["type"] == "cluster":
        where = (ResourceType.BROKER, "kafka-cluster", ResourcePatternType.LITERAL)
    else:
        name = (
            resource["name"].replace("smartflow.agent.outbox", topic).replace("smartflow-agent-outbox-consumer", topic)
        )
        patterns = {"prefix": ResourcePatternType.PREFIXED, "literal": ResourcePatternType.LITERAL}
        kind = re.sub("([A-Z])", r"_\1", resource["type"]).upper()
        where = (ResourceType[kind], name, patterns[resource["patternType"]])
    for operation in acl["operations"]:
        word = "".join(f"_{letter}" if letter.isupper() else letter for letter in operation).strip("_").upper()
        yield AclBinding(*where, f"User:{account}", "*", AclOperation[word], AclPermissionType.ALLOW)


def ran(*commands: tuple[str, dict[str, str]]) -> list[str]:
    """Run commands beside each other to their ends, and return what each prints."""
    started = [Process(*command.split(), env=env).start() for command, env in commands]
    for process in started:
        assert process.wait() == 0, process.name + process.stdout + process.stderr
    return [process.stdout for process in started]


@pytest.mark.slow
def test_each_account_may_do_what_it_is_for(
    accounts: dict[str, dict[str, str]], topic: str, database: Database, broker: ApacheKafka
) -> None:
    """Setup makes the topics, a message goes through, the doctor finds nothing wrong, and those on call can work."""
    ran(("setup", accounts["setup"]))
    reader, sink = (Process(name, env=accounts[name]).start() for name in ("reader", "sink"))
    is_streaming(reader)
    nonsense = Producer({"bootstrap.servers": broker.bootstrap_servers})
    nonsense.produce(topic, b"no envelope")
    nonsense.flush(20)
    with database.connect() as app:
        store(app, topic)
    eventually(lambda: letters(broker, topic) == 1, within=30, what="the dead letter")

    of_reader, of_sink, *looks = ran(
        ("doctor", accounts["reader"]),
        ("doctor", accounts["sink"]),
        ("status --json", accounts["operator"]),
        ("status --json", accounts["console"]),
        ("reconcile", accounts["operator"]),
        ("redrive --dead-letters --yes", accounts["operator"]),
    )
    assert f"may not see topic {topic}.dead" in of_reader
    assert "account may serve the reader only" in of_reader
    assert "account may serve the sink only" in of_sink
    assert f"for the reader: allow Write on topic {topic}" in of_sink
    assert [json.loads(look)["consumer"]["members"] for look in looks[:2]] == [1, 1]
    eventually(lambda: letters(broker, topic) == 2, within=30, what="the letter, sent back and refused again")
    assert (reader.stop(), sink.stop()) == (0, 0)

    # An account with neither's rights: what is denied to the sink is not made up for by what it may see.
    topics = {name: (ResourceType.TOPIC, name, ResourcePatternType.LITERAL) for name in (topic, f"{topic}.dead")}
    sink_user = f"User:{topic}-sink"
    denied = [(topics[topic], AclOperation.READ), (topics[f"{topic}.dead"], AclOperation.WRITE)]
    denied.append(((ResourceType.GROUP, topic, ResourcePatternType.LITERAL), AclOperation.READ))
    deny = [AclBinding(*where, sink_user, "*", operation, AclPermissionType.DENY) for where, operation in denied]
    admin = broker.admin()
    for made in admin.create_acls(deny).values():
        made.result(20)
    lacking = f"for the sink: allow Read on topic {topic}, Read on group {topic}, Write on topic {topic}.dead"
    eventually(lambda: lacking in run_doctor(accounts["sink"])[1], within=30, what="all that was denied")
    code, said = run_doctor(accounts["sink"])
    assert (code, "may serve neither reader nor sink" in said) == (1, True)


def run_doctor(env: dict[str, str]) -> tuple[int, str]:
    """Return the doctor's exit code, and what it says."""
    doctor = Process("doctor", env=env).start()
    return doctor.wait(), doctor.stdout


def store(app: psycopg.Connection[Any], topic: str) -> None:
    """See one message through."""
    payload = {"user_id": 1, "chat_id": "c", "message_content": "hello", "role": "user"}
    app.execute("select outbox_enqueue('chat_history_persist', %s, 'c', %s)", [topic, Jsonb(payload)])
    eventually(
        lambda: app.execute("select from chat_histories").rowcount == 1, within=60, what="the message in history"
    )


def letters(broker: ApacheKafka, topic: str) -> int:
    """Count the letters in the dead-letter topic."""
    admin = Kafka(broker.bootstrap_servers, {}).admin()
    ranges = admin.log_ranges([(f"{topic}.dead", partition) for partition in range(PARTITIONS)])
    return sum(end - first for first, end in ranges.values())
