"""Chat templates in the manner of each family (written for these tests; the embedded models' is their own), and
tokenizers with their marks."""

import json
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.resources import files
from pathlib import Path

from tests.unit.prompting.folders import byte_level
from tokenizers import AddedToken, Tokenizer

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.prompting import PROMPT_TAIL_TOKENS, ChatMessage, ChatOptions, OutputParse
from isthmus.contracts.sampling import TextParams
from isthmus.execution.prompting.assembler import Assembler
from isthmus.execution.prompting.dialects import Dialect, ToolDialect, detect
from isthmus.execution.prompting.messages import Limits, Render, Setup
from isthmus.execution.prompting.vocabulary import Vocabulary
from isthmus.execution.prompting.worker import Helper

HERMES = """
{%- if tools %}<|im_start|>system
Tools:{% for tool in tools %}
{{ tool | tojson }}{% endfor %}
Answer with <tool_call>
{"name": ..., "arguments": ...}
</tool_call><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == "tool" %}<|im_start|>user
<tool_response>
{{ message.content }}
</tool_response><|im_end|>
{% elif message.role == "assistant" %}<|im_start|>assistant
{% if message.reasoning_content %}<think>
{{ message.reasoning_content.strip("\n") }}
</think>

{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] %}
{%- if message.content or not loop.first %}{{ "\n" }}{% endif %}<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}<|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{% endif %}"""

LLAMA = """
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == "tool" %}<|start_header_id|>ipython<|end_header_id|>

{{ message.content | tojson }}<|eot_id|>
{%- elif "tool_calls" in message %}
{%- if message.tool_calls | length != 1 %}{{ raise_exception("one call at a time") }}{% endif %}
{%- set call = message.tool_calls[0].function %}<|start_header_id|>assistant<|end_header_id|>

{{ '{"name": "' + call.name + '", "parameters": ' }}{{ call.arguments | tojson }}{{ "}" }}<|eot_id|>
{%- else %}<|start_header_id|>{{ message.role }}<|end_header_id|>

{% if loop.first and tools %}Answer with {"name": function name, "parameters": dictionary}. Functions:
{% for tool in tools %}{{ tool | tojson(indent=4) }}
{% endfor %}{% endif %}{{ message.content | trim }}<|eot_id|>{% endif %}{% endfor %}
{%- if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>

{% endif %}"""

MISTRAL_LIST = """
{{- bos_token }}
{%- for message in messages %}
{%- if message["role"] == "user" %}
{%- if tools is not none and loop.first %}[AVAILABLE_TOOLS] {{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST] {{ message["content"] }}[/INST]
{%- elif message.tool_calls is defined and message.tool_calls is not none %}[TOOL_CALLS] [
{%- for call in message.tool_calls %}
{%- if call.id | length != 9 %}{{ raise_exception("ids have 9 letters and digits") }}{% endif %}
{{- (call.function | tojson)[:-1] + ', "id": "' + call.id + '"}' }}{% if not loop.last %}, {% endif %}
{%- endfor %}]</s>
{%- elif message["role"] == "assistant" %} {{ message["content"] }}</s>
{%- elif message["role"] == "tool" -%}
[TOOL_RESULTS] {"content": {{ message.content }}, "call_id": "{{ message.tool_call_id }}"}[/TOOL_RESULTS]
{%- endif %}{% endfor %}"""

MISTRAL_NAMED = """
{{- bos_token }}
{%- for message in messages %}
{%- if message.role == "user" %}
{%- if tools and loop.first %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif -%}
[INST]{{ message.content }}[/INST]
{%- elif message.role == "assistant" %}
{%- if message.reasoning_content %}[THINK]{{ message.reasoning_content }}[/THINK]{% endif %}{{ message.content }}
{%- for call in message.tool_calls or [] -%}
[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}
{%- endfor %}</s>
{%- elif message.role == "tool" %}[TOOL_RESULTS]{{ message.content }}[/TOOL_RESULTS]{% endif %}{% endfor %}"""

