"""The exercises: made from their seed alone, marked where an answer begins, solvable, and none of evaluation's words.

And the chat template they are written in, which must grow by what is added: the state of a prefix is used again.
"""

import json
import random
import re
import tomllib
from collections.abc import Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from training.embedded import chat_calls, chat_data, chat_passages, chat_recall, chat_tools, mixture, probes
from training.embedded.chat_render import Renderer
from training.embedded.drills import respelled
from training.embedded.evaluate import calls_in
from training.embedded.extract import Gloss
from training.embedded.pools import DOCS, Packer, Pool, parse_marks, read_pool, write_pool
from training.embedded.recall import key_values, rows_again
from training.embedded.tokenizer import SPECIAL, TAGS
from training.embedded.world import MARK_CLOSE, MARK_OPEN, World, prose_words, word_lists

ROOT = Path(__file__).resolve().parents[3]
WORDS = [
    f"{first}{last}"
    for first in ("bar", "cor", "den", "fal", "gor", "hal", "lin", "mar")
    for last in ("ten", "vish", "low", "mick", "der", "nel", "pock", "sy")
]
PROSE = [
    "The pages are kept in order.",
    "A reader looks for a line and finds it.",
    "Nothing is lost when a page turns.",
]
SENTENCES = [f"{text[:-1]} for the {number}th time." for number in range(40) for text in PROSE]


@cache
def world(held_out: bool = False) -> World:
    """A world without documents: all word lists, a few dictionary words, made-up prose."""
    glosses = [Gloss(word, "noun", f"a thing called {word}", 1) for word in WORDS]
    folder = ROOT / "training" / "embedded"
    knowledge = read_toml(folder / "knowledge.toml")
    intents = read_toml(folder / "smalltalk.toml")["intent"]
    prose = () if held_out else prose_words([*SENTENCES, *WORDS])
    return World(word_lists(glosses, held_out), knowledge, intents, glosses, SENTENCES, held_out, prose)


