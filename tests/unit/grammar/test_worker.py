"""The grammar process: masks are a function of constraint and tokens; what hurts is refused, or killed in time."""

import json
import random
import select
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np
import pytest
from tests.support.fake_runner import fake_info
from tests.support.hostile import HOSTILE
from tests.support.requests import make_request
from tests.support.scale import examples
from tests.support.schemas import random_schema

from isthmus.config import Settings
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import InvalidInput, IsthmusError, TooLarge, Unsupported
from isthmus.contracts.ids import RequestId
from isthmus.execution.inference.grammar.compiler import depth
from isthmus.execution.inference.grammar.messages import Open, Setup, Step
from isthmus.execution.inference.grammar.service import Grammars
from isthmus.execution.inference.grammar.settings import GrammarSettings
from isthmus.execution.inference.grammar.worker import Grammars as Worker

TOKENIZER = str(Settings().model_folder / "tokenizer.json")
VOCAB, ENDS = 8200, [1, 6]
INFO = msgspec.structs.replace(fake_info(), vocab_size=VOCAB, eos_token_ids=ENDS)
WAIT_S = 60.0
QUICK = ("doubling properties", "endless ref", "own options", "regex (a+)+", "regex repeat tower", "grammar brackets")


@pytest.fixture(scope="module")
def worker() -> Worker:
    return Worker(Setup(TOKENIZER, VOCAB, ENDS, 10))


def allowed(mask: bytes) -> list[int]:
    return [int(token) for token in np.flatnonzero(np.unpackbits(np.frombuffer(mask, np.uint8), bitorder="little"))]


def ask(kind: ConstraintKind, text: str, output: list[int], limit: int = 0, session: int = 1) -> Open:
    return Open(session, kind, text, output, [], limit)


def follow(worker: Worker, kind: ConstraintKind, text: str, seed: int, most: int = 40) -> list[int]:
    """A random output of a constraint, checking on the way that looking ahead does not change a mask."""
    rng = random.Random(seed)
    first = worker.open(ask(kind, text, [], limit=4))
    drafts, masks, output = first.drafts, first.masks, list[int]()
    while len(output) < most:
        assert len(masks) == len(drafts) + 1
        for place, mask in enumerate(masks):
            fresh = worker.open(ask(kind, text, output + drafts[:place], session=2))
            assert fresh.masks == [mask]
        token = rng.choice(allowed(masks[0]))
        output.append(token)
        if token in ENDS:
            break
        guesses = [rng.choice(allowed(masks[-1])) for _ in range(3)]
        part = worker.step(Step(1, [token], guesses, 4))
        drafts, masks = part.drafts, part.masks
    return output


def test_masks_depend_on_constraint_and_tokens_alone(worker: Worker) -> None:
    done = 0
    for seed in range(examples(8, 120)):
        text = json.dumps(random_schema(seed))
        try:
            follow(worker, ConstraintKind.JSON_SCHEMA, text, seed)
        except InvalidInput:
            continue
        done += 1
    assert done > 4
    follow(worker, ConstraintKind.REGEX, "[a-c]{2,5}(xyz|xyw)+", 1)
    follow(worker, ConstraintKind.GRAMMAR, 'start: "begin " word ("," word)* <[9]>\nword: /[a-z]{1,4}/', 2)


def test_an_end_is_allowed_when_and_only_when_the_constraint_is_kept(worker: Worker) -> None:
    part = worker.open(ask(ConstraintKind.CHOICE, '["a", "ab", "\\"\\n"]', []))
    first = allowed(part.masks[0])
    assert not set(first) & set(ENDS)
    (a,) = [token for token in first if worker._tokenizer.decode_str([token]) == "a"]
    after = allowed(worker.step(Step(1, [a], [], 0)).masks[0])
    assert set(ENDS) < set(after)
    (b,) = [token for token in after if token not in ENDS]
    assert allowed(worker.step(Step(1, [b], [], 0)).masks[0]) == ENDS