EMBEDDED = (Path(__file__).parents[3] / "training" / "embedded" / "chat_template.jinja").read_text()
CHATML_TOKENS = ("<tool_call>", "</tool_call>", "<think>", "</think>")
LLAMA_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")
MISTRAL_TOKENS = (
    *("</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]"),
    *("[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]"),
)
LIMITS = Limits(cpu_s=60, memory_bytes=1 << 30, output_chars=1 << 20, tokens=1 << 20)


def with_tokens(tokens: tuple[str, ...], *, special: bool) -> Tokenizer:
    tokenizer = Tokenizer.from_str(byte_level().to_str())
    tokenizer.add_tokens([AddedToken(token, special=special, normalized=False) for token in tokens])
    return tokenizer


@cache
def embedded() -> Tokenizer:
    """The embedded models' tokenizer, its reserved tokens with the names of their second edition."""
    text = next(files("isthmus.data").joinpath("embedded").glob("tokenizer.json")).read_text()
    parsed = json.loads(text)
    for entry in parsed["added_tokens"]:
        if 8 <= entry["id"] < 12:
            old, entry["content"] = entry["content"], CHATML_TOKENS[entry["id"] - 8]
            entry["special"] = False
            parsed["model"]["vocab"][entry["content"]] = parsed["model"]["vocab"].pop(old)
    return Tokenizer.from_str(json.dumps(parsed))


@dataclass(frozen=True)
class Family:
    """One way of writing, complete: template, tokenizer, and the token that ends an answer."""

    name: str
    template: str
    tokenizer: Tokenizer
    end: str
    tools: ToolDialect
    parallel: bool = True

    @cached_property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary.from_json(self.tokenizer.to_str().encode(), "tokenizer.json")

    @cached_property
    def dialect(self) -> Dialect:
        return detect(self.template)

    @cached_property
    def helper(self) -> Helper:
        specials = {"bos_token": "<|bos|>"}
        return Helper(Setup(self.tokenizer.to_str().encode(), self.template, specials, LIMITS))

    def ids(self, messages: list[ChatMessage], options: ChatOptions) -> list[int]:
        packed = self.helper.answer(Render(messages, options, ManualClock().wall())).packed
        return list(memoryview(packed).cast("I"))

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False)

    def answer_ids(self, messages: list[ChatMessage], options: ChatOptions) -> tuple[list[int], list[int]]:
        """The prompt of all but the last message, and what the model would have written for that, without its end."""
        prompt = self.ids(messages[:-1], ChatOptions(options.tools, options.choice))
        whole = self.ids(messages, ChatOptions(options.tools, options.choice, None, add_generation_prompt=False))
        assert whole[: len(prompt)] == prompt
        rest = whole[len(prompt) :]
        return prompt, rest[: rest.index(self.vocabulary.added_id(self.end) or -1)]

    def assembler(self, prompt: list[int], params: TextParams | None = None, names: tuple[str, ...] = ()) -> Assembler:
        parse = OutputParse(True, True, tuple(prompt[-PROMPT_TAIL_TOKENS:]), names)
        return Assembler(self.vocabulary, params or TextParams(), parse, self.dialect)


@cache
def families() -> dict[str, Family]:
    """All of them by name."""
    found = (
        Family("hermes", HERMES, with_tokens(CHATML_TOKENS, special=False), "<|im_end|>", ToolDialect.HERMES),
        Family("hermes special", HERMES, with_tokens(CHATML_TOKENS, special=True), "<|im_end|>", ToolDialect.HERMES),
        Family("hermes as text", HERMES, with_tokens((), special=False), "<|im_end|>", ToolDialect.HERMES),
        Family("llama", LLAMA, with_tokens(LLAMA_TOKENS, special=True), "<|eot_id|>", ToolDialect.LLAMA, False),
        Family("mistral list", MISTRAL_LIST, with_tokens(MISTRAL_TOKENS, special=True), "</s>", ToolDialect.MISTRAL),
        Family("mistral named", MISTRAL_NAMED, with_tokens(MISTRAL_TOKENS, special=True), "</s>", ToolDialect.MISTRAL),
        Family("embedded", EMBEDDED, embedded(), "<|end|>", ToolDialect.HERMES),
    )
    return {family.name: family for family in found}
