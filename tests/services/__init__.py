"""PostgreSQL, Kafka and the connector's processes for the tests; the fixtures are in `plugin`."""

from tests.services.eventually import eventually
from tests.services.kafka import Kafka
from tests.services.postgres import Database, Postgres
from tests.services.process import Process, Response, environment

__all__ = ["Database", "Kafka", "Postgres", "Process", "Response", "environment", "eventually"]
