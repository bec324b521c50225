"""Requests that the embedded model answers with a tool, for the tests with either official client."""

from dataclasses import dataclass

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
SUM = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}}, "required": ["a", "b"]}
OFFERED = (("get_weather", "Get the weather in a city", WEATHER), ("add", "Add two numbers", SUM))


@dataclass(frozen=True)
class Case:
    """What is asked, the call that it means, what the tool says, and what the answer must then say."""

    question: str
    name: str
    arguments: dict[str, object]
    result: dict[str, object]
    said: str


ASKED = (
    Case("What is the weather in Rome?", "get_weather", {"city": "Rome"}, {"temperature": 17}, "17"),
    Case("What is the weather in Oslo?", "get_weather", {"city": "Oslo"}, {"condition": "snow"}, "snow"),
    Case("What is the weather in Lima?", "get_weather", {"city": "Lima"}, {"temperature": 24}, "24"),
    Case("What is 14 plus 27?", "add", {"a": 14, "b": 27}, {"sum": 41}, "41"),
    Case("Add 8 and 35.", "add", {"a": 8, "b": 35}, {"sum": 43}, "43"),
    Case("What is 61 + 12?", "add", {"a": 61, "b": 12}, {"sum": 73}, "73"),
)
ALLOWED_FAILURES = 1
