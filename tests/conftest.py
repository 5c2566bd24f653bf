"""Fixtures for every test: real PostgreSQL and Kafka, and the connector's own processes."""

from hypothesis import settings

pytest_plugins = ["tests.services.plugin"]

# How long an example takes depends on what else the machine does.
settings.register_profile("no deadline", deadline=None)
settings.load_profile("no deadline")
