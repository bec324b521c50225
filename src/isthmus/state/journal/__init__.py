"""The append-only event journal."""