def read_toml(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


@cache
def tokenizer() -> Tokenizer:
    """Every byte a token, and the special tokens of the real one: enough for lengths and marks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({letter: at for at, letter in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.add_tokens([AddedToken(name, special=name not in TAGS, normalized=False) for name in SPECIAL])
    return made


def lessons(kind: str, count: int = 60, size: str = "medium", seed: int = 3) -> list[str]:
    found = []
    for text in mixture.lessons(mixture.KINDS[kind][0], world(), seed, mixture.SIZES[size], 10**9):
        found.append(text)
        if len(found) == count:
            break
    return found


def talks(count: int = 150, room: int = 260) -> Iterator[chat_calls.Talk]:
    rng = random.Random(5)
    for _ in range(count):
        yield chat_calls.conversation(world(), rng, room)


def test_the_lists_of_training_and_of_evaluation_share_no_word() -> None:
    ours, theirs = world().words, world(held_out=True).words
    split = sorted(read_toml(ROOT / "training" / "embedded" / "held_out.toml"))
    assert {"names", "cities", "objects", "verbs", "common", "foods"} <= set(split)
    seen = {word.lower() for name in ours for word in ours[name]}
    withheld = {word.lower() for name in split for word in theirs[name]}
    assert not seen & withheld
    assert all(len(theirs[name]) == len(set(theirs[name])) >= 10 for name in split)


def test_coined_words_are_of_one_split() -> None:
    rng = random.Random(1)
    ours, theirs = ({world(held).coin(rng) for _ in range(3000)} for held in (False, True))
    assert len(ours) > 1000
    assert not ours & theirs


def test_open_lists_give_any_word_of_the_prose_but_those_of_evaluation() -> None:
    assert prose_words(["Two Cottages stand by a wheelbarrow, quietly."]) == ("quietly", "stand", "two")
    rng = random.Random(1)
    drawn = {world().pick(rng, "cities") for _ in range(2000)}
    assert {word.capitalize() for word in world().prose} <= drawn
    assert set(world().words["cities"]) <= drawn
    assert all(word[0].isupper() for word in drawn)
    assert {world().pick(rng, "days") for _ in range(200)} == set(world().words["days"])
    held_out = world(held_out=True)
    assert {held_out.pick(rng, "cities") for _ in range(500)} == set(held_out.words["cities"])


def test_words_are_spelled_anew_in_quotes_names_and_lines() -> None:
    rng = random.Random(2)
    for _ in range(40):
        text = respelled(world(), rng, 300)
        for found in re.finditer(f"{MARK_OPEN}(.*?){MARK_CLOSE}", text):
            before = set(re.findall("[A-Za-z]+", text[: found.start()]))
            assert set(re.findall("[A-Za-z]+", found.group())) <= before, text


def test_drills_spell_every_token_of_letters() -> None:
    vocabulary = {"\u0120lamp": 0, "lamp": 1, "elvet": 2, "\u0120v": 3, "\u0120Rome": 4, "ab": 5, "12x": 6, "\u0120": 7}
    known = Tokenizer(models.WordLevel(vocabulary, "ab"))
    taught = mixture.with_tokens(world(), known)
    assert taught.entries == ("Rome", "lamp")
    assert taught.endings == ("elvet", "lamp")
    rng = random.Random(5)
    words = [taught.spelled(rng) for _ in range(400)]
    assert {"Rome", "lamp", "Romeelvet", "lampelvet"} <= set(words)
    assert not set(words) <= {"Rome", "lamp", "Romeelvet", "lampelvet", "Romelamp", "lamplamp"}


def test_a_call_is_judged_as_json_and_by_nothing_else() -> None:
    call = '<tool_call>{"name": "f", "arguments": {"x": 1, "y": "a"}}</tool_call>'
    other = '<tool_call>{"arguments": {"y": "a", "x": 1}, "name": "f"}</tool_call>'
    assert calls_in(call) == calls_in(other) == [{"name": "f", "arguments": {"x": 1, "y": "a"}}]
    assert calls_in(call + other) == calls_in(call) * 2
    for wrong in (
        "",
        "f(1)",
        f"Well: {call}",
        call + "!",
        "<tool_call>{</tool_call>",
        call.removesuffix("</tool_call>"),
    ):
        assert not calls_in(wrong)


@pytest.mark.parametrize("kind", sorted(mixture.KINDS))
def test_exercises_depend_on_their_seed_alone(kind: str) -> None:
    assert lessons(kind, 20) == lessons(kind, 20)
    assert lessons(kind, 20) != lessons(kind, 20, seed=4)


@pytest.mark.parametrize("kind", sorted(mixture.KINDS))
def test_every_exercise_marks_what_is_to_be_learned(kind: str) -> None:
    for text in lessons(kind):
        assert text.count(MARK_OPEN) == text.count(MARK_CLOSE) > 0
        plain, spans = parse_marks(text)
        assert all(start < stop for start, stop in spans)
        assert not any(mark in plain for mark in "\x01\x02\x03\x04")
        if "<|assistant|>" in plain:
            turns = [m.span(1) for m in re.finditer(r"<\|assistant\|>(?:<think>)?(.*?<\|end\|>)", plain, re.DOTALL)]
            assert spans == turns


def test_a_thought_is_learned_but_never_the_tag_that_opens_it(tmp_path: Path) -> None:
    texts = [text for text in lessons("tools", 80) if "<think>" in text]
    assert 5 < len(texts) < 60
    write_pool(tmp_path, "t", tokenizer(), texts, (32, 1))
    pool = read_pool(tmp_path, "t")
    opens, closes = (tokenizer().token_to_id(tag) for tag in ("<think>", "</think>"))
    assert set(pool.weights[pool.tokens == opens].tolist()) == {0}
    assert set(pool.weights[pool.tokens == closes].tolist()) == {32}


def test_calls_are_of_tools_that_are_offered_and_of_their_types() -> None:
    kinds_seen = set()
    for talk in talks():
        tools = {tool["function"]["name"]: tool["function"]["parameters"] for tool in talk.tools()}
        assert len(tools) == len(talk.kinds)
        for message in talk.messages:
            for call in message.get("tool_calls", []):
                schema, given = tools[call["function"]["name"]], call["function"]["arguments"]
                assert set(schema["required"]) <= set(given) <= set(schema["properties"])
                assert list(given) == [name for name in schema["properties"] if name in given]
                for name, value in given.items():
                    kind = schema["properties"][name]["type"]
                    kinds_seen.add(kind)
                    expected = {"string": str, "integer": int, "number": (int, float), "boolean": bool}[kind]
                    assert isinstance(value, expected), (name, value, kind)
                    assert kind == "boolean" or not isinstance(value, bool)
                    assert value in schema["properties"][name].get("enum", [value])
    assert kinds_seen == {"string", "integer", "number", "boolean"}


def test_arguments_stand_in_what_was_said_before_them() -> None:
    for talk in talks():
        said = ""
        for message in talk.messages:
            for call in message.get("tool_calls", []):
                for value in call["function"]["arguments"].values():
                    assert isinstance(value, bool) or str(value) in said, (value, said)
            said += str(message["content"])


def test_a_final_answer_tells_what_the_tool_returned() -> None:
    rng = random.Random(2)
    with_values = 0
    for _ in range(200):
        asked = chat_tools.request(world(), rng, chat_tools.made_up(world(), rng))
        found = chat_tools.outcome(world(), rng, asked)
        with_values += bool(found.values)
        assert all(value in found.answer and value in found.content for value in found.values)
    assert with_values > 120


def test_two_tools_one_after_another_use_the_first_result() -> None:
    rng = random.Random(8)
    for _ in range(40):
        talk = chat_calls.chained(world(), rng)
        roles = [message["role"] for message in talk.messages]
        assert roles == ["user", "assistant", "tool", "assistant", "tool", "assistant"]
        fields = {str(value) for value in json.loads(talk.messages[2]["content"]).values()}
        (second,) = talk.messages[3]["tool_calls"]
        assert fields & {str(value) for value in second["function"]["arguments"].values()}


def test_a_passage_holds_the_answers_and_lacks_what_is_refused() -> None:
    rng = random.Random(6)
    for _ in range(200):
        given = chat_passages.passage(world(), rng, rng.randint(2, 8))
        told = {(t.subject, t.fact): t.answer for t in given.told}
        assert len(told) == len(given.told)
        assert all(t.value in given.text and t.value in t.answer for t in given.told)
        assert all(t.subject.lower() in t.answer.lower() for t in given.told)
        answered = {q: a for q, a, _ in chat_passages.turns_about(world(), rng, given, 12)}
        known = {
            chat_passages.capital(ask.format(e=subject)): answer
            for (subject, fact), answer in told.items()
            for ask in given.kind.facts[fact]["ask"]
        }
        for question, answer in answered.items():
            assert answer == known.get(question, chat_passages.REFUSAL), (given.text, question)


def test_questions_about_a_table_have_one_answer() -> None:
    rng = random.Random(7)
    for _ in range(60):
        messages = chat_recall.table_talk(world(), rng, 400)
        asked = [m["content"] for m in messages if m["role"] == "user"]
        assert len(asked) == len(set(asked))
        assert asked


@pytest.mark.parametrize("make", [key_values, rows_again])
def test_plain_exercises_ask_for_what_stands_before(make: Any) -> None:
    rng = random.Random(9)
    for _ in range(40):
        text = make(world(), rng, 900)
        before = text[: text.index(MARK_OPEN)]
        for answer in re.findall(f"{MARK_OPEN}(.*?){MARK_CLOSE}", text, re.DOTALL):
            assert answer.strip().rstrip('.,"') in before


def test_the_longest_exercises_fit_their_context_and_ask_often() -> None:
    rng = random.Random(4)
    made = [chat_recall.table_talk(world(), rng, 1000) for _ in range(30)]
    assert sum(sum(m["role"] == "assistant" for m in one) for one in made) > 30 * 5


def test_a_pool_leaves_out_what_is_too_long(tmp_path: Path) -> None:
    texts = [f"{MARK_OPEN}{'a' * size}{MARK_CLOSE}" for size in (5, 50, 9)]
    assert write_pool(tmp_path, "t", tokenizer(), texts, (16, 0), most=20) == 5 + 1 + 9 + 1
    assert read_pool(tmp_path, "t").count == 2


def _pool(rng: np.random.Generator, count: int, least: int, most: int, token: int) -> Pool:
    sizes = rng.integers(least, most, count)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return Pool(np.full(starts[-1], token, np.uint16), np.full(starts[-1], 16, np.uint8), starts)


def test_rows_are_full_and_each_kind_has_its_share() -> None:
    rng = np.random.default_rng(1)
    pools = {DOCS: [_pool(rng, 20, 300, 900, 1)], "a": [_pool(rng, 50, 20, 60, 2)], "b": [_pool(rng, 50, 100, 250, 3)]}
    shares = {DOCS: 0.2, "a": 0.3, "b": 0.5}
    packer = Packer(pools, shares, 0, 7)
    batches = [packer.batch(step, 4, 512) for step in range(30)]
    tokens = np.concatenate([batch[0] for batch in batches])
    for kind, token in ((DOCS, 1), ("a", 2), ("b", 3)):
        assert abs((tokens == token).mean() - shares[kind]) < 0.06
    assert (tokens == 0).mean() < 0.03
    again = Packer(pools, shares, 0, 7).batch(11, 4, 512)
    assert all(np.array_equal(x, y) for x, y in zip(again, batches[11], strict=True))
    assert not np.array_equal(again[0], batches[12][0])


TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": 'The "weather"',
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "where"},
                "unit": {"type": "string", "enum": ["celsius", "fahrenheit"]},
                "days": {"type": ["integer", "null"]},
                "more": {"anyOf": [{"type": "string"}]},
            },
            "required": ["city"],
        },
    },
}
TALK: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "The weather in Rome?"},
    {
        "role": "assistant",
        "content": None,
        "reasoning_content": "A tool can tell.",
        "tool_calls": [{"function": {"name": "get_weather", "arguments": {"city": "Rome"}}}] * 2,
    },
    {"role": "tool", "content": '{"temperature": 21}'},
    {"role": "assistant", "content": "<think>Hm.</think>It is 21."},
    {"role": "developer", "content": "Stop soon."},
    {"role": "user", "content": "Thanks"},
]


@pytest.mark.parametrize("tools", [None, [TOOL, {"type": "function", "function": {"name": "f"}}]])
def test_a_conversation_s_text_begins_with_that_of_what_came_before(tools: list[dict[str, Any]] | None) -> None:
    renderer = Renderer()
    texts = [renderer.conversation(TALK[: count + 1], tools) for count in range(len(TALK))]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    for count, text in enumerate(texts[1:], 1):
        if TALK[count]["role"] == "assistant":
            assert text.startswith(renderer.prompt(TALK[:count], tools))


def test_the_template_writes_tools_calls_results_and_opens_a_thought() -> None:
    text = Renderer().prompt(TALK, [TOOL], thinking=True)
    assert text.startswith(
        '<|bos|><|system|>Be brief.\nYou may call these tools:\n{"description": "The \\"weather\\"", '
        '"name": "get_weather", "parameters": {"city": "string: where", "unit": "celsius|fahrenheit?", '
        '"days": "integer|null?", "more": "any?"}}<|end|><|user|>'
    )
    call = '<tool_call>{"name": "get_weather", "arguments": {"city": "Rome"}}</tool_call>'
    assert f'<|assistant|>{call}{call}<|end|><|tool|>{{"temperature": 21}}<|end|><|assistant|>It is 21.<|end|>' in text
    assert text.endswith("<|user|>Thanks<|end|><|assistant|><think>")
    assert "A tool can tell" not in text
    as_text = json.dumps({"city": "Rome"})
    same = [{**TALK[2], "tool_calls": [{"function": {"name": "get_weather", "arguments": as_text}}] * 2}]
    assert Renderer().conversation([*TALK[:2], *same], [TOOL]) == Renderer().conversation(TALK[:3], [TOOL])


@pytest.mark.parametrize("name", sorted({**probes.PROBES, **probes.SKILLS}))
def test_a_probe_s_answer_is_its_end(name: str) -> None:
    probe = {**probes.PROBES, **probes.SKILLS}[name]
    rng = random.Random(3)
    for filler in (0, 200):
        text = probe(world(held_out=True), rng, Renderer(), filler)
        plain, spans = parse_marks(text)
        assert len(spans) == 1
        assert spans[0][1] == len(plain)
        assert "<|end|>" not in plain[spans[0][0] : -len("<|end|>")]


def test_probes_count_exact_answers_and_refusals() -> None:
    ids = tokenizer().encode(chat_passages.REFUSAL).ids

    def refusing(tokens: torch.Tensor) -> torch.Tensor:
        """Says the refusal's first letter, whatever it is asked."""
        found = torch.zeros(*tokens.shape, tokenizer().get_vocab_size())
        found[..., ids[0]] = 1.0
        return found

    answered = probes.ask(probes.passage, world(held_out=True), tokenizer(), refusing, 2000, 6, seed=1)
    assert (answered.exact, answered.refused) == (0.0, 1.0)

    def knowing(tokens: torch.Tensor) -> torch.Tensor:
        """The token that follows, as if known: every probe is answered."""
        following = torch.cat((tokens[:, 1:], tokens[:, :1]), 1)
        return torch.nn.functional.one_hot(following, tokenizer().get_vocab_size()).float()

    for name in ("recall_chat", "tool_call", "passage_missing", "facts"):
        probe = {**probes.PROBES, **probes.SKILLS}[name]
        found = probes.ask(probe, world(held_out=True), tokenizer(), knowing, 2000, 2, seed=1)
        assert (found.exact, found.tokens) == (1.0, 1.0)


def test_a_probe_that_cannot_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="tokens"):
        probes.fit(probes.tool_call, world(held_out=True), random.Random(1), tokenizer(), 20)


def test_facts_of_a_kind_are_told_asked_and_answered() -> None:
    for fact in chat_data.load_facts():
        assert all("{v}" in text for text in [*fact["tell"], *fact["answer"]])
        assert fact["ask"]
        assert fact["unknown"]
