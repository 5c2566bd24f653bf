"""The web page of the pipeline: looks at the database and at Kafka, and changes nothing without a token."""
