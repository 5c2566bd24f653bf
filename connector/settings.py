"""Every setting, read from the environment once and checked as a whole.

`python -m connector.settings README.md` writes the table of settings into that page.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from itertools import chain
from math import isfinite
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from psycopg import Error
from psycopg.conninfo import conninfo_to_dict

from connector.errors import ConfigurationError
from connector.failpoints import Failpoint, Point
from connector.failpoints import parse as parse_failpoints
from connector.outbox import Table

_PREFIX = "CONNECTOR_"
_TABLE_START = "<!-- settings -->"
_TABLE_END = "<!-- /settings -->"

# PostgreSQL cuts longer names short without an error, and the object is then not found by its full name.
_IDENTIFIER_BYTES = 63
_IDENTIFIER = r'"(?:[^"\x00]|"")+"|[^\W\d][\w$]*'
_TABLE = re.compile(rf"(?:(?P<schema>{_IDENTIFIER})\.)?(?P<name>{_IDENTIFIER})")
_SLOT = re.compile(r"[a-z0-9_]{1,63}")
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,249}")
_BROKER = re.compile(r"(?:\w+://)?(?:[\w.-]+|\[[0-9A-Fa-f:.%]+\]):\d{1,5}")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(B|kB|MB|GB|TB)?")
_UNITS = {"B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}
_MOST_BYTES = (1 << 63) - 1

_OPTION_PREFIXES = {
    "CONNECTOR_KAFKA_": "kafka_options",
    "CONNECTOR_PRODUCER_": "producer_options",
    "CONNECTOR_CONSUMER_": "consumer_options",
}
# Options whose own name ends like our suffix for "the value is in this file"; the first is ours, not librdkafka's: a
# token is read again and again.
_OPTIONS_NAMED_FILE = {
    "OAUTHBEARER_TOKEN_FILE",
    "SASL_OAUTHBEARER_ASSERTION_FILE",
    "SASL_OAUTHBEARER_ASSERTION_JWT_TEMPLATE_FILE",
    "SASL_OAUTHBEARER_ASSERTION_PRIVATE_KEY_FILE",
}
_NAMES_WITH_UNDERSCORES = {"log_level"}
# librdkafka's names for what has a variable of its own.
_ALIASES = {
    "CONNECTOR_KAFKA_METADATA_BROKER_LIST": "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS",
    "CONNECTOR_KAFKA_GROUP_ID": "CONNECTOR_GROUP_ID",
    "CONNECTOR_CONSUMER_GROUP_ID": "CONNECTOR_GROUP_ID",
    "CONNECTOR_KAFKA_GROUP_INSTANCE_ID": "CONNECTOR_POD_NAME",
    "CONNECTOR_CONSUMER_GROUP_INSTANCE_ID": "CONNECTOR_POD_NAME",
}
_SECRET_OPTION = re.compile(r"password|secret|passphrase|key\.pem|unsecure\.jwt|oauthbearer\.config|jaas\.config")
_SECRET_PARAMETERS = {"password", "sslpassword", "oauth_client_secret", "scram_client_key", "scram_server_key"}
# Kubernetes gives every pod such variables for every Service of its namespace, so that a Service called `connector`
# would look like settings. A setting that a person wrote never has a port's URL as its value.
_SERVICE_LINK = re.compile(
    rf"{_PREFIX}(?:\w+_)?(?:SERVICE_HOST|SERVICE_PORT(?:_\w+)?|PORT_\d+_(?:TCP|UDP|SCTP)(?:_\w+)?)"
)
_SERVICE_LINK_VALUE = re.compile(r"(?:tcp|udp|sctp)://")
# Any of these is enough for libpq to find a server or a database without a URL.
_LIBPQ_VARIABLES = ("PGHOST", "PGHOSTADDR", "PGSERVICE", "PGDATABASE")
# libpq quotes the text it stumbled over, which may be a piece of a password; only these phrases are passed on.
_LIBPQ_PHRASES = (
    "invalid percent-encoded token",
    "forbidden value %00",
    "invalid URI query parameter",
    "invalid connection option",
    "unterminated quoted string",
    'missing "="',
    'missing key/value separator "="',
    "unexpected character",
)
_LONGEST_FILE = 1 << 20
_SHORTEST_TOKEN = 16


def parse_table(text: str) -> Table:
    """Read `name`, `schema.name` or `"Quoted schema"."name"` by PostgreSQL's rules; the schema defaults to `public`.

    Raises ValueError for anything else, and for names longer than 63 bytes.
    """
    match = _TABLE.fullmatch(text.strip())
    if match is None:
        raise ValueError("is not a table name")
    return Table(_identifier(match["schema"] or "public"), _identifier(match["name"]))


def _identifier(text: str) -> str:
    name = text[1:-1].replace('""', '"') if text.startswith('"') else text.lower()
    return _short_enough(name)


def _short_enough(name: str) -> str:
    if len(name.encode()) > _IDENTIFIER_BYTES:
        raise ValueError(f"holds a name longer than {_IDENTIFIER_BYTES} bytes, which PostgreSQL would cut short")
    return name


def parse_size(text: str) -> int:
    """Read a memory size as PostgreSQL writes it (`4GB`, `512MB`, `1048576`), units of 1024; gives bytes.

    Raises ValueError for anything else, and for less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError("is not a size")
    number, unit = match.groups()
    factor = _UNITS[unit or "B"]
    size = round(float(number) * factor) if "." in number else int(number) * factor
    if not 1 <= size <= _MOST_BYTES:
        raise ValueError("is out of range")
    return size


