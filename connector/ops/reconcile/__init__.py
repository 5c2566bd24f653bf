"""`reconcile`: whether outbox, Kafka and history agree, message by message."""

from connector.ops.reconcile.report import Report, as_json, as_lines
from connector.ops.reconcile.run import ReconcileOptions, Reconciliation

__all__ = ["ReconcileOptions", "Reconciliation", "Report", "as_json", "as_lines"]
