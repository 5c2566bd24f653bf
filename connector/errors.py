"""Every error the connector raises on purpose.

::

    ConnectorError
     ├── ConfigurationError    settings are missing or wrong            → exit 78
     ├── ServiceUnavailable    PostgreSQL or Kafka stayed away          → exit 69
     ├── SetupRequired         an object that `setup` makes is missing or altered
     ├── ProtocolError         bytes on the replication stream that make no sense: stop, never skip
     ├── EnvelopeError         a Kafka value that is no envelope        → dead-letter topic
     └── PayloadError          a payload its handler cannot accept      → the row is dead

Anything else that escapes a loop is a defect and ends the process with a traceback.
"""

from __future__ import annotations

from collections.abc import Sequence


class ConnectorError(Exception):
    """Base of all errors of this package; its text tells what happened, to what, and what to do."""


class ConfigurationError(ConnectorError):
    """The environment does not describe a usable configuration.

    `problems` holds one line per wrong or missing variable, by its name and without secret values.
    """

    def __init__(self, problems: Sequence[str]) -> None:
        self.problems = tuple(problems)
        super().__init__("configuration: " + "; ".join(self.problems))


class ServiceUnavailable(ConnectorError):
    """A needed service did not answer before the start deadline."""


class SetupRequired(ConnectorError):
    """A database object or topic that `setup` makes is missing, or is not as `setup` makes it."""


class ProtocolError(ConnectorError):
    """Bytes from the server that are unknown, truncated or malformed.

    The reader stops on it: to skip what it cannot read would be to lose it.
    """


class EnvelopeError(ConnectorError):
    """A Kafka value that names no outbox row, so that no row can carry its failure."""


class PayloadError(ConnectorError):
    """A business payload of the wrong shape or types; retrying cannot help."""
