"""Isthmus: a state-first serving fabric for language models."""

__version__ = "0.2.0"
