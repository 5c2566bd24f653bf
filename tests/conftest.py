"""Fixtures for every test: real PostgreSQL and Kafka, and the connector's own processes."""

pytest_plugins = ["tests.services.plugin"]
