"""Sessions of structured output, without a process: what is asked, who is blamed, what is told again."""

from collections.abc import Sequence

import pytest

from isthmus.contracts.constraints import Constraint, ConstraintKind
from isthmus.contracts.errors import EngineFailed, InvalidInput, Unsupported
from isthmus.contracts.events import ErrorInfo
from isthmus.contracts.ids import RequestId
from isthmus.execution.inference.grammar.messages import Advance, Close, Masks, Open, Refused
from isthmus.execution.inference.grammar.sessions import (
    MAX_OPENING_DEATHS,
    MAX_STEPPING_DEATHS,
    Sessions,
)
from isthmus.execution.inference.grammar.settings import GrammarSettings

CONSTRAINT = Constraint(ConstraintKind.REGEX, "a+")
ALL = b"\xff\xff\xff\xff"


class Driver:
    """A `Sessions` with a process that is played by hand."""

    def __init__(self, most_open: int = 8) -> None:
        self.sessions = Sessions(GrammarSettings(compile_s=5.0, step_s=2.0), most_open)
        self.now = 100.0

    def open(self, name: str, output: Sequence[int] = (), **options: object) -> None:
        self.sessions.open(RequestId(name), CONSTRAINT, output, self.now, **options)  # type: ignore[arg-type]

    def ask(self) -> list[object]:
        return list(self.sessions.questions(self.now))

    def answer(self, number: int, drafts: Sequence[int] = (), masks: Sequence[bytes] = (), lost: bool = False) -> None:
        chosen = list(masks) or [ALL] * (len(drafts) + 1)
        self.sessions.take(Masks(number, list(drafts), chosen, lost), self.now)

    def start(self, *names: str, **options: object) -> None:
        """Open and answer each."""
        for name in names:
            self.open(name, **options)
            (question,) = self.ask()
            assert isinstance(question, Open)
            self.answer(question.session)
            assert self.sessions.ready(RequestId(name))

    def advance(self, name: str, *tokens: int) -> None:
        self.sessions.advance(RequestId(name), list(tokens), [], self.now)

    def failed(self) -> dict[str, str]:
        return {name: str(error) for name, error in self.sessions.failures()}


def test_one_constraint_is_compiled_at_a_time_and_steps_do_not_wait_for_it() -> None:
    driver = Driver()
    driver.start("a")
    driver.open("b")
    driver.open("c")
    (first,) = driver.ask()
    assert isinstance(first, Open)
    assert driver.ask() == []
    driver.advance("a", 7)
    (step,) = driver.ask()
    assert isinstance(step, Advance)
    assert [one.token_ids for one in step.steps] == [[7]]
    assert not driver.sessions.ready(RequestId("a"))
    driver.answer(step.steps[0].session)
    assert driver.sessions.ready(RequestId("a"))
    driver.answer(first.session)
    (second,) = driver.ask()
    assert isinstance(second, Open)
    assert second.session != first.session


def test_steps_of_one_time_go_in_one_frame_and_wait_for_the_one_before() -> None:
    driver = Driver()
    driver.start("a", "b", "c")
    driver.advance("a", 1)
    driver.advance("b", 2)
    (frame,) = driver.ask()
    assert isinstance(frame, Advance)
    assert [one.token_ids for one in frame.steps] == [[1], [2]]
    driver.advance("c", 3)
    assert driver.ask() == []
    driver.answer(frame.steps[0].session)
    assert driver.ask() == []
    driver.answer(frame.steps[1].session)
    (later,) = driver.ask()
    assert isinstance(later, Advance)
    assert [one.token_ids for one in later.steps] == [[3]]


def test_a_slow_compilation_is_blamed_and_the_others_are_told_again() -> None:
    driver = Driver()
    driver.start("a", output=[4])
    driver.open("slow")
    driver.open("next")
    driver.ask()
    driver.now += 4.9
    assert not driver.sessions.overdue(driver.now)
    driver.now += 0.2
    assert driver.sessions.overdue(driver.now)
    driver.sessions.lost(driver.now)
    assert driver.failed() == {"slow": "the grammar took too long: over 5 s, the limit"}
    assert driver.sessions.ready(RequestId("a")), "masks that are here stay good"
    (question,) = driver.ask()
    assert isinstance(question, Open)
    assert question.output_ids == []
    driver.answer(question.session)
    driver.advance("a", 5, 6)
    (again,) = driver.ask()
    assert isinstance(again, Open), "the new process does not know it"
    assert again.output_ids == [4, 5, 6]
    assert driver.sessions.counters.grammar_restarts == 1


def test_who_makes_the_process_slow_in_a_step_is_found_alone() -> None:
    driver = Driver()
    driver.start("good", "bad")
    driver.advance("good", 1)
    driver.advance("bad", 2)
    driver.ask()
    driver.now += 2.0
    assert driver.sessions.overdue(driver.now)
    driver.sessions.lost(driver.now)
    assert driver.failed() == {}
    (first,) = driver.ask()
    assert isinstance(first, Open)
    driver.answer(first.session)
    (second,) = driver.ask()
    assert isinstance(second, Open)
    assert second.output_ids == [2]
    driver.now += 5.0
    driver.sessions.lost(driver.now)
    assert set(driver.failed()) == {"bad"}
    assert driver.sessions.ready(RequestId("good"))


