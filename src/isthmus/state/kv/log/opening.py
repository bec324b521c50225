"""Opening a log: what it consists of, put together."""

import errno
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass

from isthmus.contracts.clock import Clock, Entropy
from isthmus.contracts.errors import DiskFailed
from isthmus.state.kv.arena.crew import Crew
from isthmus.state.kv.index.table import FingerprintTable
from isthmus.state.kv.io.buffers import AlignedBuffers
from isthmus.state.kv.io.disk import Disk
from isthmus.state.kv.log.admission import Admission
from isthmus.state.kv.log.audit import Auditor
from isthmus.state.kv.log.commit import Committer
from isthmus.state.kv.log.control import Control
from isthmus.state.kv.log.directory import Directories
from isthmus.state.kv.log.drive import Driver, Stepped, Threads
from isthmus.state.kv.log.evict import Evictor
from isthmus.state.kv.log.forgetting import Forgetting
from isthmus.state.kv.log.format import Superblock
from isthmus.state.kv.log.housekeeping import Housekeeper
from isthmus.state.kv.log.intake import Intake
from isthmus.state.kv.log.ledger import Ledger
from isthmus.state.kv.log.log import SegmentLog
from isthmus.state.kv.log.lookup import Lookup
from isthmus.state.kv.log.reader import BatchReader, ReaderPool
from isthmus.state.kv.log.recovery import Recovery, open_superblock, read_erasures
from isthmus.state.kv.log.scrub import Scrubber
from isthmus.state.kv.log.segments import SegmentTable, most_records
from isthmus.state.kv.log.settings import LogSettings
from isthmus.state.kv.log.staging import Staging
from isthmus.state.kv.log.writer import Own, Writer, buffers_for

_CONTROL_BYTES = 1 << 20
_AHEAD_PART = 16
_MOST_AHEAD = 8


def open_log(
    disk: Disk,
    settings: LogSettings,
    clock: Clock,
    entropy: Entropy,
    *,
    pass_time: Callable[[], None] | None = None,
    crew: Crew | None = None,
) -> SegmentLog:
    """Open the log on a disk, or make one on a disk that begins with zeros. The disk stays the caller's to close.

    `pass_time`: no threads are started; whoever waits makes the log's steps (so does `SegmentLog.step`), and calls this
    when there is nothing to do but to let time pass. `crew`, the caller's to close afterwards, helps with large copies.

    Raises `StoreCorrupt`, `StoreFormat`, `DiskFailed`, and `InvalidInput` for settings that do not fit the disk.
    """
    with ExitStack() as stack:
        control = Control(disk, clock, buffer_bytes=min(_CONTROL_BYTES, settings.extent_bytes))
        stack.callback(control.close)
        superblock = open_superblock(disk, control, settings, clock, entropy)
        buffers = buffers_for(settings)
        stack.callback(buffers.close)
        own = Own(_taken(buffers), _taken(buffers))
        seq, erasures = read_erasures(control, superblock)
        ledger = _empty(superblock, Staging(buffers, crew), settings)
        ledger.erasures, ledger.erasures_stored = erasures, erasures.epoch
        recovery = Recovery(ledger, disk, control, superblock)
        recovery.run(clock.wall())
        disk.sync()
        ledger.durable = ledger.sequence
        channel = disk.channel(settings.queue_depth, buffers)
        stack.callback(channel.close)
        writer = Writer(ledger, channel, own, settings=settings, uuid=superblock.uuid, clock=clock)
        for lane, segment in recovery.adopted.items():
            writer.adopt(lane, segment)
        parts = _Parts(disk, settings, clock, control, writer, superblock, seq, crew)
        return _assembled(ledger, parts, pass_time, stack)


@dataclass(frozen=True, slots=True)
class _Parts:
    """What was opened so far."""

    disk: Disk
    settings: LogSettings
    clock: Clock
    control: Control
    writer: Writer
    superblock: Superblock
    erasure_seq: int
    crew: Crew | None


def _taken(buffers: AlignedBuffers) -> memoryview:
    view = buffers.take()
    if view is None:
        raise DiskFailed("mmap", errno.ENOMEM)
    return view


def _empty(superblock: Superblock, staging: Staging, settings: LogSettings) -> Ledger:
    geometry = superblock.geometry
    segments = SegmentTable(geometry.segments, geometry.segment_bytes, most_records(settings.extent_bytes))
    return Ledger(geometry, segments, staging, FingerprintTable(), superblock.seed)


def _assembled(ledger: Ledger, parts: _Parts, pass_time: Callable[[], None] | None, opened: ExitStack) -> SegmentLog:
    disk, settings, clock, control = parts.disk, parts.settings, parts.clock, parts.control
    committer = Committer(disk, ledger, settings)
    directories = Directories(ledger, control)
    admission = Admission(settings.wear_bytes_day, ledger.geometry.segment_bytes, clock.monotonic())
    ahead = min(_MOST_AHEAD, max(1, ledger.geometry.segments // _AHEAD_PART))
    evictor = Evictor(ledger, control, directories, admission, ahead=ahead)
    scrubber = Scrubber(ledger, control, committer, directories)
    forgetting = Forgetting(ledger, control, committer, directories, superblock=parts.superblock, seq=parts.erasure_seq)
    readers = ReaderPool(lambda: BatchReader(disk, settings.read_depth, settings.read_bytes), settings.readers)
    opened.callback(readers.close)
    housekeeper = Housekeeper(ledger, evictor, scrubber, forgetting, readers)
    driver: Driver
    if pass_time is None:
        driver = Threads(ledger, parts.writer, committer, housekeeper, clock=clock)
    else:
        driver = Stepped(parts.writer, committer, housekeeper, clock=clock, pass_time=pass_time)
    return SegmentLog(
        ledger,
        driver,
        clock=clock,
        intake=Intake(ledger, driver, admission, tenant_bytes=settings.tenant_bytes, clock=clock, crew=parts.crew),
        lookup=Lookup(ledger, readers, clock=clock),
        auditor=Auditor(ledger, control, directories),
        evictor=evictor,
        forgetting=forgetting,
        opened=opened.pop_all(),
    )
