"""The arena's parts: limits on memory, seals, copies that are hashed, leases, scopes, counts."""

import fcntl
import mmap
import os
import threading
from pathlib import Path

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st
from tests.support.stores import OTHER, OWNER

from isthmus.contracts.blocks import DIGEST_BYTES, NO_SESSION, Erasure, Outcome, Owner, Reason, Tier
from isthmus.contracts.clock import ManualClock
from isthmus.contracts.errors import ConfigInvalid, InvalidInput, WireViolation
from isthmus.state.kv.arena import copying
from isthmus.state.kv.arena.copying import copy_digests, copy_verified, digests_slice, flat
from isthmus.state.kv.arena.limits import MARGIN_BYTES, available_memory, check_fits
from isthmus.state.kv.arena.memory import (
    F_SEAL_FUTURE_WRITE,
    create_arena,
    create_region,
    create_shared,
    huge_bytes,
    map_read_only,
    map_writable,
    region_sizes,
)
from isthmus.state.kv.counting import Counts
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.leases import WITHIN, LeaseTable
from isthmus.state.kv.scopes import Scope, Scopes
from isthmus.state.kv.settings import DaemonSettings, StoreSettings

GIB = 1 << 30


def machine(root: Path, cgroup: str, files: dict[str, str], available_kib: int = 8 << 20) -> Path:
    """A file system that says what a kernel would."""
    (root / "proc/self").mkdir(parents=True)
    (root / "proc/meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable:  {available_kib} kB\n")
    (root / "proc/self/cgroup").write_text(cgroup)
    for name, text in files.items():
        path = root / "sys/fs/cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


V2 = {
    "a/b/memory.max": str(3 * GIB),
    "a/b/memory.current": str(GIB),
    "a/b/memory.stat": f"anon 5\ninactive_file {GIB // 2}\n",
    "a/memory.max": "max",
    "a/memory.current": str(4 * GIB),
}
V1 = {
    "memory/c/memory.limit_in_bytes": str(2 * GIB),
    "memory/c/memory.usage_in_bytes": str(GIB),
    "memory/c/memory.stat": f"total_inactive_file {GIB // 4}\n",
    "memory/memory.limit_in_bytes": "9223372036854771712",
    "memory/memory.usage_in_bytes": str(GIB),
}


