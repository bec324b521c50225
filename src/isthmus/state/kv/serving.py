"""The daemon's end of one connection: handshake, requests, answers.

Promises: nothing of a peer is parsed before the kernel said that it runs as our user, nothing is shared with it before
its token was right; memory that it brings cannot change size under us; what it wrote is copied first and judged on our
copy; a peer that breaks the protocol, stops taking its answers or stops in the middle of a frame is dropped. It is
served by a thread of its own: whatever it does, nobody else waits for it.
"""

import hmac
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from isthmus.contracts.blocks import DIGEST_BYTES, Hint, Outcome, Owner, Put, Reason, Tier, Want
from isthmus.contracts.clock import Clock
from isthmus.contracts.errors import (
    DeadlineExceeded,
    InvalidInput,
    IsthmusError,
    StoreUnavailable,
    TooLarge,
    WireViolation,
)
from isthmus.contracts.keys import BlockKey
from isthmus.state.kv import wire
from isthmus.state.kv.arena.arena import Record
from isthmus.state.kv.arena.copying import digests_of
from isthmus.state.kv.arena.memory import map_read_only, map_writable
from isthmus.state.kv.connection import Closed, Connection, Frames, close_all
from isthmus.state.kv.holders import Holder, Holders
from isthmus.state.kv.settings import DaemonSettings
from isthmus.state.kv.store import Store

IDLE_S = 1.0
"""How often an idle connection looks whether the daemon is to end."""
_EMPTY = memoryview(b"")


@dataclass(frozen=True, slots=True)
class House:
    """What the connections of a daemon share. `tokens` by role."""

    store: Store
    settings: DaemonSettings
    clock: Clock
    tokens: Mapping[str, bytes]
    holders: Holders
    stopping: Callable[[], bool]


