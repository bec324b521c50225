"""Request bodies, the part about tools and the form of the output: OpenAI's shapes, and vLLM's names for the latter.

JSON Schemas are JSON objects of any content here; what they may cost is bounded in `output_form`, whether they can be
kept is the engine's to say.
"""

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from isthmus.contracts.constraints import MAX_CHOICES
from isthmus.contracts.prompting import MAX_TOOL_NAME_CHARS

MAX_SCHEMA_NAME_CHARS = 64
MAX_CALL_ID_CHARS = 256
MAX_CALLED_NAME_CHARS = 1024

ToolName = Annotated[str, Meta(pattern=f"^[A-Za-z0-9_.-]{{1,{MAX_TOOL_NAME_CHARS}}}$")]
SchemaName = Annotated[str, Meta(pattern=f"^[A-Za-z0-9_.-]{{1,{MAX_SCHEMA_NAME_CHARS}}}$")]
CallId = Annotated[str, Meta(min_length=1, max_length=MAX_CALL_ID_CHARS)]
Schema = dict[str, Any]
Pattern = Annotated[str, Meta(min_length=1)]
Choices = Annotated[list[Annotated[str, Meta(min_length=1)]], Meta(min_length=1, max_length=MAX_CHOICES)]
Effort = Literal["none", "minimal", "low", "medium", "high", "xhigh"]


class FunctionDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A function that the model may call. `parameters` is a JSON Schema of an object; without it there are none.

    `strict`: the arguments keep the schema also where the model calls of its own accord.
    """

    name: ToolName
    description: str | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A tool. The only kind is a function."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The function that must be called."""

    name: ToolName


class NamedTool(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The choice of one tool."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call that an assistant made, as it came: `arguments` is JSON text, the name is whatever the model wrote."""

    name: Annotated[str, Meta(min_length=1, max_length=MAX_CALLED_NAME_CHARS)]
    arguments: str


class MessageToolCall(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A call within a message of an assistant. `index` comes from clients that put streams
    together and send them back as they are; the order counts.
    """

    id: CallId
    type: Literal["function"]
    function: FunctionCall
    index: Annotated[int, Meta(ge=0, le=1023)] | None = None


class TextFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="text"):
    """Any text."""


class JsonFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_object"):
    """A JSON object."""


class SchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A named JSON Schema. The output keeps it whatever `strict` says; without a `schema` it is any JSON object."""

    name: SchemaName
    description: str | None = None
    schema: Schema | None = None
    strict: bool | None = None


class JsonSchemaFormat(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="type", tag="json_schema"):
    """JSON that keeps a schema."""

    json_schema: SchemaFormat


ResponseFormat = TextFormat | JsonFormat | JsonSchemaFormat


class StructuredOutputs(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the output looks like (vLLM's shape): one of these. `json` is a JSON Schema, as an object or as its text.

    `regex` is in Rust's syntax and matches the whole output, `grammar` is in llguidance's Lark notation.
    """

    json: Schema | Pattern | None = None
    json_object: bool | None = None
    regex: Pattern | None = None
    choice: Choices | None = None
    grammar: Pattern | None = None


class TemplateOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What may be said to a chat template: whether the model thinks first, under the names that templates give it."""

    enable_thinking: bool | None = None
    thinking: bool | None = None