@pytest.mark.parametrize(
    ("cgroup", "files", "expected", "name"),
    [
        ("0::/\n", {}, 8 * GIB, "MemAvailable"),
        ("0::/a/b\n", V2, 2 * GIB + GIB // 2, "memory.max of cgroup /a/b"),
        ("0::/gone/b\n", {"memory.max": str(GIB), "memory.current": "0"}, GIB, "memory.max of cgroup /"),
        ("9:cpu:/x\n4:memory:/c\n0::/\n", V1, GIB + GIB // 4, "memory.limit_in_bytes of cgroup /c"),
        ("4:memory:/elsewhere\n", V1, 8 * GIB, "MemAvailable"),
        ("", {}, 8 * GIB, "MemAvailable"),
    ],
)
def test_the_least_of_machine_and_cgroups_counts(
    tmp_path: Path, cgroup: str, files: dict[str, str], expected: int, name: str
) -> None:
    root = machine(tmp_path, cgroup, files)
    left, limit = available_memory(root)
    assert (left, name in limit) == (expected, True), limit
    check_fits(expected - MARGIN_BYTES, root)
    with pytest.raises(ConfigInvalid, match="arena_bytes") as refused:
        check_fits(expected - MARGIN_BYTES + 1, root)
    assert name in str(refused.value)


def test_an_arena_that_does_not_fit_is_refused_before_a_page_is_touched() -> None:
    with pytest.raises(ConfigInvalid, match=r"arena_bytes is .*accepted: at most"):
        create_arena(1 << 46, GIB)
    assert available_memory()[0] > 0


def test_regions_cover_the_arena_and_a_failure_leaves_nothing_open() -> None:
    assert region_sizes(10, 4) == [4, 4, 2]
    assert region_sizes(8, 4) == [4, 4]
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ConfigInvalid):
        create_region("too-large", 1 << 62, huge=False)
    memory = create_arena(5 * 4096, 2 * 4096, check=lambda _: None)
    assert [region.size for region in memory.regions] == [8192, 8192, 4096]
    assert (memory.table.size, len(memory.generations)) == (4096, 512)
    assert not memory.generations.any()
    memory.close()
    del memory
    assert len(os.listdir("/proc/self/fd")) == before


def test_nobody_but_its_owner_can_write_or_resize_a_region() -> None:
    region = create_region("mine", 8192, huge=True)
    region.view[0] = 7
    seals = fcntl.fcntl(region.descriptor, fcntl.F_GET_SEALS)
    assert seals & F_SEAL_FUTURE_WRITE
    assert map_read_only(region.descriptor, 8192)[0] == 7
    with pytest.raises(PermissionError):
        mmap.mmap(region.descriptor, 8192, mmap.MAP_SHARED, mmap.PROT_WRITE)
    with pytest.raises(WireViolation, match="mapped"):
        map_writable(region.descriptor, 8192)
    for resize in (0, 4096, 16384):
        with pytest.raises(PermissionError):
            os.ftruncate(region.descriptor, resize)
    with pytest.raises(PermissionError):
        fcntl.fcntl(region.descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
    with pytest.raises(TypeError):
        map_read_only(region.descriptor, 8192)[0] = 1
    region.close()


def test_memory_from_others_is_mapped_only_when_it_cannot_shrink(tmp_path: Path) -> None:
    shared = create_shared("both", 8192)
    map_writable(shared.descriptor, 8192)[5] = 9
    assert shared.view[5] == 9
    for size in (4096, 8193, 0):
        with pytest.raises(WireViolation, match="expected"):
            map_read_only(shared.descriptor, size)
    shared.close()
    (tmp_path / "file").write_bytes(bytes(8192))
    with (tmp_path / "file").open("rb") as plain, pytest.raises(WireViolation, match="sealed"):
        map_read_only(plain.fileno(), 8192)


def test_huge_pages_are_counted_as_the_kernel_says(tmp_path: Path) -> None:
    region = create_region("r", 4096, huge=False)
    import numpy as np

    start = np.frombuffer(region.view, np.uint8).ctypes.data
    smaps = tmp_path / "smaps"
    smaps.write_text(
        f"1000-2000 rw-s 0 00:01 5 /memfd:x\nSize: 4 kB\nShmemPmdMapped:     4096 kB\n"
        f"{start:x}-{start + 4096:x} rw-s 0 00:01 5 /memfd:x\nRss: 4 kB\nShmemPmdMapped:     2048 kB\nVmFlags: rd\n"
    )
    assert huge_bytes([region.view], smaps) == 2048 * 1024
    assert huge_bytes([region.view], tmp_path / "none") == 0
    region.close()


@given(st.data())
def test_copies_have_the_digests_of_their_chunks_whatever_the_sizes(data: st.DataObject) -> None:
    piece = data.draw(st.sampled_from([1, 7, 64, 1 << 20]))
    chunk, count = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 9))
    payload = data.draw(st.binary(min_size=chunk * count, max_size=chunk * count))
    target = bytearray(len(payload))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(copying, "PIECE_BYTES", piece)
        digests = copy_digests(memoryview(payload), memoryview(target), chunk)
    expected = [xxhash.xxh3_128_digest(payload[at * chunk : (at + 1) * chunk]) for at in range(count)]
    assert (target, digests) == (payload, b"".join(expected))
    assert digests_of(memoryview(payload), chunk) == digests
    first = data.draw(st.integers(0, count - 1))
    assert digests_slice(digests, first, 1) == expected[first]
    assert copy_verified(memoryview(payload), memoryview(target), chunk, digests)
    wrong = bytearray(digests)
    wrong[data.draw(st.integers(0, count * DIGEST_BYTES - 1))] ^= 1
    assert not copy_verified(memoryview(payload), memoryview(target), chunk, bytes(wrong))


def test_large_pieces_are_copied_too() -> None:
    payload = os.urandom(300_000)
    target = bytearray(len(payload))
    assert copy_digests(memoryview(payload), memoryview(target), 300_000) == xxhash.xxh3_128_digest(payload)
    assert target == payload
    assert flat(memoryview(bytearray(12)).cast("B", (3, 4))).shape == (12,)


# Leases


def test_pins_are_handed_back_exactly_once() -> None:
    table: LeaseTable[str] = LeaseTable(max_leases=4, max_seconds=10.0)
    table.grant(WITHIN, ["mine"], 10.0, 2e9)
    first = table.grant(1, ["a", None], 5.0, 100.0)
    second = table.grant(1, ["b"], 99.0, 100.0)
    third = table.grant(2, ["c"], -5.0, 100.0)
    assert (first.deadline, second.deadline, third.deadline) == (105.0, 110.0, 100.0)
    assert table.full(1)
    assert table.full(WITHIN)
    with pytest.raises(InvalidInput, match="4 leases"):
        table.grant(1, [], 1.0, 100.0)
    assert table.get(first.number, 1, 104.9) is first
    assert table.get(first.number, 2, 104.9) is None, "another's"
    assert table.get(first.number, 1, 105.0) is None, "at its deadline it has ended"
    assert table.release(first.number, 2) is None
    assert table.release(first.number, 1) is first
    assert table.release(first.number, 1) is None
    assert table.expire(105.0) == [third]
    assert table.expire(105.0) == []
    assert table.release_all(1) == [second]
    assert table.release_all(1) == []
    assert (len(table), table.expire(1e9)) == (1, [])


