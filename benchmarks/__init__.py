"""Measurements of Isthmus: each is a command that writes JSON under benchmarks/results."""
