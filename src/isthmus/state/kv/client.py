"""The block store behind a daemon's socket.

Promises, besides those of `contracts.blocks.BlockStore`

- no call raises because of the daemon, and none outlasts its limit: without a daemon everything is `UNAVAILABLE`, and
what takes too long is `LATE`. A daemon that comes back is found again, by attempts that are ever further apart;
- bytes read are hashed on the caller's own copy, against digests that came over the socket, and count only if the
generation of their memory is still the same after the copy and the lease has not ended;
- a daemon that started anew shares new memory: leases of the old one are `EXPIRED`.
"""

import os
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from types import TracebackType

import msgspec

from isthmus.contracts.blocks import (
    DIGEST_BYTES,
    MAX_BATCH,
    Hint,
    Lease,
    Match,
    Outcome,
    Put,
    Reason,
    StoreStats,
    Tier,
    Want,
)
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv import wire
from isthmus.state.kv.arena.copying import copy_digests, copy_verified, digests_slice, flat
from isthmus.state.kv.arena.crew import Crew, crew_for
from isthmus.state.kv.lanepool import ClientSettings, LanePool, inside
from isthmus.state.kv.lanes import Mapping
from isthmus.state.kv.parts import capped, check_batch

_ALIGN = 64


class RemoteLease:
    """Implements `Lease`. `deadline` is on the client's clock, counted from before the lease was asked for."""

    __slots__ = ("_store", "deadline", "ended", "given", "granted", "mapping", "number", "places", "seen")

    def __init__(
        self,
        store: "RemoteStore",
        keys: Sequence[BlockKey],
        answer: wire.Leased | None,
        mapping: Mapping | None,
        deadline: float,
    ) -> None:
        self._store = store
        self.number = answer.lease if answer is not None else 0
        self.given: Sequence[wire.Given] = answer.given if answer is not None else ()
        self.granted: Sequence[Tier | None] = [one.tier for one in self.given] or [None] * len(keys)
        self.places = {key: index for index, key in enumerate(keys)}
        self.mapping = mapping
        self.deadline = deadline
        self.ended = answer is None
        self.seen: Counter[tuple[Tier | None, Reason]] = Counter()

    def release(self) -> None:
        """See `Lease`."""
        self._store.release(self)

    def __enter__(self) -> "RemoteLease":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


