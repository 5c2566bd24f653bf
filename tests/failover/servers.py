"""A PostgreSQL primary and a standby that streams from it, which can be killed, cut off and promoted."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import psutil
import psycopg
import pytest

from connector.demo.embedded import EmbeddedPostgres
from tests.services import eventually

STANDBY_SLOT: Final = "standby"

_SETTINGS: Final = {
    "wal_level": "logical",
    "max_connections": "50",
    "max_replication_slots": "10",
    "max_wal_senders": "10",
    "hot_standby_feedback": "on",
    "wal_receiver_status_interval": "1s",
    "wal_retrieve_retry_interval": "200ms",
    "fsync": "off",  # the machine does not crash, only the servers do
    "shared_buffers": "32MB",
}
_FIRST_WITH_FAILOVER_SLOTS: Final = 17


class Server(EmbeddedPostgres):
    """One of the two servers."""

    def connect(self, database: str = "postgres", **options: Any) -> psycopg.Connection[tuple[Any, ...]]:
        """Return a new connection in autocommit mode."""
        return psycopg.connect(self.url, dbname=database, **{"autocommit": True, **options})

    def one(self, query: str, *arguments: object) -> Any:
        """Return the first column of the first record of a query's answer, or None."""
        with self.connect() as connection:
            record = connection.execute(query, arguments).fetchone()
        return None if record is None else record[0]

    def kill(self) -> None:
        """End every process of it at once, as when its machine is lost."""
        if self._process is None:
            return
        postmaster = psutil.Process(self._process.pid)
        for process in [postmaster, *postmaster.children(recursive=True)]:
            # Its children end by themselves at any time, and once it is gone.
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()
        self._process = None


class Standby(Server):
    """A server that begins as a copy of the primary."""

    def __init__(self, directory: Path, primary: Server, settings: Mapping[str, str]) -> None:
        super().__init__(directory, settings=settings)
        self._primary = primary

    def _initialise(self) -> None:
        account = self._account
        if account:
            self._data.mkdir(mode=0o700)
            shutil.chown(self._data, account.uid, account.gid)
        backup = self._spawn(
            "pg_basebackup",
            "--pgdata",
            str(self._data),
            "--dbname",
            self._primary.url,
            "--slot",
            STANDBY_SLOT,
            "--checkpoint=fast",
            "--no-sync",
        )
        if backup.wait(60) != 0:
            pytest.fail(f"pg_basebackup failed: {self.log.read_text()[-2000:]}")
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.writelines(
                "{} = '{}'\n".format(name, value.replace("'", "''")) for name, value in self._settings.items()
            )
        (self._data / "standby.signal").touch()

    def cut_off(self) -> None:
        """Receive nothing more from the primary."""
        with self.connect() as connection:
            connection.execute("alter system set primary_conninfo = ''")
            connection.execute("select pg_reload_conf()")
        eventually(lambda: self.one("select count(*) from pg_stat_wal_receiver") == 0, what="the end of the receiving")

    def promote(self) -> None:
        """Make it the primary."""
        assert self.one("select pg_promote(true, 30)")


class Pair:
    """A primary and its standby; with `failover_slots` the standby keeps the primary's logical slots up to date."""

    def __init__(self, directory: Path, *, failover_slots: bool, synchronous: bool = False) -> None:
        settings = dict(_SETTINGS)
        if failover_slots:
            settings["synchronized_standby_slots"] = STANDBY_SLOT
        self.failover_slots = failover_slots
        self.primary = Server(directory / "primary", settings=settings)
        self.primary.start()
        if failover_slots and self.primary.one("show server_version_num") < f"{_FIRST_WITH_FAILOVER_SLOTS}0000":
            self.close()
            pytest.skip("failover slots need PostgreSQL 17")
        with self.primary.connect() as connection:
            connection.execute("create database app")
            connection.execute("select pg_create_physical_replication_slot(%s, true)", [STANDBY_SLOT])
        settings |= {
            "primary_conninfo": f"host=127.0.0.1 port={self.primary.port} user=postgres dbname=postgres"
            f" application_name={STANDBY_SLOT}",
            "primary_slot_name": STANDBY_SLOT,
            "synchronized_standby_slots": "",
        }
        if failover_slots:
            settings["sync_replication_slots"] = "on"
        else:
            del settings["synchronized_standby_slots"]
        self.standby = Standby(directory / "standby", self.primary, settings)
        self.standby.start()
        eventually(
            lambda: self.primary.one("select count(*) from pg_stat_replication") == 1, what="a standby that streams"
        )
        if synchronous:
            with self.primary.connect() as connection:
                connection.execute(f"alter system set synchronous_standby_names = '{STANDBY_SLOT}'")
                connection.execute("select pg_reload_conf()")

    @property
    def url(self) -> str:
        """Where clients find whichever of the two takes writes."""
        hosts = f"127.0.0.1:{self.primary.port},127.0.0.1:{self.standby.port}"
        return f"postgresql://postgres@{hosts}/app?target_session_attrs=read-write"

    def await_copy(self) -> None:
        """Wait until the standby has everything that the primary has written by now."""
        written = self.primary.one("select pg_current_wal_flush_lsn()")
        eventually(lambda: self.standby.one("select pg_last_wal_replay_lsn() >= %s::pg_lsn", written), what="the copy")

    def await_synchronised(self, slot: str) -> None:
        """Wait until the standby has a slot that survives the promotion."""
        query = "select synced and not temporary from pg_replication_slots where slot_name = %s"

        def there() -> bool:
            # The slot moves on from one such record to the next; the server writes one every 15 s.
            self.primary.one("select pg_log_standby_snapshot()")
            return bool(self.standby.one(query, slot))

        eventually(there, within=60, what="the slot on the standby")

    def close(self) -> None:
        """Stop both."""
        for server in (self.primary, getattr(self, "standby", None)):
            if server is not None:
                server.stop("immediate")
