"""Typed, bounded reading of a model folder's JSON files; every complaint names file and entry."""

import json
from pathlib import Path
from typing import Any

from isthmus.contracts.errors import ModelInvalid


class Fields:
    """One JSON object of `file`. Methods raise `ModelInvalid`; a null entry counts as missing."""

    def __init__(self, raw: dict[str, Any], file: str) -> None:
        self.raw = raw
        self.file = file

    def refuse(self, text: str) -> ModelInvalid:
        """The error to raise about an entry."""
        return ModelInvalid(f"{self.file}: {text}")

    def integer(self, name: str, high: int, default: int | None = None, low: int = 1) -> int:
        """An integer from `low` to `high`; without a default the entry must be there."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if type(value) is not int or not low <= value <= high:
            raise self.refuse(f"{name} is {shown(value)}, accepted: an integer from {low} to {high}")
        return value

    def number(self, name: str, low: float, high: float, default: float | None = None) -> float:
        """A number from `low` to `high`; without a default the entry must be there."""
        value = self.raw.get(name)
        if value is None:
            value = default
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            raise self.refuse(f"{name} is {shown(value)}, accepted: a number from {low:g} to {high:g}")
        return float(value)

    def optional_number(self, name: str, low: float, high: float) -> float | None:
        """A number, or None where the entry is missing or null."""
        return None if self.raw.get(name) is None else self.number(name, low, high)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        value = self.raw.get(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.refuse(f"{name} is {shown(value)}, accepted: true or false")
        return value


def shown(value: object) -> str:
    """A short form of a config value for a message."""
    return json.dumps(value)[:60] if isinstance(value, str | int | float | bool | None) else type(value).__name__


def read_json(path: Path, limit: int) -> dict[str, Any]:
    """A JSON object from a file of at most `limit` bytes. Raises `ModelInvalid` naming the file."""
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
        if len(data) > limit:
            raise ModelInvalid(f"{path.name}: over {limit} bytes")
        value = json.loads(data)
    except OSError as error:
        raise ModelInvalid(f"{path.name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ModelInvalid(f"{path.name}: not valid JSON") from error
    if not isinstance(value, dict):
        raise ModelInvalid(f"{path.name}: not a JSON object")
    return value
