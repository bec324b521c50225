"""Structured output: constraints on outputs, turned into masks over the vocabulary by a process of its own."""