def test_who_leases_all_it_can_leaves_as_many_to_others() -> None:
    table: LeaseTable[int] = LeaseTable(max_leases=12, max_seconds=10.0)

    def all_of(holder: int) -> int:
        count = 0
        while not table.full(holder):
            table.grant(holder, [], 10.0, 0.0)
            count += 1
        return count

    assert [all_of(holder) for holder in (1, 2, 3)] == [6, 3, 2]
    assert all_of(WITHIN) == 1
    assert all_of(4) == 0
    assert table.release_all(1)
    assert all_of(4) == 3


@given(st.lists(st.tuples(st.sampled_from("grem"), st.integers(0, 5), st.floats(0, 20)), max_size=80))
def test_no_pin_is_lost_or_freed_twice(steps: list[tuple[str, int, float]]) -> None:
    table: LeaseTable[int] = LeaseTable(max_leases=6, max_seconds=8.0)
    held: dict[int, tuple[int, float, int]] = {}
    now, serial = 0.0, 0

    def freed(leases: list) -> None:  # type: ignore[type-arg]
        for lease in leases:
            assert held.pop(lease.number)[2] == lease.pins[0]

    for step, choice, amount in steps:
        if step == "g" and not table.full(choice % 3):
            serial += 1
            lease = table.grant(choice % 3, [serial], amount, now)
            held[lease.number] = (choice % 3, now + min(amount, 8.0), serial)
        elif step == "r" and held:
            number = sorted(held)[choice % len(held)]
            lease_or_none = table.release(number, held[number][0])
            freed([lease_or_none] if lease_or_none else [])
        elif step == "e":
            now += amount
            freed(table.expire(now))
            assert all(deadline > now for _, deadline, _ in held.values())
        else:
            freed(table.release_all(choice % 3))
            assert not any(holder == choice % 3 for holder, _, _ in held.values())
        assert len(table) == len(held)


# Scopes


def test_what_is_being_forgotten_is_not_let_in() -> None:
    scopes = Scopes(ManualClock())
    session = Owner(OWNER.namespace_id, b"s" * 16)
    whole, part = Scope(OWNER.namespace_id), Scope(OWNER.namespace_id, b"s" * 16)
    assert not scopes.refuses(session)
    scopes.begin(part)
    assert (scopes.refuses(session), scopes.refuses(OWNER), scopes.refuses(OTHER)) == (True, False, False)
    scopes.begin(whole)
    assert (scopes.refuses(session), scopes.refuses(OWNER), scopes.refuses(OTHER)) == (True, True, False)
    assert scopes.end(part, 0) == Erasure(1, OWNER.namespace_id, b"s" * 16)
    assert scopes.end(whole, None) is None
    assert not scopes.refuses(session)
    assert scopes.number == 1


def test_an_erasure_waits_for_writes_of_its_scope_only_and_not_for_ever() -> None:
    scopes = Scopes(ManualClock(), [Erasure(7, b"n" * 16, b"")])
    number = scopes.start_write({OWNER, OTHER})
    scope = Scope(OWNER.namespace_id, NO_SESSION)
    writes = scopes.begin(scope)
    assert writes == {number}
    assert not scopes.wait(writes, 0.01)
    other = Scope(b"x" * 16)
    assert scopes.begin(other) == set()
    scopes.end(other, None)
    later = scopes.start_write({OWNER})
    threading.Timer(0.05, scopes.end_write, [number]).start()
    assert scopes.wait(writes, 5.0), "writes that began later are refused, not waited for"
    scopes.end_write(later)
    assert scopes.end(scope, 0) == Erasure(8, OWNER.namespace_id, b"")
    assert [one.number for one in scopes.erasures()] == [7, 8]


def test_counts_are_named_by_operation_tier_and_reason() -> None:
    counts = Counts()
    counts.add_outcomes("read", [Outcome(Reason.HIT, Tier.DRAM)] * 3 + [Outcome(Reason.ABSENT)])
    counts.add("evict", Tier.DRAM, "evicted", 0)
    assert counts.snapshot() == {"read_dram_hit": 3, "read_none_absent": 1}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("arena_bytes", 4096),
        ("arena_bytes", (1 << 20) + 1),
        ("region_bytes", (1 << 30) + 4096),
        ("policy", "magic"),
        ("max_leases", 0),
        ("lease_s", float("nan")),
        ("call_s", 0),
        ("prefetch_keys", -1),
        ("path", "/somewhere"),
    ],
)
def test_settings_that_cannot_work_name_their_field(field: str, value: object) -> None:
    with pytest.raises(InvalidInput) as refused:
        StoreSettings(**{field: value})  # type: ignore[arg-type]
    assert refused.value.field == field


@pytest.mark.parametrize(
    ("field", "value"), [("socket", ""), ("socket", "x" * 108), ("max_clients", 0), ("frame_s", 0)]
)
def test_daemon_settings_that_cannot_work_name_their_field(field: str, value: object) -> None:
    with pytest.raises(InvalidInput) as refused:
        DaemonSettings(**{"socket": "s", field: value})  # type: ignore[arg-type]
    assert refused.value.field == field
