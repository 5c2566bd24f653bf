"""PgBouncer before a database, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import psycopg
import pytest

from connector.demo.embedded import free_port
from tests.services.eventually import eventually
from tests.services.postgres import Database


@contextmanager
def pgbouncer(database: Database, directory: Path, pool_mode: str) -> Iterator[str]:
    """Run PgBouncer before a database and give its URL."""
    program = shutil.which("pgbouncer") or "/usr/sbin/pgbouncer"
    if not Path(program).exists():
        pytest.skip("pgbouncer is not installed")
    server, port = urlsplit(database.url), free_port()
    configuration = directory / "pgbouncer.ini"
    configuration.write_text(
        f"[databases]\n{database.name} = host={server.hostname} port={server.port} user={server.username}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"pool_mode = {pool_mode}\n",
        encoding="utf-8",
    )
    configuration.chmod(0o644)
    account = "nobody" if os.geteuid() == 0 else None
    with configuration.open(encoding="utf-8") as readable:
        process = subprocess.Popen(
            [program, f"/dev/fd/{readable.fileno()}"],
            user=account,
            pass_fds=[readable.fileno()],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
        )
        url = f"postgresql://{server.username}@127.0.0.1:{port}/{database.name}"
        try:
            eventually(
                lambda: _connects(url),
                what="PgBouncer's answer",
                ignoring=(psycopg.OperationalError,),
            )
            yield url
        finally:
            process.terminate()
            process.wait(10)


def _connects(url: str) -> bool:
    psycopg.connect(url, connect_timeout=2).close()
    return True