class RemoteStore:
    """Implements `BlockStore`. Made by `open_client`. Safe to call from several threads."""

    def __init__(self, pool: LanePool, clock: Clock, settings: ClientSettings, crew: Crew) -> None:
        """`crew`, which helps with copies, is closed with it."""
        self._pool = pool
        self._crew = crew
        self._clock = clock
        self._settings = settings
        self._known = StoreStats()

    # BlockStore

    def match(self, keys: Sequence[BlockKey]) -> list[Match]:
        """See `BlockStore`. Without a daemon nothing is found."""
        check_batch(len(keys), MAX_BATCH, "keys")
        answer = self._pool.ask(lambda number: wire.MatchAsk(number, list(keys)), wire.Matches, self._settings.call_s)
        if isinstance(answer, Reason) or len(answer.found) != len(keys):
            return [Match(None)] * len(keys)
        return [Match(one.tier, one.record_bytes) for one in answer.found]

    def lease(self, keys: Sequence[BlockKey], seconds: float) -> Lease:
        """See `BlockStore`. Without a daemon nothing is leased."""
        check_batch(len(keys), MAX_BATCH, "keys")
        start = self._clock.monotonic()
        with self._pool.borrowed(start + self._settings.call_s) as lane:
            answer = lane.ask(lambda number: wire.LeaseAsk(number, list(keys), wire.seconds(seconds)), wire.Leased)
            if isinstance(answer, Reason) or len(answer.given) != len(keys):
                return RemoteLease(self, keys, None, None, start)
            return RemoteLease(self, keys, answer, lane.mapping, start + answer.seconds)

    def release(self, lease: RemoteLease) -> None:
        """End a lease; nothing when it has ended."""
        if lease.ended:
            return
        lease.ended = True
        if lease.mapping is not self._pool.mapping:
            return  # of a daemon that is gone: the next one gives the same numbers to other leases
        seen = [wire.Seen(tier, reason, count) for (tier, reason), count in lease.seen.items()]
        self._pool.post(wire.Release([lease.number], seen))

    def read(self, lease: Lease, wants: Sequence[Want], timeout_s: float) -> list[Outcome]:
        """See `BlockStore`."""
        check_batch(len(wants), MAX_BATCH, "wants")
        if not isinstance(lease, RemoteLease):
            raise InvalidInput("the lease is not one of this store", "lease")
        deadline = self._clock.monotonic() + wire.seconds(timeout_s)

        def above(want: Want) -> Outcome | None:
            late = self._clock.monotonic() >= deadline
            return Outcome(Reason.LATE) if late else self._from_arena(lease, want)

        outcomes = self._crew.together(above, wants, sum(want.into.nbytes for want in wants))
        lease.seen.update((one.tier, one.reason) for one in outcomes if one is not None)
        left = [index for index, one in enumerate(outcomes) if one is None]
        for index, outcome in zip(left, self._from_area(lease, [wants[at] for at in left], deadline), strict=True):
            outcomes[index] = outcome
        return [one for one in outcomes if one is not None]

    def write(self, puts: Sequence[Put], timeout_s: float) -> list[Outcome]:
        """See `BlockStore`. A record larger than the window is `TOO_LARGE`."""
        check_batch(len(puts), MAX_BATCH, "puts")
        deadline = self._clock.monotonic() + wire.seconds(timeout_s)
        outcomes: list[Outcome] = []
        sizes = [(put.shape.record_bytes, put.shape.chunks) for put in puts]
        for first, last in _rounds(sizes, self._settings.window_bytes):
            outcomes += self._write_round(puts[first:last], deadline)
        return outcomes

    def hint(self, hints: Sequence[Hint]) -> None:
        """See `BlockStore`."""
        kept, dropped = capped(hints)
        self._pool.counts.add("hint", None, "dropped", dropped)
        if kept:
            parts = [wire.HintPart(one.kind, list(one.keys), wire.seconds(one.seconds)) for one in kept]
            self._pool.post(wire.HintAsk(parts))

    def flush(self, timeout_s: float) -> int:
        """See `BlockStore`. 0 when the daemon did not answer."""
        within = inside(timeout_s)
        answer = self._pool.ask(lambda number: wire.FlushAsk(number, within), wire.Durable, timeout_s)
        return 0 if isinstance(answer, Reason) else answer.sequence

    def stats(self) -> StoreStats:
        """See `BlockStore`. Besides the daemon's counts there are the client's: `client_none_*`."""
        answer = self._pool.ask(wire.StatsAsk, wire.Stats, self._settings.call_s)
        if not isinstance(answer, Reason):
            self._known = answer.stats
        return msgspec.structs.replace(self._known, counts={**self._known.counts, **self._pool.counts.snapshot()})

    def close(self) -> None:
        """Leave. Calls under way end as `UNAVAILABLE`; so do those that follow."""
        self._pool.close()
        self._crew.close()

    # Reading

    def _from_arena(self, lease: RemoteLease, want: Want) -> Outcome | None:
        """Read from the shared memory; None when it has to be asked for."""
        index = lease.places.get(want.key)
        if self._over(lease):
            return Outcome(Reason.EXPIRED if lease.number else Reason.UNAVAILABLE)
        given = lease.given[index] if index is not None else None
        if given is None or given.tier is None:
            return Outcome(Reason.ABSENT)
        place, mapping = given.place, lease.mapping
        if place is None or mapping is None:
            return None
        if place.form != wire.Form.of(want.shape):
            return Outcome(Reason.ABSENT)
        size = want.shape.chunk_bytes
        start = place.offset + want.first_chunk * size
        source = mapping.regions[place.region][start : start + want.count * size]
        digests = digests_slice(place.digests, want.first_chunk, want.count)
        good = copy_verified(source, flat(want.into), size, digests, self._crew)
        if self._over(lease):
            return Outcome(Reason.EXPIRED, Tier.DRAM)
        if good and mapping.generations[place.page] == place.generation:
            return Outcome(Reason.HIT, Tier.DRAM)
        return None

    def _over(self, lease: RemoteLease) -> bool:
        remapped = lease.mapping is not self._pool.mapping
        return lease.ended or remapped or self._clock.monotonic() >= lease.deadline

    def _from_area(self, lease: RemoteLease, wants: Sequence[Want], deadline: float) -> list[Outcome]:
        """Have the daemon read into the area, and copy from there. Long wants are cut at their chunks."""
        pieces: list[tuple[int, Want]] = []
        outcomes = [Outcome(Reason.HIT)] * len(wants)
        for index, want in enumerate(wants):
            parts = list(_cut(want, self._settings.area_bytes))
            pieces += [(index, part) for part in parts]
            if not parts:
                outcomes[index] = Outcome(Reason.TOO_LARGE)
        sizes = [(part.into.nbytes, part.count) for _, part in pieces]
        for first, last in _rounds(sizes, self._settings.area_bytes):
            found = self._read_round(lease, [part for _, part in pieces[first:last]], deadline)
            for (index, _), outcome in zip(pieces[first:last], found, strict=True):
                if outcomes[index].reason is Reason.HIT:
                    outcomes[index] = outcome
        return outcomes

    def _read_round(self, lease: RemoteLease, wants: Sequence[Want], deadline: float) -> list[Outcome]:
        with self._pool.borrowed(deadline) as lane:
            offset, parts = 0, []
            for want in wants:
                form = wire.Form.of(want.shape)
                parts.append(wire.WantPart(want.key, form, want.first_chunk, want.count, offset))
                offset += -(-want.into.nbytes // _ALIGN) * _ALIGN
            within = inside(deadline - self._clock.monotonic())
            answer = lane.ask(lambda number: wire.ReadAsk(number, lease.number, parts, within), wire.Results)
            if isinstance(answer, Reason) or len(answer.results) != len(wants):
                return [Outcome(answer if isinstance(answer, Reason) else Reason.UNAVAILABLE)] * len(wants)
            return [
                self._copied(lease, lane.area, part.offset, want, result)
                for part, want, result in zip(parts, wants, answer.results, strict=True)
            ]

    def _copied(self, lease: RemoteLease, area: memoryview, offset: int, want: Want, result: wire.Result) -> Outcome:
        if result.reason is not Reason.HIT:
            return Outcome(result.reason, result.tier)
        source = area[offset : offset + want.into.nbytes]
        good = copy_verified(source, flat(want.into), want.shape.chunk_bytes, result.digests, self._crew)
        if self._over(lease):
            return Outcome(Reason.EXPIRED, result.tier)
        return Outcome(Reason.HIT if good else Reason.CORRUPT, result.tier)

    # Writing

    def _write_round(self, puts: Sequence[Put], deadline: float) -> list[Outcome]:
        if puts[0].shape.record_bytes > self._settings.window_bytes:
            return [Outcome(Reason.TOO_LARGE)] * len(puts)
        with self._pool.borrowed(deadline) as lane:
            if not lane.connected:
                return [Outcome(Reason.UNAVAILABLE)] * len(puts)
            sizes = [-(-put.shape.record_bytes // _ALIGN) * _ALIGN for put in puts]
            places = zip(puts, accumulate([0, *sizes[:-1]]), strict=True)
            parts = self._crew.together(lambda place: self._shown(*place, lane.window), list(places), sum(sizes))
            within = inside(deadline - self._clock.monotonic())
            answer = lane.ask(lambda number: wire.WriteAsk(number, parts, within), wire.Results)
            if isinstance(answer, Reason) or len(answer.results) != len(puts):
                return [Outcome(answer if isinstance(answer, Reason) else Reason.UNAVAILABLE)] * len(puts)
            return [Outcome(one.reason, one.tier, one.sequence) for one in answer.results]

    def _shown(self, put: Put, offset: int, window: memoryview) -> wire.PutPart:
        """Copy a payload to its place in the window; what the daemon is told of it."""
        target = window[offset : offset + put.shape.record_bytes]
        digests = copy_digests(flat(put.payload), target, put.shape.chunk_bytes, self._crew)
        ids = put.owner.namespace_id, put.owner.session_id
        return wire.PutPart(put.key, put.parent, *ids, wire.Form.of(put.shape), put.lifetime, digests, offset)


def _rounds(sizes: Sequence[tuple[int, int]], room: int) -> list[tuple[int, int]]:
    """Ranges of a batch that go together: at most `room` bytes and a frame's digests; what is larger goes alone.

    `sizes`: (bytes, chunks) of each.
    """
    rounds: list[tuple[int, int]] = []
    first, used, chunks = 0, 0, 0
    for index, (size, count) in enumerate(sizes):
        room_taken = -(-size // _ALIGN) * _ALIGN
        full = used + room_taken > room or (chunks + count) * DIGEST_BYTES > wire.DETAIL_BYTES
        if index > first and full:
            rounds.append((first, index))
            first, used, chunks = index, 0, 0
        used += room_taken
        chunks += count
    if first < len(sizes):
        rounds.append((first, len(sizes)))
    return rounds


def _cut(want: Want, room: int) -> list[Want]:
    """`want` in pieces of whole chunks that fit into the area; empty when not even one does."""
    size = want.shape.chunk_bytes
    most = room // size
    into = flat(want.into)
    return [
        Want(want.key, want.shape, into[at * size : (at + count) * size], want.first_chunk + at, count)
        for at in (range(0, want.count, most) if most else ())
        for count in (min(most, want.count - at),)
    ]


def open_client(path: Path, clock: Clock, settings: ClientSettings | None = None) -> RemoteStore:
    """A store behind the daemon's socket at `path`. Connects when it is first used, so it never fails for that.

    Raises `ConfigInvalid` when the memory for its lanes is not to be had.
    """
    chosen = settings or ClientSettings()
    return RemoteStore(LanePool(path, clock, chosen), clock, chosen, crew_for(len(os.sched_getaffinity(0))))