class Serving:
    """One connection. `run` is its thread's work; `drop` may be called from any."""

    def __init__(self, connection: Connection, house: House) -> None:
        self._connection = connection
        self._house = house
        self._role = ""
        self._holder: Holder | None = None
        self._window = self._area = _EMPTY

    def run(self) -> None:
        """Serve until the peer leaves, is dropped, or the daemon ends. Its leases end with its last connection."""
        counts = self._house.store.counts
        try:
            holder = self._handshake()
            if holder is not None:
                self._serve(holder)
        except Closed:
            pass  # a client may leave at any time
        except DeadlineExceeded:
            counts.add("client", None, "stalled")
        except WireViolation:
            counts.add("client", None, "violation")
        finally:
            self._connection.close()
            if self._holder is not None:
                self._house.holders.leave(self._holder, self)

    def drop(self) -> None:
        """End it now."""
        self._connection.shut()

    # The handshake

    def _handshake(self) -> Holder | None:
        settings, limit = self._house.settings, self._house.settings.handshake_s
        if self._connection.peer_uid != os.geteuid():
            self._house.store.counts.add("client", None, "foreign_user")
            return None
        hellos: Frames[wire.Hello] = Frames(wire.Hello, wire.HELLO_BYTES)
        hello = self._connection.receive(hellos, limit)
        refusal = self._refusal(hello)
        if refusal is not None:
            self._house.store.counts.add("client", None, "refused")
            self._connection.send(wire.Refused(0, StoreUnavailable.code, refusal), wire.ANSWER_BYTES, limit)
            return None
        self._role = hello.role
        holder = self._holder = self._house.holders.join(hello.session, self, self._house.clock.monotonic())
        store = self._house.store
        memory = store.arena.memory
        welcome = wire.Welcome(
            version=wire.VERSION,
            epoch=store.arena.epoch,
            session=holder.session,
            regions=[region.size for region in memory.regions],
            table_bytes=memory.table.size,
            lease_s=store.settings.lease_s,
            call_s=store.settings.call_s,
        )
        self._connection.send(welcome, wire.ANSWER_BYTES, limit)
        attaches: Frames[wire.Attach] = Frames(wire.Attach, wire.HELLO_BYTES)
        attach = self._connection.receive(attaches, limit)
        descriptors = self._connection.receive_descriptors(2, limit)
        try:
            if max(attach.window_bytes, attach.area_bytes) > settings.window_bytes:
                raise WireViolation(f"a window has at most {settings.window_bytes} bytes")
            self._window = map_read_only(descriptors[0], attach.window_bytes)
            self._area = map_writable(descriptors[1], attach.area_bytes)
        finally:
            close_all(descriptors)
        shared = [*(region.descriptor for region in memory.regions), memory.table.descriptor]
        self._connection.send_descriptors(shared, limit)
        return holder

    def _refusal(self, hello: wire.Hello) -> str | None:
        if hello.version != wire.VERSION:
            return f"this daemon speaks version {wire.VERSION} of the protocol, the client {hello.version}"
        expected = self._house.tokens.get(hello.role)
        # Compared also for a role that there is none of: how long a refusal takes says nothing.
        right = hmac.compare_digest(hello.token, expected or bytes(wire.TOKEN_BYTES))
        return None if right and expected is not None else "the token is not right for this role"

    # Requests

    def _serve(self, holder: Holder) -> None:
        requests: Frames[wire.Request] = Frames(wire.Request, wire.REQUEST_BYTES)
        while not self._house.stopping():
            if not self._connection.arrives(IDLE_S):
                continue
            request = self._connection.receive(requests, self._house.settings.frame_s)
            holder.heard_at = self._house.clock.monotonic()
            if isinstance(request, wire.Release):
                self._release(request, holder)
            elif isinstance(request, wire.HintAsk):
                hints = [Hint(one.kind, [BlockKey(key) for key in one.keys], one.seconds) for one in request.hints]
                self._house.store.hint(hints)
            else:
                answer = self._answered(request, holder)
                self._connection.send(answer, wire.ANSWER_BYTES, self._house.settings.frame_s)

    def _answered(self, request: "wire.Asked", holder: Holder) -> wire.Answer:
        try:
            return self._answer(request, holder)
        except WireViolation:
            raise
        except IsthmusError as error:
            return wire.Refused(request.number, error.code, str(error)[:1024])

    def _answer(self, request: "wire.Asked", holder: Holder) -> wire.Answer:
        store = self._house.store
        match request:
            case wire.MatchAsk():
                found = [wire.Found(one.tier, one.record_bytes) for one in store.match(_keys(request.keys))]
                return wire.Matches(request.number, found)
            case wire.LeaseAsk():
                return self._lease(request, holder)
            case wire.ReadAsk():
                return self._read(request, holder)
            case wire.WriteAsk():
                return self._write(request)
            case wire.FlushAsk():
                return wire.Durable(request.number, store.flush(request.timeout_s))
            case wire.StatsAsk():
                return wire.Stats(request.number, store.stats())
            case _:
                return self._administer(request)

    def _lease(self, request: wire.LeaseAsk, holder: Holder) -> wire.Leased:
        store = self._house.store
        lease = store.lease_for(holder.number, _keys(request.keys), request.seconds)
        room = wire.DETAIL_BYTES
        given = []
        for tier, pin in zip(lease.granted, lease.pins, strict=True):
            place = None
            if isinstance(pin, Record) and len(pin.digests) <= room:
                room -= len(pin.digests)
                region, offset = store.arena.place(pin)
                form = wire.Form.of(pin.shape)
                place = wire.Place(region, offset, pin.page, pin.generation, form, pin.digests)
            given.append(wire.Given(tier, place))
        return wire.Leased(request.number, lease.number, lease.deadline - lease.granted_at, given)

    def _release(self, request: wire.Release, holder: Holder) -> None:
        store = self._house.store
        for number in request.leases:
            store.reader.release(number, holder.number)
        for seen in request.seen:
            store.counts.add("read", seen.tier, seen.reason, seen.count)

    def _read(self, request: wire.ReadAsk, holder: Holder) -> wire.Results:
        if sum(part.count for part in request.wants) * DIGEST_BYTES > wire.DETAIL_BYTES:
            raise TooLarge(f"one read has at most {wire.DETAIL_BYTES // DIGEST_BYTES} chunks", "wants")
        wants = []
        for part in request.wants:
            into = _piece(self._area, part.offset, part.count * part.form.chunk_bytes, "area")
            wants.append(Want(BlockKey(part.key), part.form.shape(), into, part.first_chunk, part.count))
        outcomes = self._house.store.read_leased(request.lease, holder.number, wants, request.timeout_s)
        results = []
        for want, outcome in zip(wants, outcomes, strict=True):
            hit = outcome.reason is Reason.HIT
            results.append(_result(outcome, digests_of(want.into, want.shape.chunk_bytes) if hit else b""))
        return wire.Results(request.number, results)

    def _write(self, request: wire.WriteAsk) -> wire.Results:
        puts, digests = [], []
        for part in request.puts:
            shape = part.form.shape()
            if len(part.digests) != DIGEST_BYTES * shape.chunks:
                raise InvalidInput(f"a record has {DIGEST_BYTES} bytes of digest for each chunk", "digests")
            parent = None if part.parent is None else BlockKey(part.parent)
            payload = _piece(self._window, part.offset, shape.record_bytes, "window")
            owner = Owner(part.namespace_id, part.session_id)
            puts.append(Put(BlockKey(part.key), parent, owner, shape, payload, part.lifetime))
            digests.append(part.digests)
        outcomes = self._house.store.write_checked(puts, digests, request.timeout_s)
        return wire.Results(request.number, [_result(outcome) for outcome in outcomes])

    def _administer(self, request: "wire.Asked") -> wire.Answer:
        if self._role != wire.ADMIN:
            raise StoreUnavailable("this needs the token of the role `admin`")
        admin, limit = self._house.store.admin, self._house.settings.admin_s
        match request:
            case wire.ForgetAsk():
                return wire.Forgotten(request.number, admin.forget(request.namespace_id, request.session_id))
            case wire.EvictAsk():
                freed = admin.evict(request.tier, request.size, min(request.timeout_s, limit))
                return wire.Freed(request.number, freed)
            case wire.VerifyAsk():
                return wire.Verified(request.number, admin.verify(min(request.timeout_s, limit)))
            case wire.CompactAsk():
                return wire.Freed(request.number, admin.compact(min(request.timeout_s, limit)))
            case wire.ListAsk():
                return wire.Listed(request.number, admin.ls(request.tier, request.skip, request.limit))
            case _:
                raise WireViolation("a request that nobody answers")


def _keys(raw: list[bytes]) -> list[BlockKey]:
    return [BlockKey(key) for key in raw]


def _piece(memory: memoryview, offset: int, size: int, name: str) -> memoryview:
    if offset + size > len(memory):
        raise InvalidInput(f"bytes {offset} to {offset + size} are not within {len(memory)}", name)
    return memory[offset : offset + size]


def _result(outcome: Outcome, digests: bytes = b"") -> wire.Result:
    tier = None if outcome.tier is None else Tier(outcome.tier)
    return wire.Result(outcome.reason, tier, outcome.sequence, digests)