def _conninfo(text: str) -> str:
    if re.match(r"\w+\+\w+://", text):
        raise ValueError("names a driver, as SQLAlchemy's URLs do and libpq's do not")
    parameters = _libpq_parameters(text) if text else {}
    # libpq would take the rest of such a password for a host or a port, and show it in its errors.
    after_user = re.sub(r"^\w+://[^@/]*@", "", text.partition("?")[0])
    if re.match(r"\w+://", text) and "@" in after_user:
        raise ValueError("has an @ too many; in a password write @ as %40 and / as %2F")
    if not re.fullmatch(r"[\d,\s]*", parameters.get("port", "")):
        raise ValueError("has a port that is no number; in a password write @ as %40 and / as %2F")
    return text


def _libpq_parameters(conninfo: str) -> dict[str, str]:
    try:
        return {keyword: str(value) for keyword, value in conninfo_to_dict(conninfo).items()}
    except (Error, UnicodeError) as error:
        complaint = next((phrase for phrase in _LIBPQ_PHRASES if phrase in str(error)), "not in its syntax")
    # Raised out here so that libpq's text, which may quote a password, is not even this error's context.
    raise ValueError(f"cannot be read by libpq ({complaint})")


def _topic(text: str) -> str:
    if not _TOPIC.fullmatch(text) or text in {".", ".."}:
        raise ValueError("is not a name Kafka allows for a topic (letters, digits, '.', '_', '-'; at most 249)")
    return text


def _topics(text: str) -> tuple[str, ...]:
    topics = tuple(dict.fromkeys(_topic(part) for part in map(str.strip, text.split(",")) if part))
    if not topics:
        raise ValueError("names no topic")
    return topics


def _brokers(text: str) -> str:
    brokers = [part.strip() for part in text.split(",") if part.strip()]
    if not brokers:
        raise ValueError("names no broker")
    for number, broker in enumerate(brokers, 1):
        if not _BROKER.fullmatch(broker):
            raise ValueError(f"entry {number} is not host:port")
    return ",".join(brokers)


def _slot(text: str) -> str:
    if not _SLOT.fullmatch(text):
        raise ValueError("is not a name PostgreSQL allows for a slot")
    return text


def _token(text: str) -> str:
    if len(text) < _SHORTEST_TOKEN or not text.isascii() or not text.isprintable() or " " in text:
        raise ValueError("is too short, or holds more than plain characters")
    return text


