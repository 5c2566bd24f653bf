"""Everything the connector says to PostgreSQL in SQL. The SQL itself is in the top-level `sql/` folder."""
