"""PostgreSQL, Kafka and the connector's processes for the tests; the fixtures are in `plugin`."""

from tests.services.eventually import eventually, eventually_none
from tests.services.kafka import Kafka
from tests.services.postgres import Database, Postgres
from tests.services.process import Process, Response, environment
from tests.services.proxy import TcpProxy

__all__ = [
    "Database",
    "Kafka",
    "Postgres",
    "Process",
    "Response",
    "TcpProxy",
    "environment",
    "eventually",
    "eventually_none",
]