def _one_of(*words: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text.lower() not in words:
            raise ValueError("is none of the words it may be")
        return text.lower()

    return read


def _at_most(characters: int) -> Callable[[str], str]:
    def read(text: str) -> str:
        if len(text) > characters:
            raise ValueError("is too long")
        return text

    return read


def _whole(least: int, most: int) -> Callable[[str], int]:
    def read(text: str) -> int:
        if not text.isascii() or not text.isdecimal():
            raise ValueError("is not a whole number")
        if not least <= int(text) <= most:
            raise ValueError("is out of range")
        return int(text)

    return read


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        raise ValueError("is not a number") from None
    if not isfinite(seconds) or seconds < 0:
        raise ValueError("is out of range")
    return seconds


def _some_seconds(text: str) -> float:
    seconds = _seconds(text)
    if not seconds:
        raise ValueError("is out of range")
    return seconds


_A_CONNINFO = "a libpq URI or DSN, for example postgresql://connector@db.example/app"
_A_TABLE = 'a table as schema.name, quoted where SQL would quote it: "My schema".messages'
_SECONDS = "a number of seconds"


def _setting(
    read: Callable[[str], object],
    default: object,
    meaning: str,
    expects: str,
    *,
    shown: str = "",
    secret: bool = False,
) -> Any:  # noqa: ANN401 - a declaration stands where the field's default would
    """Declare a setting.

    `read` makes the value of a variable's text and raises ValueError, with what is wrong, for one that it cannot be;
    `expects` completes "set it to …", and `shown` is the default as a person would write it.
    """
    about = {"read": read, "meaning": meaning, "expects": expects, "default": shown or str(default or "")}
    if isinstance(default, dict):
        return field(default_factory=default.copy, metadata=about, repr=not secret)
    return field(default=default, metadata=about, repr=not secret)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The checked configuration of one process; `load_settings` makes it.

    Its repr holds no secrets. A value that the command at hand does not need may be empty.
    """

    database_url: str = _setting(
        _conninfo,
        "",
        "the database, as a libpq URI or DSN; the usual `PG*` variables fill what it lacks",
        _A_CONNINFO,
        secret=True,
    )
    replication_url: str = _setting(
        _conninfo,
        "",
        "the same database for the replication stream; set it where the other goes through a pooler",
        _A_CONNINFO,
        shown="CONNECTOR_DATABASE_URL",
        secret=True,
    )
    kafka_bootstrap_servers: str = _setting(
        _brokers, "", "brokers to start from, as `host:port`, comma-separated", "host:port, comma-separated"
    )
    kafka_options: dict[str, str] = _setting(
        str,
        {},
        "any [librdkafka option](https://github.com/confluentinc/librdkafka/blob/master/CONFIGURATION.md), upper case "
        "with `_` for `.`: `CONNECTOR_KAFKA_SECURITY_PROTOCOL`; what a guarantee stands on may only be what it is",
        "what librdkafka accepts for the option",
        secret=True,
    )
    producer_options: dict[str, str] = _setting(
        str,
        {},
        "the same, for what the reader sends; `CONNECTOR_PRODUCER_LINGER_MS`, if not given, is 10 in a backlog and 0 "
        "otherwise",
        "what librdkafka accepts for the option",
        secret=True,
    )
    consumer_options: dict[str, str] = _setting(
        str, {}, "the same, for the sink's consumer only", "what librdkafka accepts for the option", secret=True
    )
    outbox_table: Table = _setting(
        parse_table,
        Table("public", "agent_outbox_messages"),
        "the outbox; names are read as SQL reads them",
        _A_TABLE,
        shown="public.agent_outbox_messages",
    )
    history_table: Table = _setting(
        parse_table,
        Table("public", "chat_histories"),
        "where chat history is stored",
        _A_TABLE,
        shown="public.chat_histories",
    )
    slot_name: str = _setting(_slot, "outbox_connector", "the logical replication slot", "1 to 63 of a-z, 0-9 and _")
    publication_name: str = _setting(
        _short_enough, "outbox_connector", "the publication that the slot reads", "a name of 1 to 63 bytes"
    )
    topics: tuple[str, ...] = _setting(
        _topics,
        ("smartflow.agent.outbox",),
        "comma-separated: what `setup` makes and the sink reads",
        "topic names, comma-separated",
        shown="smartflow.agent.outbox",
    )
    group_id: str = _setting(
        str, "smartflow-agent-outbox-consumer", "the sink's consumer group", "the name of a consumer group"
    )
    dead_letter_topic: str = _setting(
        _topic, "smartflow.agent.outbox.dead", "where values go that name no outbox row", "the name of a topic"
    )
    topic_partitions: int = _setting(
        _whole(1, (1 << 31) - 1), 6, "partitions of a topic that `setup` makes", "a whole number, 1 or more"
    )
    topic_replication: int = _setting(
        _whole(1, (1 << 15) - 1), 1, "replicas of a topic that `setup` makes", "a whole number, 1 or more"
    )
    key_ordering: str = _setting(
        _one_of("strict", "relaxed"),
        "strict",
        "`strict`: a retried message holds back later ones of its key; `relaxed`: it does not",
        "strict or relaxed",
    )
    wal_budget: int = _setting(
        parse_size,
        4 << 30,
        "the most WAL the slot may pin",
        "a size such as 4GB, 512MB or 1048576 (units: B, kB, MB, GB, TB)",
        shown="4GB",
    )
    http_port: int = _setting(
        _whole(0, 65535),
        8080,
        "`/livez`, `/readyz` and `/metrics`, or the console's page; 0 takes a free port and logs it",
        "a port from 0 to 65535",
    )
    console_host: str = _setting(
        _at_most(253),
        "127.0.0.1",
        "the address that the console is served on: payloads can be read there, so this machine's own by default",
        "an address of this machine, such as 127.0.0.1, or 0.0.0.0 for all of them",
    )
    console_token: str = _setting(
        _token,
        "",
        "lets whoever knows it redrive messages from the console; without it the console only shows",
        "16 characters or more, such as the output of `openssl rand -hex 16`",
        secret=True,
    )
    shutdown_seconds: float = _setting(
        _some_seconds,
        25.0,
        "how long a stopping process may drain; keep it below the orchestrator's grace period",
        f"{_SECONDS} above 0",
        shown="25",
    )
    start_deadline_seconds: float = _setting(
        _seconds,
        120.0,
        "how long PostgreSQL or Kafka may stay away at the start before the process gives up with exit code 69",
        f"{_SECONDS}, 0 or more",
        shown="120",
    )
    group_instance_id: str | None = _setting(
        _at_most(249),
        None,
        "a stable name of this process, such as its pod's: a restart then moves no partitions (static membership)",
        "a stable name of 1 to 249 characters",
    )
    proof_seconds: float = _setting(
        _seconds,
        60.0,
        "how often the sink compares what was settled with history, if its role may read that; 0 is never",
        f"{_SECONDS}, 0 or more",
        shown="60",
    )
    log_level: str = _setting(
        _one_of("debug", "info", "warning", "error", "critical"),
        "info",
        "the least important events that are logged",
        "debug, info, warning, error or critical",
    )
    log_format: str = _setting(
        _one_of("json", "console"),
        "json",
        "`json`, one object a line on stderr, or `console` for people",
        "json or console",
    )
    # For tests, and so not in the README's table.
    failpoints: dict[Point, Failpoint] = _setting(
        parse_failpoints,
        {},
        "",
        "name=kill, name=raise or name=delay:seconds, comma-separated, with a name of connector/failpoints.py",
    )
    # libpq reads PGPASSWORD by itself; it is here only so that `secrets` knows it.
    libpq_password: str = field(default="", repr=False)

    def secrets(self) -> tuple[str, ...]:
        """List every secret value in these settings, longest first, as written and as decoded, for redaction."""
        found = {self.libpq_password, self.console_token}
        for url in (self.database_url, self.replication_url):
            found.update(_conninfo_secrets(url))
        for options in (self.kafka_options, self.producer_options, self.consumer_options):
            for name, value in options.items():
                if _SECRET_OPTION.search(name):
                    found.add(value)
                    found.update(line for line in value.splitlines() if not line.startswith("-----"))
                found.update(_url_passwords(value))
        return tuple(sorted(found - {""}, key=lambda secret: (-len(secret), secret)))


def _conninfo_secrets(conninfo: str) -> Iterator[str]:
    if not conninfo:
        return
    for keyword, value in _libpq_parameters(conninfo).items():
        if keyword in _SECRET_PARAMETERS:
            yield value
    yield from _url_passwords(conninfo)
    if "://" in conninfo:
        for parameter in conninfo.partition("?")[2].split("&"):
            keyword, _, value = parameter.partition("=")
            if unquote(keyword) in _SECRET_PARAMETERS:
                yield value


def _url_passwords(text: str) -> Iterator[str]:
    for userinfo in re.findall(r"://([^@/\s]*)@", text):
        password = userinfo.partition(":")[2]
        yield from (password, unquote(password))


def _variable(name: str) -> str:
    # The pod's name is what Kubernetes can offer by that name; what Kafka makes of it is a member's identity.
    return _PREFIX + ("POD_NAME" if name == "group_instance_id" else name.upper())


_FIELDS = {
    _variable(of.name): of
    for of in fields(Settings)
    if of.name not in _OPTION_PREFIXES.values() and of.name != "libpq_password"
}


def load_settings(environ: Mapping[str, str] = os.environ, *, needs: frozenset[str]) -> Settings:
    """Read and check all settings; `needs` names the services whose address is required: `database`, `kafka`.

    Options of Kafka's clients are judged where Kafka is needed: `prune` may lack the account of a process.

    An empty variable counts as unset. Raises ConfigurationError with one problem for each wrong variable, all at once,
    none of which shows a value.
    """
    found, problems = _read(environ)
    for variable, problem in _missing(environ, needs):
        if variable not in found and variable not in problems and f"{variable}_FILE" not in problems:
            problems[variable] = problem
    values, wrong = _values(found)
    settings = Settings(**values, libpq_password=environ.get("PGPASSWORD", ""))
    conflicts = () if wrong else _conflicts(settings)
    refused = _option_problems(found) if "kafka" in needs else ()
    for variable, problem in chain(wrong.items(), conflicts, refused):
        problems.setdefault(variable, problem)
    if problems:
        raise ConfigurationError([f"{variable}: {problems[variable]}" for variable in sorted(problems, key=_position)])
    return settings


def _read(environ: Mapping[str, str]) -> tuple[dict[str, str], dict[str, str]]:
    """Give the values by variable, those in files among them, and the problems met on the way."""
    found: dict[str, str] = {}
    problems: dict[str, str] = {}
    for name, value in environ.items():
        if not name.startswith(_PREFIX) or not value.strip() or _is_service_link(name, value):
            continue
        meant = _target(name)
        if meant is None:
            problems[name] = _unknown(name)
            continue
        target = _ALIASES.get(meant, meant)
        if not _is_text(value):
            problems[name] = "is not UTF-8; set it to text that is"
        elif target != name and (target in found or environ.get(target, "").strip()):
            problems[target] = f"set twice, here and in {name}; remove one of them"
        elif meant == name:
            found[target] = value
        else:
            text, trouble = _file(value)
            if trouble:
                problems[name] = f"{trouble}; name a readable UTF-8 file that holds the value, or set {target} itself"
            else:
                found[target] = text
    return found, problems


def _is_service_link(name: str, value: str) -> bool:
    if _SERVICE_LINK.fullmatch(name):
        return True
    return name.endswith("_PORT") and _SERVICE_LINK_VALUE.match(value) is not None


def _is_text(value: str) -> bool:
    # Bytes of the environment that are no UTF-8 come as lone surrogates, which no library down the line can send.
    return not any("\ud800" <= character <= "\udfff" for character in value)


def _target(name: str) -> str | None:
    """Name the variable that `name` sets: itself, or the one it names a file for; None if there is no such setting."""
    if name in _FIELDS:
        return name
    for prefix in _OPTION_PREFIXES:
        option = name.removeprefix(prefix)
        if option not in {name, "", "_FILE"}:
            if option.removesuffix("_FILE") == "BOOTSTRAP_SERVERS" and prefix != "CONNECTOR_KAFKA_":
                return None
            return name if option in _OPTIONS_NAMED_FILE else name.removesuffix("_FILE")
    base = name.removesuffix("_FILE")
    return base if base in _FIELDS else None


def _unknown(name: str) -> str:
    base = name.removesuffix("_FILE")
    close = get_close_matches(base, _FIELDS, n=1, cutoff=0.8)
    if base.endswith("_BOOTSTRAP_SERVERS"):
        close = ["CONNECTOR_KAFKA_BOOTSTRAP_SERVERS"]
    if close:
        return f"unknown variable; did you mean {name.replace(base, close[0])}?"
    return f"unknown variable; remove it, or call it CONNECTOR_KAFKA_{name.removeprefix(_PREFIX)} if Kafka needs it"


def _file(path: str) -> tuple[str, str]:
    """Read the value in a file, or say why not; never by its path, in case that is the secret itself, misplaced."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LONGEST_FILE + 1)
        text = content.decode().rstrip("\r\n")
    except OSError as error:
        return "", f"the file it names cannot be read ({os.strerror(error.errno or 0)})"
    except ValueError:
        return "", "the file it names holds no UTF-8 text"
    if len(content) > _LONGEST_FILE:
        return "", "the file it names is larger than 1 MB"
    if "\0" in text or not text.strip():
        return "", "the file it names is empty" if not text.strip() else "the file it names holds a NUL character"
    return text, ""


def _values(found: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Give the values by field, and what is wrong with texts that are none, by variable."""
    values: dict[str, Any] = dict(_options(found))
    problems: dict[str, str] = {}
    for variable, text in found.items():
        if variable in _FIELDS:
            about = _FIELDS[variable].metadata
            try:
                values[_FIELDS[variable].name] = about["read"](text.strip())
            except ValueError as error:
                problems[variable] = f"{error}; set it to {about['expects']}"
    values.setdefault("replication_url", values.get("database_url", ""))
    return values, problems


def _options(found: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """Give the options of Kafka's clients by field, each by librdkafka's name."""
    options: dict[str, dict[str, str]] = {of: {} for of in _OPTION_PREFIXES.values()}
    for variable, value in found.items():
        if variable not in _FIELDS:
            prefix = next(prefix for prefix in _OPTION_PREFIXES if variable.startswith(prefix))
            option = variable.removeprefix(prefix).lower()
            if option not in _NAMES_WITH_UNDERSCORES:
                option = option.replace("_", ".")
            options[_OPTION_PREFIXES[prefix]][option] = value
    return options


def _option_problems(found: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    options = _options(found).values()
    if any(options):
        from connector.kafka import option_problems  # noqa: PLC0415 - most environments have none to be judged

        yield from option_problems(*options)


def _conflicts(settings: Settings) -> Iterator[tuple[str, str]]:
    """Name settings that are fine alone and wrong together."""
    if settings.dead_letter_topic in settings.topics:
        what = "is one of CONNECTOR_TOPICS, so that the sink would read it again"
        yield "CONNECTOR_DEAD_LETTER_TOPIC", f"{what}; set it to the name of another topic"
    if settings.history_table == settings.outbox_table:
        yield "CONNECTOR_HISTORY_TABLE", f"is the same table as CONNECTOR_OUTBOX_TABLE; set it to {_A_TABLE}"


def _missing(environ: Mapping[str, str], needs: frozenset[str]) -> Iterator[tuple[str, str]]:
    if "database" in needs and not any(environ.get(name) for name in _LIBPQ_VARIABLES):
        yield "CONNECTOR_DATABASE_URL", f"is not set; set it to {_A_CONNINFO}, or set PGHOST or PGSERVICE"
    if "kafka" in needs:
        yield "CONNECTOR_KAFKA_BOOTSTRAP_SERVERS", "is not set; set it to the brokers, as host:port, comma-separated"


def _position(variable: str) -> tuple[int, str]:
    names = list(_FIELDS)
    base = variable.removesuffix("_FILE")
    return (names.index(base) if base in names else len(names), variable)


def describe() -> list[tuple[str, str, str]]:
    """List every setting as (variable, default, meaning), in the order of the documentation."""
    options = {of: prefix + "<OPTION>" for prefix, of in _OPTION_PREFIXES.items()}
    return [
        (options.get(of.name, _variable(of.name)), of.metadata["default"], of.metadata["meaning"])
        for of in fields(Settings)
        if of.metadata.get("meaning")
    ]


def render_table() -> str:
    """Give the settings as a Markdown table, with a newline at its end."""
    lines = ["| variable | default | meaning |", "| --- | --- | --- |"]
    lines += [
        f"| `{variable}` | {f'`{default}`' if default else ''} | {text} |" for variable, default, text in describe()
    ]
    return "\n".join(lines) + "\n"


def with_table(page: str) -> str:
    """Give `page` with the table between its markers made anew; raises ValueError if it has no markers."""
    before, start, rest = page.partition(_TABLE_START)
    _, end, after = rest.partition(_TABLE_END)
    if not start or not end:
        raise ValueError(f"no {_TABLE_START} … {_TABLE_END} in the page: put them where the table belongs")
    return f"{before}{start}\n{render_table()}{end}{after}"


def _main(arguments: list[str]) -> None:
    for name in arguments:
        page = Path(name)
        page.write_text(with_table(page.read_text("utf-8")), "utf-8")
    if not arguments:
        sys.stdout.write(render_table())


if __name__ == "__main__":
    _main(sys.argv[1:])
