"""A PostgreSQL and a Kafka that let nobody in without encryption."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest

from connector.demo.embedded import EmbeddedPostgres
from tests.security.certificates import Authority
from tests.services import eventually
from tests.services.kafka import ApacheKafka, _why_no_apache_kafka

HOST: Final = "localhost"


def _encrypting_programs() -> Path:
    installed = sorted(Path("/usr/lib/postgresql").glob("[0-9]*/bin"), key=lambda path: int(path.parent.name))
    if not installed:
        pytest.skip("needs an installed PostgreSQL in /usr/lib/postgresql: that of the wheel is built without TLS")
    return installed[-1]


class SecurePostgres:
    """A server that takes encrypted connections only, by password or, for `admin`, by certificate."""

    def __init__(self, directory: Path, authority: Authority) -> None:
        self._server = EmbeddedPostgres(directory, bin_dir=_encrypting_programs())
        self._server.start()
        issued = authority.issue("postgres-server", HOST)
        data = directory / "data"
        owner = data.stat()
        for source, name in (
            (issued.certificate, "server.crt"),
            (issued.key, "server.key"),
            (authority.certificate, "ca.crt"),
        ):
            shutil.copy(source, data / name)
            shutil.chown(data / name, owner.st_uid, owner.st_gid)
            (data / name).chmod(0o600)
        with psycopg.connect(self._server.url, autocommit=True) as connection:
            connection.execute("create role admin superuser login")
            for name, value in {
                "ssl": "on",
                "ssl_ca_file": "ca.crt",
                "ssl_cert_file": "server.crt",
                "ssl_key_file": "server.key",
                "password_encryption": "scram-sha-256",
            }.items():
                connection.execute(f"alter system set {name} = '{value}'")
            self._let_in_by_encryption(data / "pg_hba.conf")
            connection.execute("select pg_reload_conf()")
        eventually(self._encrypts, what="a server that encrypts", ignoring=(psycopg.OperationalError,))

    def _let_in_by_encryption(self, path: Path) -> None:
        path.write_text(
            # For those who look at things, and stop the server.
            "host all postgres 127.0.0.1/32 trust\n"
            "hostssl all admin all cert clientcert=verify-full\n"
            "hostssl all all all scram-sha-256\n"
            "hostssl replication all all scram-sha-256\n",
            encoding="utf-8",
        )

    def _encrypts(self) -> bool:
        with self.connect(sslmode="require") as connection:
            return connection.execute("select from pg_hba_file_rules where type = 'hostssl'").fetchone() is not None

    @property
    def port(self) -> int:
        """The port on localhost."""
        return self._server.port

    def connect(self, **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """Return a superuser's connection in autocommit mode, to look at things."""
        return psycopg.connect(self._server.url, **{"autocommit": True, **options})

    def close(self) -> None:
        """Stop it."""
        self._server.stop("immediate")


MTLS: Final = "MTLS"
SCRAM: Final = "SCRAM"
OAUTH: Final = "OAUTH"
USER: Final = "connector"


def secure_kafka(directory: Path, authority: Authority, password: str) -> ApacheKafka:
    """Return a broker, not started yet, with a listener for each way to log in; `USER` has the password."""
    if problem := _why_no_apache_kafka():
        pytest.skip(f"Apache Kafka {problem}")
    directory.mkdir(parents=True, exist_ok=True)
    issued = authority.issue("kafka-broker", HOST)
    keystore = directory / "broker.pem"
    keystore.write_bytes(issued.key.read_bytes() + issued.certificate.read_bytes())
    login = "org.apache.kafka.common.security"
    return ApacheKafka(
        directory,
        listeners={MTLS: "SSL", SCRAM: "SASL_SSL", OAUTH: "SASL_SSL"},
        settings={
            # The tests themselves, and those who log in as one client for all; others may do what a test lets them.
            "super.users": f"User:ANONYMOUS;User:{USER};User:CN=kafka-client",
            "allow.everyone.if.no.acl.found": "false",
            "ssl.keystore.type": "PEM",
            "ssl.keystore.location": str(keystore),
            "ssl.truststore.type": "PEM",
            "ssl.truststore.location": str(authority.certificate),
            "listener.name.mtls.ssl.client.auth": "required",
            "listener.name.scram.sasl.enabled.mechanisms": "SCRAM-SHA-512",
            "listener.name.scram.scram-sha-512.sasl.jaas.config": f"{login}.scram.ScramLoginModule required;",
            "listener.name.oauth.sasl.enabled.mechanisms": "OAUTHBEARER",
            "listener.name.oauth.oauthbearer.sasl.jaas.config": f"{login}.oauthbearer.OAuthBearerLoginModule required"
            ' unsecuredLoginStringClaim_sub="broker";',
            # No session outlives its token, or this.
            "listener.name.oauth.oauthbearer.connections.max.reauth.ms": "5000",
        },
        users={USER: password},
    )
