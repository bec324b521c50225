"""Nothing waits longer than it was told to, whatever the disk does; threads, and a disk of the machine's own."""

import errno
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.support.logs import EXTENT, NAMESPACES, World, key_of, payload_of, read, record, small_settings
from tests.support.sim_disk import SimDisk

from isthmus.contracts.blocks import Owner, Reason, Want
from isthmus.contracts.clock import ManualClock, SystemClock, SystemEntropy
from isthmus.contracts.errors import DiskFailed
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv.io.disk import Disk, open_disk
from isthmus.state.kv.log.control import IO_LIMIT_S, Control
from isthmus.state.kv.log.erasure import Scope
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.log.opening import open_log
from isthmus.state.kv.log.records import LogRead, LogRecord
from isthmus.state.kv.log.segments import State


def test_a_disk_that_never_answers_makes_nobody_wait_longer_than_told() -> None:
    world = World()
    one = record(key_of(1), 9000)
    world.put(one)
    world.settle()
    where = world.log.locate([one.key])[0]
    assert where is not None
    world.disk.stall = world.clock.advance
    begin = world.clock.monotonic()
    into = memoryview(bytearray(9000))
    want = Want(BlockKey(one.key), one.shape, into)
    assert world.log.read([LogRead(where, want)], 0.5)[0].reason is Reason.LATE
    assert world.clock.monotonic() - begin <= 0.6
    begin = world.clock.monotonic()
    outcomes = world.log.append([record(key_of(number), 9000) for number in range(2, 40)], 0.5)
    assert {outcome.reason for outcome in outcomes} == {Reason.STORED, Reason.FULL}
    # Each record that has to wait waits till the same moment.
    assert world.clock.monotonic() - begin <= 0.6
    begin = world.clock.monotonic()
    assert world.log.flush(0.5) == 1
    assert world.clock.monotonic() - begin <= 0.6
    begin = world.clock.monotonic()
    with pytest.raises(DiskFailed):
        world.log.forget(Scope.of(NAMESPACES[0]))
    assert world.clock.monotonic() - begin <= IO_LIMIT_S + 1.0
    assert world.log.stats().pins == 0
    world.disk.stall = None


def test_a_disk_that_refuses_another_channel_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    disk, clock = SimDisk(1 << 20), ManualClock()
    control = Control(disk, clock)
    control.write(4096, bytes(range(256)) * 16)
    disk.stall = clock.advance
    with pytest.raises(DiskFailed):
        control.read(4096, 512)
    disk.stall, plain = None, disk.channel
    monkeypatch.setattr(disk, "channel", refuse)
    for _ in range(2):
        with pytest.raises(DiskFailed, match="io_uring_setup"):
            control.read(4096, 512)
    monkeypatch.setattr(disk, "channel", plain)
    assert control.read(4096, 256) == bytes(range(256))
    control.close()
    control.close()


def refuse(*_: object, **__: object) -> None:
    raise DiskFailed("io_uring_setup", errno.ENOMEM)


def test_writes_that_cannot_be_heard_of_are_not_asked_for_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    world = World()
    world.put(record(key_of(1)))
    world.settle()
    writer, waits = world.log._driver._writer, 0  # type: ignore[attr-defined]
    waiting = writer._channel.wait

    def fail(*_: object) -> None:
        nonlocal waits
        waits += 1
        raise DiskFailed("io_uring_enter", errno.EBADF)

    monkeypatch.setattr(writer._channel, "wait", fail)
    sequence = world.put(record(key_of(2), 9000))[0].sequence
    assert world.log.flush(1.0) < sequence
    stats = world.log.stats()
    assert "io_uring_enter" in stats.read_only
    assert writer.in_flight, "a wait that failed once may not do so again"
    world.run(1.0)
    assert stats.counts["write_errors"] == 1
    assert waits
    assert writer._channel.in_flight
    assert not writer.in_flight, "who ends does not wait for them"
    assert world.put(record(key_of(3)))[0].reason is Reason.IO_ERROR
    monkeypatch.setattr(writer._channel, "wait", waiting)
    world.run(0.1)
    assert read(world.log, record(key_of(2), 9000))[0].reason is Reason.HIT


def test_after_a_stall_it_goes_on() -> None:
    world = World()
    first = [record(key_of(number), 3000) for number in range(10)]
    world.put(*first)
    world.settle()
    world.disk.stall = world.clock.advance
    assert read(world.log, first[0])[0].reason is Reason.LATE
    world.put(*[record(key_of(number), 3000) for number in range(10, 14)], timeout_s=0.1)
    world.disk.stall = None
    world.run(1.0)
    assert world.log.durable == 14
    for kept in world.kept.values():
        assert read(world.log, kept.record)[1] == bytes(kept.record.payload)


def test_a_record_is_written_again_elsewhere_when_a_write_fails() -> None:
    world = World()
    world.put(record(key_of(0)))
    world.settle()
    world.disk.fail("write", 1)
    one = record(key_of(1))
    world.put(one)
    world.settle()
    stats = world.log.stats()
    assert (stats.counts["write_errors"], stats.segments["retired"], stats.counts["extents_rewritten"]) == (1, 1, 1)
    assert read(world.log, one)[1] == bytes(one.payload)
    assert read(world.log, record(key_of(0)))[0].reason is Reason.HIT