def test_forced_tokens_come_before_guesses_and_guesses_only_as_far_as_they_fit(worker: Worker) -> None:
    forced = worker.open(ask(ConstraintKind.REGEX, "[xy]completely forced text", [], limit=3))
    assert forced.drafts == []
    part = worker.step(Step(1, [allowed(forced.masks[0])[0]], [5, 5], 3))
    assert part.drafts[0] in allowed(part.masks[0])
    assert part.drafts != [5, 5]
    none = worker.open(ask(ConstraintKind.REGEX, "[xy]completely forced text", [], limit=0))
    assert none.drafts == []
    digits = worker.open(Open(3, ConstraintKind.REGEX, "[0-9]+", [], [], 4))
    good = [token for token in allowed(digits.masks[0]) if token not in ENDS][:2]
    looked = worker.open(Open(3, ConstraintKind.REGEX, "[0-9]+", [], [*good, 5, good[0]], 4))
    assert looked.drafts == good
    ended = worker.open(Open(3, ConstraintKind.REGEX, "[0-9]+", [], [*good, ENDS[0], good[0]], 4))
    assert ended.drafts == good, "an end is never a draft"


def test_special_tokens_are_used_by_name_and_by_id_and_plain_text_never_is_one(worker: Worker) -> None:
    for mark in ("<|tool|>", "<[7]>"):
        part = worker.open(ask(ConstraintKind.GRAMMAR, f'start: {mark} "x"', []))
        assert allowed(part.masks[0]) == [7]

    for text in ("<|tool|>", "a<|end|>b", "<|eos|>"):
        part = worker.open(ask(ConstraintKind.JSON_SCHEMA, json.dumps({"const": text}), [], limit=16))
        output: list[int] = []
        while not set(allowed(part.masks[0])) & set(ENDS):
            output.append(allowed(part.masks[0])[0])
            part = worker.step(Step(1, output[-1:], [], 16))
            assert not set(part.drafts) & set(range(20))
        assert worker._tokenizer.decode_str(output) == json.dumps(text)


def test_an_output_that_does_not_fit_is_refused(worker: Worker) -> None:
    with pytest.raises(InvalidInput, match="output so far"):
        worker.open(ask(ConstraintKind.REGEX, "a+", [7, 7, 7]))
    worker.open(ask(ConstraintKind.REGEX, "a+", []))
    with pytest.raises(InvalidInput):
        worker.step(Step(1, [7], [], 0))
    with pytest.raises(InvalidInput, match="no such session"):
        worker.step(Step(1, [7], [], 0))


@pytest.mark.parametrize(
    "schema",
    [
        {"not": {"type": "string"}},
        {"type": "array", "uniqueItems": True},
        {"type": "array", "contains": {}},
        {"type": "object", "propertyNames": {"pattern": "a"}},
        {"type": "object", "dependentRequired": {"a": ["b"]}},
        {"type": "object", "dependentSchemas": {"a": {}}},
        {"type": "object", "unevaluatedProperties": False},
        {"type": "array", "unevaluatedItems": False},
        {"if": {}, "then": {"type": "string"}},
        {"type": "string", "format": "made-up"},
        {"oneOf": [{"type": "integer"}, {"type": "number"}]},
        {"$ref": "https://example.com/schema"},
        {"type": "string", "pattern": "(?=a)"},
        {"x-guidance": {"lenient": True, "coerce_one_of": True}, "not": {}},
    ],
)
def test_keywords_that_are_not_kept_are_refused_by_name(worker: Worker, schema: dict[str, object]) -> None:
    with pytest.raises(Unsupported) as caught:
        worker.open(ask(ConstraintKind.JSON_SCHEMA, json.dumps(schema), []))
    assert caught.value.field == "constraint"
    assert len(str(caught.value)) < 300


def test_white_space_is_bounded(worker: Worker) -> None:
    output: list[int] = []
    tokens = worker._tokenizer
    for piece in ('{"a":', "1}"):
        output += tokens.tokenize_str(piece)
        worker.open(ask(ConstraintKind.JSON_SCHEMA, '{"type":"object"}', output))
    for bad in (' {"a":1}', '{"a":  1}', '{"a":1\n\n}', '{"a":1}\n', '{"a":\t1}'):
        with pytest.raises(InvalidInput):
            worker.open(ask(ConstraintKind.JSON_SCHEMA, '{"type":"object"}', tokens.tokenize_str(bad)))
    pretty = '{\n  "a": 1,\n  "b": [\n    1\n  ]\n}'
    part = worker.open(ask(ConstraintKind.JSON_SCHEMA, '{"type":"object"}', tokens.tokenize_str(pretty)))
    assert allowed(part.masks[0]) == ENDS


