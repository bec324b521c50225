"""The observability plane: logs, metrics and lineage."""