def test_a_sync_is_not_tried_again_and_its_segment_is_left_alone() -> None:
    world = World()
    world.put(record(key_of(0)))
    world.settle()
    where = world.log.locate([key_of(0)])[0]
    assert where is not None
    one = record(key_of(1))
    world.put(one)
    world.run(0.1)
    syncs = world.disk.calls["sync"]
    world.disk.fail("sync", 1)
    while "sync_failures" not in world.log.stats().counts:
        if not world.log.step():
            world.clock.advance(0.01)
    assert world.disk.calls["sync"] == syncs + 1
    stats = world.log.stats()
    assert stats.durable == 1
    assert (stats.counts["sync_failures"], stats.segments["retired"]) == (1, 1)
    assert world.log.locate([one.key]) == [None]
    world.settle()
    assert read(world.log, one)[1] == bytes(one.payload)
    again = world.log.locate([one.key])[0]
    assert again is not None
    assert again.segment != where.segment
    # What was durable before is still read where it was.
    assert read(world.log, record(key_of(0)))[0].reason is Reason.HIT
    assert world.log._ledger.segments[where.segment].state is State.RETIRED


def test_with_too_few_segments_left_the_log_says_so_and_rests() -> None:
    """Two: one has survivors, one is kept free for them. They were moved round for ever, and nothing was written."""
    world = World(segments=8)
    number = 0
    segments = world.log._ledger.segments
    while segments.count(State.RETIRED) < 6:
        number += 1
        world.put(record(key_of(number), 3000))
        world.settle()
        with world.log._changed:
            for segment in segments.having(State.OPEN)[: 6 - segments.count(State.RETIRED)]:
                world.log._ledger.retire(segment)
    while not world.log.stats().read_only:
        number += 1
        if world.log.append([record(key_of(number), 3000)], 0.05)[0].reason is not Reason.STORED:
            world.run(0.2)
        assert number < 500, "it is to say that it cannot go on"
    assert "no segment is left" in world.log.stats().read_only
    world.run(1.0)
    written = world.log.stats().written_bytes
    world.run(5.0)
    assert world.log.stats().written_bytes == written


def test_a_disk_that_fails_for_good_ends_in_a_log_that_is_read_only() -> None:
    world = World()
    world.put(record(key_of(0)))
    world.settle()
    world.disk.fail_always("write", errno.ENOSPC)
    for number in range(1, 30):
        world.log.append([record(key_of(number), 9000)], 0.05)
    world.run(1.0)
    stats = world.log.stats()
    assert stats.read_only
    assert stats.durable == 1
    assert stats.counts["records_lost"] > 0
    assert world.log.append([record(key_of(99))], 1.0)[0].reason is Reason.IO_ERROR
    assert world.log.flush(5.0) == 1
    assert read(world.log, record(key_of(0)))[0].reason is Reason.HIT
    for number in range(1, 30):
        assert read(world.log, record(key_of(number), 9000))[0].reason is Reason.ABSENT
    world.disk.heal()
    again = world.reopened()
    assert read(again, record(key_of(0)))[0].reason is Reason.HIT
    assert again.append([record(key_of(99))], 1.0)[0].reason is Reason.STORED


@pytest.fixture(params=["threads", "io_uring"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    from isthmus.contracts.errors import StoreUnavailable

    settings = small_settings(16)
    try:
        made = open_disk(tmp_path / "log", capacity=settings.capacity, create=True, backend=request.param)
    except StoreUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def hit(log: SegmentLog, one: LogRecord) -> bool:
    outcome, data = read(log, one)
    assert outcome.reason in {Reason.HIT, Reason.ABSENT}
    return outcome.reason is Reason.HIT and data == payload_of(one.key, one.shape.record_bytes)


def test_several_threads_on_a_real_disk(disk: Disk) -> None:
    settings = small_settings(16)
    log = open_log(disk, settings, SystemClock(), SystemEntropy())
    gone = Owner(NAMESPACES[1])
    problems: list[str] = []
    hits = [0, 0, 0]

    def work(me: int) -> None:
        mine: list[LogRecord] = []
        for number in range(60):
            owner = gone if number % 5 == 0 else None
            one = record(key_of(me * 1000 + number), 500 + 40 * number, owner=owner)
            outcome = log.append([one], 10.0)[0]
            if outcome.reason is not Reason.STORED:
                problems.append(f"append: {outcome.reason}")
            if owner is None:
                mine.append(one)
            if number % 7 == 6:
                log.flush(10.0)
                hits[me] += sum(hit(log, kept) for kept in mine[-5:])
            if me == 0 and number % 20 == 19:
                log.forget(Scope.of(gone.namespace_id))

    threads = [threading.Thread(target=work, args=(me,)) for me in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert not problems
    assert min(hits) > 10
    assert log.flush(10.0) == log.sequence == 180
    log.forget(Scope.of(gone.namespace_id))
    log.check()
    before = {entry.key for entry in log.scan()}
    assert before
    log.close()
    again = open_log(disk, settings, SystemClock(), SystemEntropy())
    assert {entry.key for entry in again.scan()} >= before
    assert not any(entry.owner == gone for entry in again.scan())
    assert again.verify().corrupt == 0
    again.close()


def test_waiting_appends_are_served_when_memory_gets_free(disk: Disk) -> None:
    settings = small_settings(16, commit_s=0.05)
    log = open_log(disk, settings, SystemClock(), SystemEntropy())
    large = [record(key_of(number), EXTENT, chunks=3) for number in range(12)]
    outcomes: list[Reason] = []

    def work(part: list[LogRecord]) -> None:
        outcomes.extend(outcome.reason for outcome in log.append(part, 20.0))

    threads = [threading.Thread(target=work, args=(large[number::4],)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60.0)
    assert outcomes == [Reason.STORED] * 12
    log.close()
