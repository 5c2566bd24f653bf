"""Faults, from inside and from outside: what the connector makes of each, on real services and with real processes."""
