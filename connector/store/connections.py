"""How the connector connects to PostgreSQL, and what an error of it means for the message at hand."""

from __future__ import annotations

import select
import time
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

P = ParamSpec("P")
T = TypeVar("T")

# A peer that is gone without a word (a node lost its power, a firewall forgot the connection) is found out in seconds:
# the first four where nothing is on its way to it, the last where something is.
_KEEPALIVE: Final[dict[str, Any]] = {
    "keepalives": 1,
    "keepalives_idle": 10,
    "keepalives_interval": 5,
    "keepalives_count": 3,
    "tcp_user_timeout": 20_000,
}

# The arrays of a batch have no statistics: the plan that suits any array (index lookups, row by row) is the right one,
# and planning it once is enough.
_SESSION: Final = sql.SQL(
    "set plan_cache_mode = force_generic_plan; set statement_timeout = {statement}; set lock_timeout = {lock};"
    " set idle_in_transaction_session_timeout = {idle}; select pg_backend_pid()"
)
# A statement that was planned while the table was small, or never analysed, would go on reading all of it. In the order
# of an index rows are locked by their ids. Where there is none a plan seems so dear that older servers compile it.
_BY_INDEX: Final = "set enable_seqscan = off; set enable_bitmapscan = off; set jit = off"

_ROW_FAULTS: Final = frozenset(
    {
        "21",  # cardinality: two messages of one batch meant the same row
        "22",  # data exception: out of range, too long, a character that cannot be stored
        "23",  # constraint violation
        "27",  # triggered data change
        "2F",  # SQL routine
        "38",  # external routine
        "39",  # external routine invocation
        "44",  # with check option
        "54",  # program limit: a value too large for its index
        "P0",  # a trigger raised
    }
)
# The other classes that PostgreSQL knows. One beyond these was made up by the author of a trigger or a function.
_SERVER_CLASSES: Final = frozenset(
    "00 01 02 03 08 09 0A 0B 0F 0L 0P 0Z 10 20 21 24 25 26 27 28 2B 2D 2F 34 38 39 3B 3D 3F"  # noqa: SIM905 - a table
    " 40 42 53 55 57 58 72 F0 HV XX".split()
)
# A chat message has no place in a log. The message itself names the constraint, or the column.
_DETAILED_BY_THE_WHOLE_ROW: Final = frozenset({"23502", "23514"})
_TRY_AGAIN: Final = frozenset({"40001", "40P01"})
_UNPREPARED: Final = frozenset({"26000", "42P05"})


def connect(
    url: str,
    *,
    name: str,
    statement_seconds: float = 60,
    lock_seconds: float = 30,
    idle_in_transaction_seconds: float = 300,
    connect_seconds: int = 10,
    prepare: bool = True,
    by_index: bool = False,
) -> psycopg.Connection[tuple[Any, ...]]:
    """Open an ordinary connection in autocommit mode.

    `name` shows as `application_name`. A statement that runs longer than `statement_seconds`, or waits for a lock
    longer than `lock_seconds`, is ended by the server, and so is a session that leaves a transaction open for
    `idle_in_transaction_seconds`; 0 sets no limit. Each address is given `connect_seconds` to answer. With `by_index`
    rows are looked up by an index wherever there is one, whatever the statistics say; not behind a pooler, where plans
    are not kept, and the next to have the session might be somebody else.

    Raises:
        psycopg.OperationalError: the server cannot be reached, or refuses.
    """
    connection = psycopg.connect(
        url,
        autocommit=True,
        prepare_threshold=0 if prepare else None,
        application_name=name,
        connect_timeout=connect_seconds,
        client_encoding="UTF8",
        **watchful(url),
    )
    try:
        session = connection.execute(
            _SESSION.format(
                statement=round(statement_seconds * 1000),
                lock=round(lock_seconds * 1000),
                idle=round(idle_in_transaction_seconds * 1000),
            ).as_string(connection),
            prepare=False,
        )
        while session.nextset():
            pass
        if session.fetchone() != (connection.info.backend_pid,):
            # A pooler is between. Sessions that share a server's would run each other's statements, of the same names.
            connection.prepare_threshold = None
        elif by_index:
            connection.execute(_BY_INDEX, prepare=False)
    except psycopg.Error:
        connection.close()
        raise
    return connection


def watchful(url: str) -> dict[str, Any]:
    """Return the parameters that let libpq notice a peer that is gone, without those that the URL sets itself."""
    given = conninfo_to_dict(url)
    return {name: value for name, value in _KEEPALIVE.items() if name not in given}


def is_alive(connection: psycopg.Connection[Any]) -> bool:
    """Tell whether an idle connection still is one, without asking the server anything.

    A server that ends sends word; one that vanishes is noticed by the keepalives.
    """
    try:
        while select.select([connection.fileno()], [], [], 0)[0]:
            connection.pgconn.consume_input()
    except psycopg.Error:
        return False
    return True


def send_all(connection: psycopg.Connection[Any]) -> None:
    """Send all of what a pipeline has been given, which may be more than the socket takes at once.

    Raises:
        psycopg.OperationalError: the server is gone.
    """
    while connection.pgconn.flush():
        select.select([], [connection.fileno()], [])


def is_row_fault(error: psycopg.Error) -> bool:
    """Tell whether the database refused the content of a row, so that another row might pass.

    Anything else (an outage, a missing table, a missing privilege) is no message's fault.
    """
    if error.sqlstate is None:
        # psycopg refuses some values before it sends them: text with a NUL character, an object of an unknown type.
        return isinstance(error, psycopg.DataError | psycopg.ProgrammingError)
    kind = error.sqlstate[:2]
    # A trigger may say "missing privilege" or "no such column" of what it raises; it is its word on a row all the same.
    raised = kind == "42" and error.diag.source_function == "exec_stmt_raise"
    return kind in _ROW_FAULTS or kind not in _SERVER_CLASSES or raised


def is_refused_by_policy(error: psycopg.Error) -> bool:
    """Tell whether row level security refused a new row: for what is in it, or because no policy lets any in."""
    return error.sqlstate == "42501" and error.diag.source_function == "ExecWithCheckOptions"


def is_conflict(error: psycopg.Error) -> bool:
    """Tell whether two transactions collided (a deadlock, a serialization failure): the same again will pass."""
    return error.sqlstate in _TRY_AGAIN


def again_on_conflict(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Do it, and again where a standby's recovery was in the way."""
    while True:
        try:
            return work(*args, **kwargs)
        except psycopg.Error as error:
            if not is_conflict(error):
                raise
            time.sleep(0.1)


def is_pooler_trouble(error: psycopg.Error) -> bool:
    """Tell whether prepared statements are lost between transactions, as they are behind some poolers."""
    return error.sqlstate in _UNPREPARED


def describe(error: psycopg.Error) -> str:
    """Return the server's words for an error: message, detail and SQLSTATE, on one line; no row's content."""
    detail = "" if error.sqlstate in _DETAILED_BY_THE_WHOLE_ROW else error.diag.message_detail or ""
    message = error.diag.message_primary or str(error).strip()
    if error.sqlstate == "22021" and message.endswith("0x00"):
        message += ", a NUL, which PostgreSQL's text cannot hold"
    parts = [message, detail]
    text = " ".join(part for part in parts if part).replace("\n", " ")
    return f"{text} (SQLSTATE {error.sqlstate})" if error.sqlstate else text
