"""Each room against the real PostgreSQL and Kafka."""