def test_a_bad_tokenizer_is_refused_with_its_reason(tmp_path: Path) -> None:
    for content in (None, "{}", "not json", '{"model":{"type":"Nope"}}'):
        path = tmp_path / "tokenizer.json"
        if content is not None:
            path.write_text(content)
        with pytest.raises(Unsupported, match="tokenizer"):
            Worker(Setup(str(path), VOCAB, ENDS, 10))


def test_depth_counts_objects_and_arrays() -> None:
    assert [depth(value) for value in (1, [], {"a": 1}, [[], {"a": [{}]}])] == [0, 1, 1, 4]


@contextmanager
def process(**limits: object) -> Iterator[Grammars]:
    settings = GrammarSettings(**limits)  # type: ignore[arg-type]
    grammars = Grammars(INFO, TOKENIZER, settings, SystemClock(), most_open=4)
    try:
        yield grammars
    finally:
        grammars.shut()


def settle(grammars: Grammars, name: str) -> IsthmusError | None:
    """Wait until `name` has masks (None) or cannot go on (why). Everything in between has a deadline."""
    clock = SystemClock()
    until = clock.monotonic() + WAIT_S
    while clock.monotonic() < until:
        failed = dict(grammars.pump())
        if RequestId(name) in failed:
            return failed[RequestId(name)]
        if grammars.ready(RequestId(name)):
            return None
        watched = [] if grammars.fileno is None else [grammars.fileno]
        deadline = grammars.deadline()
        wait = 1.0 if deadline is None else min(1.0, max(0.0, deadline - clock.monotonic()))
        select.select(watched, watched if grammars.sending else [], [], wait)
    raise AssertionError(f"nothing became of {name}")


def open_one(grammars: Grammars, name: str, kind: ConstraintKind, text: str) -> None:
    grammars.open(msgspec.structs.replace(make_request(name, [1]), constraint=Constraint(kind, text)), [])


def attack(names: Iterator[str] | tuple[str, ...]) -> None:
    with process(compile_s=2.0, step_s=2.0) as grammars:
        open_one(grammars, "calm", ConstraintKind.REGEX, "[a-z]+")
        assert settle(grammars, "calm") is None
        calm: list[int] = []
        for number, name in enumerate(names):
            kind, text = HOSTILE[name]
            one = RequestId(f"h{number}")
            open_one(grammars, one, kind, text)
            error = settle(grammars, one)
            assert error is None or isinstance(error, InvalidInput), name
            rng = random.Random(name)
            for _ in range(10 if error is None else 0):
                token = rng.choice(allowed(grammars.part(one, 0)[1][0]))
                if token in ENDS:
                    break
                grammars.advance(one, [token], [])
                error = settle(grammars, one)
                assert error is None or isinstance(error, InvalidInput), name
                if error is not None:
                    break
            grammars.close(one)
            # Whatever became of it, an output that has nothing to do with it goes on.
            calm.append(allowed(grammars.part(RequestId("calm"), 0)[1][0])[5])
            grammars.advance(RequestId("calm"), calm[-1:], [])
            assert settle(grammars, "calm") is None, name


def test_some_hostile_constraints_end_cleanly_and_nobody_else_notices() -> None:
    attack(QUICK)


@pytest.mark.chaos
def test_all_hostile_constraints_end_cleanly_and_nobody_else_notices() -> None:
    attack(tuple(HOSTILE))


def test_memory_is_bounded_and_who_needs_more_is_refused() -> None:
    with process(memory_bytes=128 * 1024 * 1024, compile_s=60.0) as grammars:
        open_one(grammars, "big", *HOSTILE["regex repeat tower"])
        error = settle(grammars, "big")
        assert isinstance(error, InvalidInput)
        assert "memory" in str(error)
        assert grammars.counters.grammar_restarts == 2
        open_one(grammars, "small", ConstraintKind.REGEX, "a")
        assert settle(grammars, "small") is None


def test_a_deep_schema_is_too_large(worker: Worker) -> None:
    with pytest.raises(TooLarge):
        worker.open(ask(ConstraintKind.JSON_SCHEMA, '{"items":' * 70 + "{}" + "}" * 70, []))
