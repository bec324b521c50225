"""The prompting port over real helper processes: right tokens, and hostile templates hurt nobody else."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import psutil
import pytest
from tests.unit.prompting.families import HERMES
from tests.unit.prompting.folders import CHATML, byte_fallback, byte_level, write_folder

from isthmus.contracts.clock import ManualClock
from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import (
    Draining,
    InvalidInput,
    ModelInvalid,
    Overloaded,
    TooLarge,
    Unsupported,
)
from isthmus.contracts.prompting import (
    PROMPT_TAIL_TOKENS,
    ChatMessage,
    ChatOptions,
    OutputParse,
    ToolCall,
    ToolChoice,
    ToolDefinition,
    ToolMode,
)
from isthmus.contracts.sampling import TextParams
from isthmus.execution.prompting.dialects import Dialect
from isthmus.execution.prompting.pool import PoolSettings
from isthmus.execution.prompting.service import FolderPrompting, PromptingSettings, open_prompting

HELLO = [ChatMessage("system", "be brief"), ChatMessage("user", "naïve 日本 👍🏽")]


@asynccontextmanager
async def opened(folder: Path, **pool: object) -> AsyncIterator[FolderPrompting]:
    prompting = open_prompting(folder, PromptingSettings(PoolSettings(**pool)), ManualClock())  # type: ignore[arg-type]
    await prompting.start()
    try:
        yield prompting
    finally:
        await prompting.close()


def run(folder: Path, body: Callable[[FolderPrompting], Awaitable[object]], **pool: object) -> None:
    async def main() -> None:
        async with opened(folder, **pool) as prompting:
            await body(prompting)

    asyncio.run(main())


def helpers() -> list[psutil.Process]:
    """The helper processes of this test."""
    return [c for c in psutil.Process().children() if any("prompting.worker" in part for part in c.cmdline())]


def test_chat_text_and_back(tmp_path: Path) -> None:
    async def body(prompting: FolderPrompting) -> None:
        ids = await prompting.encode_chat(HELLO)
        expected = (
            "<|bos|><|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nnaïve 日本 👍🏽<|im_end|>\n"
            "<|im_start|>assistant\n"
        )
        assert ids == byte_level().encode(expected, add_special_tokens=False).ids
        assert await prompting.decode(ids) == expected
        shorter = await prompting.encode_chat(HELLO, ChatOptions(add_generation_prompt=False))
        assert await prompting.decode(shorter) == expected.removesuffix("<|im_start|>assistant\n")
        with_bos = await prompting.encode("the fox")
        assert await prompting.decode(with_bos) == "<|bos|>the fox"
        assert await prompting.decode(with_bos, skip_special_tokens=True) == "the fox"
        assert await prompting.encode("the fox", add_special_tokens=False) == with_bos[1:]
        assert b"".join(map(prompting.token_bytes, with_bos)) == b"<|bos|>the fox"

    run(write_folder(tmp_path), body)
    assert not helpers()


def test_a_template_file_wins_and_named_templates_have_a_default(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "D{{ messages[0].content }}"}]
    folder = write_folder(tmp_path, template=None, chat_template=named)

    async def expect(text: str) -> None:
        async with opened(folder) as prompting:
            assert await prompting.decode(await prompting.encode_chat(HELLO)) == text

    asyncio.run(expect("Dbe brief"))
    (folder / "chat_template.jinja").write_text("F{{ messages|length }}")
    asyncio.run(expect("F2"))


def test_training_settings_of_a_tokenizer_do_not_cut_prompts(tmp_path: Path) -> None:
    tokenizer = byte_fallback()
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=64)
    try:
        folder = write_folder(tmp_path, tokenizer)
    finally:
        tokenizer.no_truncation()
        tokenizer.no_padding()

    async def body(prompting: FolderPrompting) -> None:
        text = "the quick brown fox jumps"
        assert await prompting.decode(await prompting.encode(text)) == text

    run(folder, body)


def test_developer_messages_become_system_for_templates_that_do_not_know_them(tmp_path: Path) -> None:
    async def body(prompting: FolderPrompting) -> None:
        ids = await prompting.encode_chat([ChatMessage("developer", "x")], ChatOptions(add_generation_prompt=False))
        assert "<|im_start|>system\nx" in await prompting.decode(ids)

    run(write_folder(tmp_path), body)


def test_templates_have_the_functions_that_they_expect(tmp_path: Path) -> None:
    template = (
        "{% generation %}{{ strftime_now('%Y-%m-%d') }}{% endgeneration %} {{ {'a': '<é>'}|tojson }}"
        "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %} {{ m.role }}{% endfor %}"
    )

    async def body(prompting: FolderPrompting) -> None:
        ids = await prompting.encode_chat(HELLO)
        assert await prompting.decode(ids) == '2023-11-14 {"a": "<é>"} user'

    run(write_folder(tmp_path, template=template), body)


TOOL = ToolDefinition("f", "does f", '{"type": "object", "properties": {"a": {"type": "string"}}}')


def test_tools_there_and_back_through_the_port(tmp_path: Path) -> None:
    called = ChatMessage("assistant", "", tool_calls=(ToolCall("c", "f", '{"a":  "<|im_end|>"}'),))
    options = ChatOptions((TOOL,), ToolChoice(ToolMode.REQUIRED), thinking=False)

    async def body(prompting: FolderPrompting) -> None:
        prompt = await prompting.encode_chat([HELLO[1]], options)
        whole = await prompting.encode_chat([HELLO[1], called], ChatOptions((TOOL,), add_generation_prompt=False))
        assert "does f" in await prompting.decode(prompt)
        start = len(await prompting.encode_chat([HELLO[1]], ChatOptions((TOOL,))))
        parse = OutputParse(True, True, tuple(prompt[-PROMPT_TAIL_TOKENS:]), ("f",))
        assembler = prompting.assembler(TextParams(), parse)
        pieces = [assembler.feed([one]) for one in whole[start:]] + [assembler.finish()]
        deltas = [delta for piece in pieces for delta in piece.calls]
        assert [delta.name for delta in deltas if delta.name] == ["f"]
        assert "".join(delta.arguments for delta in deltas) == '{"a":  "<|im_end|>"}'
        demanded = prompting.constraint(options, None, prompt[-PROMPT_TAIL_TOKENS:])
        assert demanded is not None
        assert demanded.text.count("%json") == 1

    run(write_folder(tmp_path, template=HERMES), body)


@pytest.mark.parametrize(("asks", "free"), [("{% if enable_thinking %}<think>{% endif %}", False), ("", True)])
def test_a_model_whose_template_opens_the_reasoning_does_not_reason_unasked(
    tmp_path: Path, asks: str, free: bool
) -> None:
    template = "{% if false %}<think></think>{% endif %}{% for m in messages %}{{ m.content }}{% endfor %}" + asks
    response = Constraint(ConstraintKind.CHOICE, '["yes"]')

    async def body(prompting: FolderPrompting) -> None:
        unasked = prompting.constraint(ChatOptions(), response)
        assert unasked is not None
        assert ("reasoning?" in unasked.text) == free
        prompt = await prompting.encode_chat([HELLO[1]], ChatOptions(thinking=True))
        asked = prompting.constraint(ChatOptions(thinking=True), response, prompt[-PROMPT_TAIL_TOKENS:])
        assert asked is not None
        assert "reasoning" in asked.text

    run(write_folder(tmp_path, template=template), body)


def test_tools_count_against_the_limit_of_text(tmp_path: Path) -> None:
    async def main() -> None:
        settings = PromptingSettings(max_text_bytes=64)
        prompting = open_prompting(write_folder(tmp_path), settings, ManualClock())
        await prompting.start()
        try:
            with pytest.raises(TooLarge, match="tools has"):
                await prompting.encode_chat(HELLO[:1], ChatOptions((ToolDefinition("f", "x" * 64),)))
            with pytest.raises(TooLarge, match="messages has"):
                await prompting.encode_chat([ChatMessage("assistant", "", tool_calls=(ToolCall("c", "f", "x" * 64),))])
            with pytest.raises(TooLarge, match="messages has"):
                await prompting.encode_chat([ChatMessage("assistant", "", reasoning="x" * 65)])
        finally:
            await prompting.close()

    asyncio.run(main())


def test_the_dialect_is_the_templates_or_the_settings(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, template=HERMES)
    assert open_prompting(folder, PromptingSettings(), ManualClock()).dialect.tools == "hermes"
    none = PromptingSettings(tool_parser="none", reasoning_parser="none")
    assert open_prompting(folder, none, ManualClock()).dialect == Dialect()
    with pytest.raises(ModelInvalid, match="tool_parser"):
        open_prompting(folder, PromptingSettings(tool_parser="xml"), ManualClock())


HOSTILE = {
    "attribute": ("{{ messages.__class__.__mro__ }}", InvalidInput),
    "attribute by filter": ("{{ (messages|attr('__class__')).__mro__ }}", InvalidInput),
    "globals of a function": ("{{ raise_exception.__globals__.os }}", InvalidInput),
    "format string": ("{{ '{0.__class__.__init__.__globals__}'.format(messages) }}", InvalidInput),
    "mutation": ("{{ messages.append(1) }}", InvalidInput),
    "include": ("{% include '/etc/passwd' %}", InvalidInput),
    "long product": ("{{ 'a' * 1000000000 }}", InvalidInput),
    "tower of powers": ("{{ 9 ** 9 ** 9 ** 9 }}", InvalidInput),
    "long range": ("{% for i in range(1000000000) %}{% endfor %}", InvalidInput),
    "recursion": ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", InvalidInput),
    "date format": ("{{ strftime_now('%99999999d') }}", InvalidInput),
    "undefined": ("{{ nothing.at.all }}", InvalidInput),
    "wide padding": ("{{ 'a'|center(3000000000) }}", TooLarge),
    "huge output": ("{% for i in range(99999) %}{{ '%9999d' % i }}{% endfor %}", TooLarge),
    "doubling": (
        "{% set ns = namespace(s='aaaa') %}{% for i in range(99) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}{{ ns.s }}",
        InvalidInput,
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_template_is_a_clear_error_and_the_next_request_is_served(tmp_path: Path, name: str) -> None:
    template, error = HOSTILE[name]
    guarded = "{% if messages|length > 1 %}" + template + "{% else %}ok{% endif %}"

    async def body(prompting: FolderPrompting) -> None:
        with pytest.raises(error) as caught:
            await prompting.encode_chat(HELLO)
        assert "brief" not in str(caught.value)
        assert await prompting.decode(await prompting.encode_chat(HELLO[:1])) == "ok"

    run(write_folder(tmp_path, template=guarded), body, max_output_chars=1_000_000)


ENDLESS = (
    "{% if messages|length > 1 %}{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    "{% else %}ok{% endif %}"
)


def test_an_endless_template_costs_its_helper_only(tmp_path: Path) -> None:
    async def body(prompting: FolderPrompting) -> None:
        results = await asyncio.gather(
            prompting.encode_chat(HELLO),
            *(prompting.encode_chat(HELLO[:1]) for _ in range(5)),
            prompting.encode("the fox"),
            return_exceptions=True,
        )
        assert isinstance(results[0], InvalidInput)
        assert all(isinstance(result, list) for result in results[1:]), results
        assert prompting.stats.killed == 1
        assert prompting.stats.answered == 6

    run(write_folder(tmp_path, template=ENDLESS), body, deadline_s=0.7)
    assert not helpers()


def test_a_helper_without_a_parent_ends_by_its_own_cpu_limit(tmp_path: Path) -> None:
    """The deadline is long, the CPU limit follows from it: here the helper's own limit acts before the parent's."""

    async def body(prompting: FolderPrompting) -> None:
        (helper,) = helpers()
        soft, _ = helper.rlimit(psutil.RLIMIT_CPU)
        used = sum(helper.cpu_times()[:2])
        assert 0 < soft - used <= 122
        await prompting.encode("a")
        soft, _ = helper.rlimit(psutil.RLIMIT_CPU)
        assert 0 < soft - used <= 13
        assert helper.rlimit(psutil.RLIMIT_FSIZE) == (0, 0)
        assert helper.rlimit(psutil.RLIMIT_CORE) == (0, 0)

    run(write_folder(tmp_path), body)


def test_a_killed_helper_is_replaced_and_its_request_tried_again(tmp_path: Path) -> None:
    async def body(prompting: FolderPrompting) -> None:
        os.kill(helpers()[0].pid, signal.SIGKILL)
        assert await prompting.encode("the fox", add_special_tokens=False)
        assert prompting.stats.died == 1
        assert prompting.stats.started == 2

    run(write_folder(tmp_path), body)


def test_waiting_requests_are_bounded(tmp_path: Path) -> None:
    async def body(prompting: FolderPrompting) -> None:
        calls = [asyncio.create_task(prompting.encode("a")) for _ in range(12)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        shed = [result for result in results if isinstance(result, Overloaded)]
        assert len(shed) == prompting.stats.overloaded
        assert len(shed) >= 7
        assert all(result == results[0] for result in results if not isinstance(result, Overloaded))
        assert await prompting.encode("a") == results[0]

    run(write_folder(tmp_path), body, max_waiting=4)


def test_waiting_bytes_are_bounded_but_one_request_always_fits(tmp_path: Path) -> None:
    async def body(prompting: FolderPrompting) -> None:
        calls = [asyncio.create_task(prompting.encode("a" * 90)) for _ in range(5)]
        results = await asyncio.gather(*calls, return_exceptions=True)
        assert sum(isinstance(result, Overloaded) for result in results) >= 3
        assert isinstance(results[0], list)

    run(write_folder(tmp_path), body, max_waiting_bytes=100)


def test_a_cancelled_caller_leaves_the_helper_usable(tmp_path: Path) -> None:
    async def body(prompting: FolderPrompting) -> None:
        calls = [asyncio.create_task(prompting.encode("the fox " * 1000)) for _ in range(3)]
        await asyncio.sleep(0)
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        assert await prompting.decode(await prompting.encode("a b", add_special_tokens=False)) == "a b"
        assert prompting.stats.died == prompting.stats.killed == 0

    run(write_folder(tmp_path), body)


def test_closing_answers_everybody(tmp_path: Path) -> None:
    async def main() -> None:
        async with opened(write_folder(tmp_path, template=ENDLESS)) as prompting:
            calls = [asyncio.create_task(prompting.encode_chat(HELLO)) for _ in range(3)]
            await asyncio.sleep(0)
            await prompting.close()
            assert all(isinstance(result, Draining) for result in await asyncio.gather(*calls, return_exceptions=True))
            with pytest.raises(Draining):
                await prompting.encode("a")

    asyncio.run(main())
    assert not helpers()


def test_limits_of_one_request(tmp_path: Path) -> None:
    async def main() -> None:
        settings = PromptingSettings(PoolSettings(max_tokens=8), max_text_bytes=64, max_messages=2)
        prompting = open_prompting(write_folder(tmp_path), settings, ManualClock())
        await prompting.start()
        try:
            with pytest.raises(TooLarge, match="65 bytes, limit 64"):
                await prompting.encode("a" * 65)
            with pytest.raises(TooLarge, match="tokens, limit 8"):
                await prompting.encode("zxzxzxzxzxzx")
            with pytest.raises(InvalidInput, match="3 entries"):
                await prompting.encode_chat([HELLO[0]] * 3)
            with pytest.raises(InvalidInput, match="0 entries"):
                await prompting.encode_chat([])
            with pytest.raises(InvalidInput, match="surrogate"):
                await prompting.encode("\ud800")
            with pytest.raises(InvalidInput, match="at 0"):
                await prompting.decode([99_999])
            with pytest.raises(TooLarge, match="9 ids"):
                await prompting.decode([0] * 9)
        finally:
            await prompting.close()

    asyncio.run(main())


def test_a_model_without_a_template_says_so(tmp_path: Path) -> None:
    async def body(prompting: FolderPrompting) -> None:
        with pytest.raises(Unsupported, match="no chat template"):
            await prompting.encode_chat(HELLO)

    run(write_folder(tmp_path, template=None), body)


def test_a_refusal_in_the_templates_own_words_is_passed_on_but_never_content(tmp_path: Path) -> None:
    own = "{{ raise_exception('roles must alternate') }}"
    echo = "{{ raise_exception(messages[0].content) }}"

    async def message(template: str) -> str:
        async with opened(write_folder(tmp_path, template=template)) as prompting:
            with pytest.raises(InvalidInput) as caught:
                await prompting.encode_chat(HELLO)
            return str(caught.value)

    assert "roles must alternate" in asyncio.run(message(own))
    assert "brief" not in asyncio.run(message(echo))


@pytest.mark.parametrize(
    ("file", "content", "words"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", b"{}", "not a tokenizer"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0}}, "decoder": {"type": "ByteLevel"}}', "not accepted"),
        ("tokenizer_config.json", b"[1]", "tokenizer_config.json is not a JSON object"),
        ("tokenizer_config.json", b'{"bos_token": 7}', "bos_token"),
        ("tokenizer_config.json", b'{"chat_template": 7}', "chat_template"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}, {"name": "b"}]}', "none is named default"),
        ("chat_template.jinja", b"\n{% for %}", "line 2"),
        ("chat_template.jinja", b"{{" + b"(" * 20_000, "chat_template"),
        ("chat_template.jinja", b"\xff", "not UTF-8"),
        ("chat_template.jinja", b" " * (1024 * 1024 + 1), "over the limit"),
    ],
)  # fmt: skip
def test_a_folder_that_cannot_be_served_is_refused_by_file(
    tmp_path: Path, file: str, content: bytes | None, words: str
) -> None:
    folder = write_folder(tmp_path, template=CHATML)
    (folder / file).unlink(missing_ok=True)
    if content is not None:
        (folder / file).write_bytes(content)

    async def main() -> None:
        async with opened(folder, helpers=2):
            pass

    with pytest.raises(ModelInvalid, match=words):
        asyncio.run(main())
    assert not helpers()


def test_python_files_in_the_model_folder_are_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_folder(tmp_path / "model")
    for name in ("tokenizers.py", "jinja2.py", "sitecustomize.py", "isthmus.py"):
        (folder / name).write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(folder)

    async def body(prompting: FolderPrompting) -> None:
        assert await prompting.encode_chat(HELLO)

    run(folder, body)
    assert not (tmp_path / "ran").exists()
