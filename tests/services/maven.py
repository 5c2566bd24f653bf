"""Jars and archives from Maven, fetched once and kept in the checkout's `.cache`."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

_CHECKOUT = Path(__file__).parents[2]


def fetched(what: str, version: str, artifacts: Sequence[str], *, transitive: bool = True) -> Path:
    """Return a folder with artifacts, each `group:name:version` with `:type:classifier` where it is no jar.

    `transitive` brings along what they depend on. Raises RuntimeError, with what Maven said, if they cannot be had.
    """
    cache = _CHECKOUT / ".cache" / what
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:
        cache = Path(tempfile.gettempdir()) / f"outbox-connector-{what}-{os.getuid()}"
        cache.mkdir(mode=0o700, exist_ok=True)
    folder = cache / version
    if folder.is_dir():
        return folder
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        pom = Path(scratch) / "pom.xml"
        pom.write_text(
            '<project xmlns="http://maven.apache.org/POM/4.0.0"><modelVersion>4.0.0</modelVersion>'
            f"<groupId>test</groupId><artifactId>{what}</artifactId><version>1</version>"
            f"<dependencies>{''.join(map(_dependency, artifacts))}</dependencies></project>",
            encoding="utf-8",
        )
        command = [
            shutil.which("mvn") or "mvn",
            "--batch-mode",
            "--quiet",
            "-Dstyle.color=never",
            "--file",
            str(pom),
            "dependency:copy-dependencies",
            f"-DoutputDirectory={scratch}/fetched",
            *([] if transitive else ["-DexcludeTransitive=true"]),
        ]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if answer.returncode != 0:
            reason = next((line for line in answer.stdout.splitlines() if "ERROR" in line), answer.stderr[-500:])
            raise RuntimeError(f"Maven could not fetch {what} {version}: {reason}")
        # Whoever comes second finds the folder there; both are the same.
        with suppress(OSError):
            (Path(scratch) / "fetched").rename(folder)
    return folder


def _dependency(artifact: str) -> str:
    names = ("groupId", "artifactId", "version", "type", "classifier")
    parts = "".join(f"<{name}>{value}</{name}>" for name, value in zip(names, artifact.split(":"), strict=False))
    return f"<dependency>{parts}</dependency>"
