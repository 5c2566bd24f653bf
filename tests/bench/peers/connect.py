"""Kafka Connect, standalone, with one connector."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from connector.demo.embedded import free_port
from tests.bench.arena import Arena
from tests.bench.child import Child
from tests.services.kafka import APACHE_KAFKA, SLF4J
from tests.services.maven import fetched

_RUNTIME: Final = f"org.apache.kafka:connect-runtime:{APACHE_KAFKA}"
_PROGRAM: Final = "org.apache.kafka.connect.cli.ConnectStandalone"

_WORKER: Final[Mapping[str, str]] = {
    "key.converter": "org.apache.kafka.connect.storage.StringConverter",
    "value.converter": "org.apache.kafka.connect.storage.StringConverter",
    # The quickest way to find the plugin.
    "plugin.discovery": "service_load",
    # So often it remembers how far it has come: what comes again after a crash is no more than this.
    "offset.flush.interval.ms": "1000",
    "connector.client.config.override.policy": "All",
}


def start_connect(name: str, place: Arena, plugin_path: Path, settings: Mapping[str, str]) -> Child:
    """Start a worker with one connector. What it remembers of an earlier life in the same arena counts."""
    folder = place.directory / "connect"
    folder.mkdir(exist_ok=True)
    worker = {
        **_WORKER,
        "bootstrap.servers": place.kafka.bootstrap_servers,
        "plugin.path": str(plugin_path),
        "offset.storage.file.filename": str(folder / "offsets"),
        "listeners": f"http://127.0.0.1:{free_port()}",
    }
    for file, properties in (("worker", worker), ("connector", settings)):
        lines = (f"{key}={value}\n" for key, value in properties.items())
        (folder / f"{file}.properties").write_text("".join(lines), encoding="utf-8")
    libraries = fetched("connect", APACHE_KAFKA, [_RUNTIME, SLF4J])
    options = ["-Xmx1g", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"]
    files = [f"{folder}/worker.properties", f"{folder}/connector.properties"]
    env = {name: os.environ[name] for name in ("PATH", "JAVA_HOME") if name in os.environ}
    java = shutil.which("java") or "java"
    return Child(name, [java, *options, "-cp", f"{libraries}/*", _PROGRAM, *files], folder, env).start()


@functools.cache
def plugin(name: str, version: str) -> Path:
    """Return the plugin path of a Debezium connector.

    Raises RuntimeError, with what Maven said, if it or Kafka Connect cannot be had.
    """
    fetched("connect", APACHE_KAFKA, [_RUNTIME, SLF4J])
    folder = fetched(name, version, [f"io.debezium:{name}:{version}:tar.gz:plugin"], transitive=False)
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as content:
            content.extractall(folder, filter="data")
        archive.unlink()
    return folder


def why_no_plugin(name: str, version: str) -> str | None:
    """Return why a Debezium connector cannot be had, or None."""
    if shutil.which("java") is None or shutil.which("mvn") is None:
        return "needs java and mvn"
    try:
        plugin(name, version)
    except (RuntimeError, OSError, subprocess.TimeoutExpired) as error:
        return str(error).splitlines()[0]
    return None


def database_parts(url: str) -> dict[str, str]:
    """Return what a URL says as Debezium's connectors want it."""
    parts = urlsplit(url)
    return {
        "hostname": parts.hostname or "127.0.0.1",
        "port": str(parts.port or 5432),
        "user": parts.username or "postgres",
        "password": parts.password or "postgres",
        "dbname": parts.path.lstrip("/"),
    }
