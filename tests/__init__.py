"""The proof of what the connector promises: unit, integration and end-to-end tests, against real services."""