def test_a_process_that_dies_twice_over_one_constraint_blames_it() -> None:
    driver = Driver()
    driver.open("bad")
    for death in range(MAX_OPENING_DEATHS):
        assert driver.failed() == {}, death
        assert isinstance(driver.ask()[0], Open)
        driver.sessions.lost(driver.now)
    assert set(driver.failed()) == {"bad"}
    assert driver.ask() == []


def test_a_session_that_takes_the_process_along_again_and_again_ends() -> None:
    driver = Driver()
    driver.start("bad")
    for death in range(MAX_STEPPING_DEATHS + 1):
        assert driver.failed() == {}, death
        driver.advance("bad", 1)
        assert isinstance(driver.ask()[0], Advance)
        driver.sessions.lost(driver.now)
        if death < MAX_STEPPING_DEATHS:
            (again,) = driver.ask()
            assert isinstance(again, Open)
            driver.answer(again.session)
    assert set(driver.failed()) == {"bad"}


def test_what_ends_unanswered_is_closed_when_it_is_answered() -> None:
    driver = Driver()
    driver.start("a")
    driver.open("b")
    (opening,) = driver.ask()
    assert isinstance(opening, Open)
    driver.advance("a", 1)
    (step,) = driver.ask()
    assert isinstance(step, Advance)
    driver.sessions.close(RequestId("a"))
    driver.sessions.close(RequestId("b"))
    assert driver.ask() == []
    driver.answer(step.steps[0].session)
    driver.answer(opening.session)
    (closed,) = driver.ask()
    assert isinstance(closed, Close)
    assert sorted(closed.sessions) == sorted([step.steps[0].session, opening.session])
    assert not driver.sessions.waiting


def test_at_most_so_many_sessions_are_open() -> None:
    driver = Driver(most_open=2)
    driver.start("a", "b")
    driver.open("c")
    assert driver.ask() == []
    driver.sessions.close(RequestId("a"))
    closed, opened = driver.ask()
    assert isinstance(closed, Close)
    assert isinstance(opened, Open)


def test_banned_tokens_leave_the_masks_and_an_empty_mask_ends_the_request() -> None:
    driver = Driver()
    driver.open("a", banned=(3, 9, 4000), banned_until=2, limit=4)
    (question,) = driver.ask()
    assert isinstance(question, Open)
    only_three = b"\x08\x00\x00\x00"
    driver.answer(question.session, [1, 2, 5], [ALL, only_three, ALL, ALL])
    drafts, masks = driver.sessions.part(RequestId("a"), 4)
    assert drafts == []
    assert masks == [b"\xf7\xfd\xff\xff"]
    driver.advance("a", 1)
    (step,) = driver.ask()
    assert isinstance(step, Advance)
    driver.answer(step.steps[0].session, [], [only_three])
    (failure,) = driver.sessions.failures()
    assert isinstance(failure[1], InvalidInput)
    assert failure[1].field == "min_tokens"


def test_bans_end_with_min_tokens() -> None:
    driver = Driver()
    driver.open("a", [7, 7], banned=(3,), banned_until=2)
    driver.answer(driver.ask()[0].session, [1], [b"\x08\0\0\0", b"\x08\0\0\0"])  # type: ignore[attr-defined]
    assert driver.sessions.part(RequestId("a"), 1) == ([1], [b"\x08\0\0\0"] * 2)
    assert driver.sessions.part(RequestId("a"), 0) == ([], [b"\x08\0\0\0"])


def test_a_session_lost_to_a_look_ahead_is_opened_anew() -> None:
    driver = Driver()
    driver.start("a")
    driver.advance("a", 1)
    (step,) = driver.ask()
    assert isinstance(step, Advance)
    driver.answer(step.steps[0].session, [2], lost=True)
    assert driver.sessions.part(RequestId("a"), 1)[0] == [2]
    driver.advance("a", 2)
    (again,) = driver.ask()
    assert isinstance(again, Open)
    assert again.output_ids == [1, 2]
    assert driver.sessions.counters.grammar_restarts == 0


def test_a_refusal_ends_its_request_only() -> None:
    driver = Driver()
    driver.start("a")
    driver.open("b")
    (question,) = driver.ask()
    assert isinstance(question, Open)
    driver.sessions.refuse(Refused(question.session, ErrorInfo("unsupported", "no", "constraint")), driver.now)
    (failure,) = driver.sessions.failures()
    assert failure[0] == "b"
    assert isinstance(failure[1], Unsupported)
    assert driver.sessions.ready(RequestId("a"))


def test_an_answer_to_nothing_breaks_the_protocol() -> None:
    driver = Driver()
    driver.start("a")
    with pytest.raises(EngineFailed):
        driver.answer(1)


def test_without_a_process_everybody_who_waits_fails() -> None:
    driver = Driver()
    driver.start("ready", "due")
    driver.advance("due", 1)
    driver.open("queued")
    driver.sessions.fail_all(EngineFailed("none"))
    assert set(driver.failed()) == {"due", "queued"}
    assert driver.sessions.ready(RequestId("ready"))
