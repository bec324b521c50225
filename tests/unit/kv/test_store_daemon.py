"""Daemon and client beyond the conformance suite: who is let in, what a peer can do, restarts, clients that stall."""

import fcntl
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.support.scale import examples
from tests.support.store_daemon import running
from tests.support.stores import (
    LOG,
    OWNER,
    SHAPE,
    holds,
    key_of,
    payload_of,
    put_of,
    read_one,
    read_under,
    reasons,
    store_all,
)

from isthmus.contracts.blocks import DIGEST_BYTES, NO_SESSION, Hint, HintKind, Reason, Tier, Want
from isthmus.contracts.clock import SystemClock, SystemEntropy
from isthmus.contracts.errors import ConfigInvalid, StoreLocked, StoreUnavailable, WireViolation
from isthmus.contracts.wire import encode_frame
from isthmus.state.kv import wire
from isthmus.state.kv.address import Address, read_secret, secret_path
from isthmus.state.kv.administrator import Administrator
from isthmus.state.kv.arena.memory import create_shared
from isthmus.state.kv.client import RemoteStore, open_client
from isthmus.state.kv.connection import Closed, Connection, Frames
from isthmus.state.kv.daemon import Daemon
from isthmus.state.kv.hashing import digests_of
from isthmus.state.kv.lanepool import ClientSettings
from isthmus.state.kv.settings import DaemonSettings, StoreSettings
from isthmus.state.kv.store import Store, open_store

CLOCK = SystemClock()
STORE = StoreSettings(arena_bytes=1 << 20, region_bytes=1 << 19, lease_s=30.0)
SMALL = ClientSettings(window_bytes=1 << 20, area_bytes=1 << 19)
SOON = 5.0


class House:
    """A daemon in this process."""

    def __init__(self, folder: Path, store: Store, **how: object) -> None:
        self.path = folder / "run" / "s.sock"
        self.store = store
        self.daemon = Daemon(store, DaemonSettings(socket=str(self.path), **how), CLOCK, SystemEntropy())  # type: ignore[arg-type]
        self.daemon.start()
        self._clients: list[RemoteStore] = []
        self._raws: list[Raw] = []

    def raw(self) -> "Raw":
        self._raws.append(Raw(self.path))
        return self._raws[-1]

    def client(self, **how: object) -> RemoteStore:
        chosen = {"window_bytes": 1 << 20, "area_bytes": 1 << 19, **how}
        self._clients.append(open_client(self.path, CLOCK, ClientSettings(**chosen)))  # type: ignore[arg-type]
        return self._clients[-1]

    def token(self, role: str = wire.ENGINE) -> bytes:
        return wire.derive_token(read_secret(self.path), role)

    def counted(self, name: str) -> int:
        return self.store.counts.snapshot().get(name, 0)

    def close(self) -> None:
        for client in self._clients:
            client.close()
        for raw in self._raws:
            raw.socket.close()
        self.daemon.stop()
        self.store._parts.dram.check()
        self.store.close()


@contextmanager
def house(folder: Path, store: StoreSettings = STORE, **how: object) -> Iterator[House]:
    opened = House(folder, open_store(store, CLOCK, SystemEntropy()), **how)
    try:
        yield opened
    finally:
        opened.close()


class Raw:
    """A peer that says exactly what it is told to."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(SOON)
        self.socket.connect(str(path))
        self.connection = Connection(self.socket, CLOCK)
        self.answers: Frames[wire.Answer] = Frames(wire.Answer, wire.ANSWER_BYTES)

    def hello(self, token: bytes, role: str = wire.ENGINE, version: int = wire.VERSION) -> wire.Answer:
        self.connection.send(wire.Hello(version, role, token), wire.HELLO_BYTES, SOON)
        return self.connection.receive(self.answers, SOON)

    def attach(self, size: int = 1 << 16) -> list[int]:
        window, area = create_shared("w", size), create_shared("a", size)
        self.window, self.area = window.view, area.view
        self.connection.send(wire.Attach(size, size), wire.HELLO_BYTES, SOON)
        self.connection.send_descriptors([window.descriptor, area.descriptor], SOON)
        window.close()
        area.close()
        return self.connection.receive_descriptors(3, SOON)

    def ask(self, request: object) -> wire.Answer:
        self.connection.send(request, wire.REQUEST_BYTES, SOON)
        return self.connection.receive(self.answers, SOON)

    def ended(self) -> bool:
        """Whether the daemon closes the connection, without another word."""
        try:
            return self.socket.recv(1) == b""
        except ConnectionResetError:
            return True


def stop(pid: int) -> None:
    """SIGSTOP, and wait until it has stopped."""
    os.kill(pid, signal.SIGSTOP)
    assert in_time(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")


def in_time(condition: object) -> bool:
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        if condition():  # type: ignore[operator]
            return True
        time.sleep(0.01)
    return False


# Who is let in


def test_the_place_is_private(tmp_path: Path) -> None:
    with house(tmp_path) as here:
        assert here.path.stat().st_mode & 0o777 == 0o600
        assert here.path.parent.stat().st_mode & 0o777 == 0o700
        assert secret_path(here.path).stat().st_mode & 0o777 == 0o600
    (tmp_path / "open").mkdir(mode=0o755)
    (tmp_path / "open").chmod(0o755)
    with pytest.raises(ConfigInvalid, match="0700"):
        Address(tmp_path / "open" / "s", SystemEntropy())


def test_the_secret_stays_and_a_foreign_one_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s"
    first = Address(path, SystemEntropy())
    first.close()
    second = Address(path, SystemEntropy())
    assert second.secret == first.secret
    second.close()
    for text, mode in (("short", 0o600), ("z" * 64, 0o600), (first.secret.hex(), 0o644)):
        secret_path(path).write_text(text)
        secret_path(path).chmod(mode)
        with pytest.raises((ConfigInvalid, StoreUnavailable)):
            Address(path, SystemEntropy())
    secret_path(path).unlink()
    third = Address(path, SystemEntropy())
    assert third.secret != first.secret
    third.close()


def test_a_second_daemon_on_a_socket_or_a_log_is_refused(tmp_path: Path) -> None:
    over_log = StoreSettings(arena_bytes=1 << 20, path=str(tmp_path / "log"), log=LOG)
    with house(tmp_path, over_log) as here:
        with pytest.raises(StoreLocked, match=str(os.getpid())):
            Address(here.path, SystemEntropy())
        with pytest.raises(StoreLocked):
            open_store(over_log, CLOCK, SystemEntropy())
        store_all(here.client(), ["x"])
        assert holds(here.client(), "x")


def test_a_socket_left_by_a_killed_daemon_is_taken_over(tmp_path: Path) -> None:
    path = tmp_path / "run" / "s.sock"
    path.parent.mkdir(mode=0o700)
    left = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    left.bind(str(path))
    left.close()
    with house(tmp_path) as here:
        assert reasons(store_all(here.client(), ["x"])) == [Reason.STORED]


@pytest.mark.parametrize("token", [b"", bytes(32), b"x" * 32, b"x" * 1000])
def test_a_wrong_token_gets_nothing(tmp_path: Path, token: bytes) -> None:
    with house(tmp_path) as here:
        for role in (wire.ENGINE, wire.ADMIN, "owner", ""):
            raw = here.raw()
            answer = raw.hello(token, role)
            assert isinstance(answer, wire.Refused)
            assert "token" in answer.message
            assert raw.ended()
        assert here.counted("client_none_refused") == 4
        client = here.client(token=token or b"y")
        assert reasons(store_all(client, ["x"])) == [Reason.UNAVAILABLE]


def test_an_engines_token_is_not_an_administrators(tmp_path: Path) -> None:
    with house(tmp_path) as here:
        assert isinstance(here.raw().hello(here.token(wire.ENGINE), wire.ADMIN), wire.Refused)
        raw = here.raw()
        assert isinstance(raw.hello(here.token()), wire.Welcome)
        raw.attach()
        answer = raw.ask(wire.ForgetAsk(7, bytes(16), NO_SESSION))
        assert isinstance(answer, wire.Refused)
        assert (answer.number, "admin" in answer.message) == (7, True)
        admin = here.raw()
        admin.hello(here.token(wire.ADMIN), wire.ADMIN)
        admin.attach()
        assert isinstance(admin.ask(wire.ForgetAsk(8, bytes(16), NO_SESSION)), wire.Forgotten)


@pytest.mark.parametrize("version", [0, 2, 1 << 40])
def test_another_version_is_told_so(tmp_path: Path, version: int) -> None:
    with house(tmp_path) as here:
        raw = here.raw()
        answer = raw.hello(here.token(), version=version)
        assert isinstance(answer, wire.Refused)
        assert f"version {wire.VERSION}" in answer.message
        assert str(version) in answer.message


@pytest.mark.skipif(os.geteuid() != 0, reason="NOT RUN: only root can be another user for a moment")
def test_another_user_is_not_even_listened_to(tmp_path: Path) -> None:
    with house(tmp_path) as here:
        token = here.token()
        # The file modes would keep it out already: taken away to see that the kernel's word is asked for as well.
        for place in (here.path, *list(here.path.parents)[:-1]):
            if place.stat().st_uid == 0 and str(place).startswith(str(tmp_path.parents[1])):
                place.chmod(0o777)
        code = (
            "import os, socket, sys\nos.setuid(65534)\ns = socket.socket(socket.AF_UNIX)\ns.settimeout(5)\n"
            "s.connect(sys.argv[1])\n"
            "try:\n    s.sendall(bytes.fromhex(sys.argv[2]))\n    data = s.recv(100)\n"
            "except (ConnectionResetError, BrokenPipeError):\n    data = b''\n"
            "sys.exit(0 if data == b'' else 3)"
        )
        frame = encode_frame(wire.Hello(wire.VERSION, wire.ENGINE, token))
        done = subprocess.run([sys.executable, "-c", code, str(here.path), frame.hex()], check=False, timeout=30)
        assert done.returncode == 0
        assert here.counted("client_none_foreign_user") == 1


def test_one_client_too_many_is_told_so_and_the_rest_go_on(tmp_path: Path) -> None:
    with house(tmp_path, max_clients=2) as here:
        good = here.client(lanes=1)
        store_all(good, ["x"])
        other = here.raw()
        other.hello(here.token())
        third = here.raw()
        answer = third.connection.receive(third.answers, SOON)
        assert isinstance(answer, wire.Refused)
        assert answer.code == "overloaded"
        assert holds(good, "x")
        other.socket.close()
        assert in_time(lambda: here.daemon.clients == 1)
        assert isinstance(here.raw().hello(here.token()), wire.Welcome)


# What a client gets


def test_what_is_shared_can_only_be_read(tmp_path: Path) -> None:
    import mmap

    with house(tmp_path) as here:
        raw = here.raw()
        raw.hello(here.token())
        for descriptor in raw.attach():
            size = os.fstat(descriptor).st_size
            mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ).close()
            with pytest.raises(PermissionError):
                mmap.mmap(descriptor, size, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE)
            for change in (
                lambda fd: os.pwrite(fd, b"x", 0),
                lambda fd: os.ftruncate(fd, 0),
                lambda fd: os.ftruncate(fd, 1 << 30),
                lambda fd: os.posix_fallocate(fd, 0, 1 << 30),
            ):
                with pytest.raises(OSError, match=r"not permitted|denied"):
                    change(descriptor)
            os.close(descriptor)


def plain_file(folder: Path) -> int:
    path = folder / "plain"
    path.write_bytes(bytes(1 << 16))
    return os.open(path, os.O_RDWR)


def from_a_pool() -> int:
    """Memory in huge pages of a pool; there need not be one for this."""
    descriptor = os.memfd_create("huge", os.MFD_ALLOW_SEALING | os.MFD_HUGETLB)
    os.ftruncate(descriptor, 2 << 20)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor


def unsealed() -> int:
    descriptor = os.memfd_create("loose", os.MFD_ALLOW_SEALING)
    os.ftruncate(descriptor, 1 << 16)
    return descriptor


@pytest.mark.parametrize("kind", ["plain", "unsealed", "pool", "short", "one", "three", "none", "huge"])
def test_memory_that_could_change_under_the_daemon_is_refused(tmp_path: Path, kind: str) -> None:
    with house(tmp_path, handshake_s=0.3) as here:
        raw = here.raw()
        raw.hello(here.token())
        good = create_shared("w", 1 << 16)
        wrong = {"plain": lambda: plain_file(tmp_path), "unsealed": unsealed, "pool": from_a_pool}.get(
            kind, lambda: good.descriptor
        )()
        size = {"short": 1 << 17, "huge": 1 << 30, "pool": 2 << 20}.get(kind, 1 << 16)
        raw.connection.send(wire.Attach(size, 1 << 16), wire.HELLO_BYTES, SOON)
        sent = {"one": [wrong], "three": [wrong] * 3, "none": []}.get(kind, [wrong, good.descriptor])
        raw.connection.send_descriptors(sent, SOON)
        assert raw.ended()
        assert in_time(lambda: here.counted("client_none_violation") + here.counted("client_none_stalled") == 1)
        assert reasons(store_all(here.client(), ["x"])) == [Reason.STORED]


def connected(here: House, size: int = 1 << 16) -> Raw:
    raw = here.raw()
    assert isinstance(raw.hello(here.token()), wire.Welcome)
    for descriptor in raw.attach(size):
        os.close(descriptor)
    return raw


def put_part(name: object, offset: int = 0, digests: bytes | None = None) -> wire.PutPart:
    put = put_of(name)
    right = digests_of(put.payload, SHAPE.chunk_bytes)
    owner = put.owner
    form = wire.Form.of(SHAPE)
    return wire.PutPart(
        put.key, None, owner.namespace_id, owner.session_id, form, put.lifetime, digests or right, offset
    )


def test_what_is_not_what_was_promised_is_not_kept(tmp_path: Path) -> None:
    with house(tmp_path) as here:
        raw = connected(here)
        raw.window[: SHAPE.record_bytes] = payload_of("x", SHAPE.record_bytes)
        bad = put_part("x", digests=bytes(DIGEST_BYTES * SHAPE.chunks))
        answer = raw.ask(wire.WriteAsk(1, [bad, put_part("x")], SOON))
        assert isinstance(answer, wire.Results)
        assert [one.reason for one in answer.results] == [Reason.CORRUPT, Reason.STORED]
        assert holds(here.client(), "x")


def test_offsets_beyond_the_window_are_refused(tmp_path: Path) -> None:
    with house(tmp_path) as here:
        raw = connected(here)
        for number, offset in enumerate((1 << 16, (1 << 16) - SHAPE.record_bytes + 1, wire.MAX_WINDOW_BYTES)):
            answer = raw.ask(wire.WriteAsk(number, [put_part("x", offset)], SOON))
            assert isinstance(answer, wire.Refused)
            part = wire.WantPart(key_of("x"), wire.Form.of(SHAPE), 0, 4, offset)
            assert isinstance(raw.ask(wire.ReadAsk(number, 1, [part], SOON)), wire.Refused)
        short = put_part("x", digests=bytes(DIGEST_BYTES))
        assert isinstance(raw.ask(wire.WriteAsk(9, [short], SOON)), wire.Refused)
        assert isinstance(raw.ask(wire.StatsAsk(10)), wire.Stats), "a refused request ends nothing"


def test_leases_are_their_holders(tmp_path: Path) -> None:
    with house(tmp_path) as here:
        store_all(here.client(), ["x"])
        mine, other = connected(here), connected(here)
        leased = mine.ask(wire.LeaseAsk(1, [key_of("x")], 10.0))
        assert isinstance(leased, wire.Leased)
        part = wire.WantPart(key_of("x"), wire.Form.of(SHAPE), 0, 4, 0)
        for raw, expected in ((other, Reason.EXPIRED), (mine, Reason.HIT)):
            answer = raw.ask(wire.ReadAsk(2, leased.lease, [part], SOON))
            assert isinstance(answer, wire.Results)
            assert answer.results[0].reason is expected
        other.connection.send(wire.Release([leased.lease]), wire.REQUEST_BYTES, SOON)
        assert isinstance(other.ask(wire.StatsAsk(3)), wire.Stats)
        assert len(here.store.reader) == 1, "a lease is not released by another"
        mine.socket.close()
        assert in_time(lambda: len(here.store.reader) == 0), "it ends with its holder"


# What a peer may try

FRAMES = [
    wire.MatchAsk(1, [key_of(0)]),
    wire.LeaseAsk(2, [key_of(0)], 1.0),
    wire.ReadAsk(3, 1, [wire.WantPart(key_of(0), wire.Form.of(SHAPE), 0, 4, 0)], 1.0),
    wire.WriteAsk(4, [put_part(0)], 1.0),
    wire.HintAsk([wire.HintPart(HintKind.DONE, [key_of(0)], 1.0)]),
    wire.Release([1, 2], [wire.Seen(Tier.DRAM, Reason.HIT, 3)]),
    wire.FlushAsk(5, 0.1),
    wire.StatsAsk(6),
]


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    """A valid frame with some bytes changed, or its length."""
    data = bytearray(encode_frame(draw(st.sampled_from(FRAMES))))
    for _ in range(draw(st.integers(1, 4))):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@settings(max_examples=examples(40, 2000), deadline=None, suppress_health_check=list(HealthCheck))
@given(greet=st.booleans(), junk=st.lists(st.one_of(st.binary(max_size=300), damaged()), min_size=1, max_size=4))
def test_garbage_ends_one_connection_only(standing: House, greet: bool, junk: list[bytes]) -> None:
    raw = connected(standing) if greet else standing.raw()
    try:
        for piece in junk:
            raw.socket.sendall(piece)
        raw.socket.shutdown(socket.SHUT_WR)
        while raw.socket.recv(1 << 16):
            pass
    except OSError:
        pass
    raw.socket.close()
    good = standing.client(lanes=1)
    name = os.urandom(8)
    assert reasons(store_all(good, [name])) == [Reason.STORED]
    assert holds(good, name)
    good.close()
    assert in_time(lambda: standing.daemon.clients == 0)


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with house(tmp_path_factory.mktemp("standing")) as here:
        yield here


@pytest.mark.parametrize("seconds", [float("nan"), float("inf"), -2.0, 1e9])
def test_a_time_that_is_no_number_or_no_limit_breaks_the_rules(tmp_path: Path, seconds: float) -> None:
    """A lease that never ended would keep all that end after it from ending."""
    with house(tmp_path) as here:
        raw = connected(here)
        raw.connection.send(wire.LeaseAsk(1, [key_of(1)], seconds), wire.REQUEST_BYTES, SOON)
        assert raw.ended()
        assert here.counted("client_none_violation") == 1


@pytest.mark.parametrize("length", [wire.REQUEST_BYTES + 1, (1 << 32) - 1])
def test_a_frame_over_the_cap_is_not_waited_for(tmp_path: Path, length: int) -> None:
    with house(tmp_path) as here:
        raw = connected(here)
        raw.socket.sendall(length.to_bytes(4, "little"))
        assert raw.ended()
        assert here.counted("client_none_violation") == 1
        early = here.raw()
        early.socket.sendall((wire.HELLO_BYTES + 1).to_bytes(4, "little"))
        assert early.ended()


def test_half_a_frame_and_silence_are_dropped(tmp_path: Path) -> None:
    with house(tmp_path, frame_s=0.2, handshake_s=0.2) as here:
        store_all(here.client(), ["x"])
        silent, half = here.raw(), connected(here)
        half.socket.sendall(encode_frame(wire.StatsAsk(1))[:3])
        assert silent.ended()
        assert half.ended()
        assert in_time(lambda: here.counted("client_none_stalled") == 2)
        assert holds(here.client(), "x")


def test_who_does_not_read_its_answers_is_dropped_and_delays_nobody(tmp_path: Path) -> None:
    with house(tmp_path, frame_s=0.3) as here:
        good = here.client()
        store_all(good, list(range(80)))
        raw = connected(here)
        raw.socket.setblocking(False)
        ask = encode_frame(wire.LeaseAsk(1, [key_of(name) for name in range(80)], 5.0))
        sent = 0
        try:
            while sent < 100_000:
                sent += raw.socket.send(ask)
                if sent % 7 == 0:
                    assert holds(good, 3)
        except OSError:
            pass
        assert in_time(lambda: here.counted("client_none_stalled") == 1)
        assert in_time(lambda: len(here.store.reader) == 0), "its leases ended with it"
        assert holds(good, 3)


def test_a_client_in_its_right_mind_survives_a_mad_daemon(tmp_path: Path) -> None:
    """Whatever answers at the socket, calls come back in time and say `UNAVAILABLE`."""
    path = tmp_path / "s"
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(8)
    secret_path(path).write_text("00" * 32)
    answers = [b"", b"\xff" * 100, encode_frame(wire.Durable(1, 5)), (1 << 31).to_bytes(4, "little")]
    answers.append(encode_frame(wire.Welcome(1, b"e", b"s", [4096], 4096, 1.0, 1.0)) + bytes(100))

    def answer() -> None:
        for data in answers:
            sock, _ = listener.accept()
            sock.sendall(data)
            time.sleep(0.02)
            sock.close()

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    client = open_client(path, CLOCK, ClientSettings(connect_s=0.3, backoff_s=(0.001, 0.002), window_bytes=1 << 16))
    for _ in range(len(answers)):
        assert reasons(store_all(client, ["x"])) == [Reason.UNAVAILABLE]
        time.sleep(0.01)
    thread.join(5)
    listener.close()
    client.close()


# Restarts and stalls


def test_without_a_daemon_everything_is_unavailable_and_nothing_raises(tmp_path: Path) -> None:
    client = open_client(tmp_path / "nowhere", CLOCK, SMALL)
    assert client.match([key_of(1)])[0].tier is None
    outcome, _ = read_one(client, 1)
    assert outcome.reason is Reason.UNAVAILABLE
    assert reasons(store_all(client, [1, 2])) == [Reason.UNAVAILABLE] * 2
    client.hint([Hint(HintKind.DONE, [key_of(1)])])
    assert client.flush(0.1) == 0
    assert client.stats().counts["client_none_unavailable"] >= 3
    client.close()
    assert reasons(store_all(client, [1])) == [Reason.UNAVAILABLE]


def test_after_kill_9_and_a_restart_the_client_works_again_with_what_the_log_kept(tmp_path: Path) -> None:
    over_log = StoreSettings(arena_bytes=1 << 20, region_bytes=1 << 19, path=str(tmp_path / "log"), log=LOG)
    place = DaemonSettings(socket=str(tmp_path / "run" / "s"))
    client = open_client(Path(place.socket), CLOCK, ClientSettings(backoff_s=(0.001, 0.01), window_bytes=1 << 20))
    with running(over_log, place) as daemon:
        names = list(range(40))
        outcomes = store_all(client, names)
        assert reasons(outcomes) == [Reason.STORED] * 40
        assert client.flush(SOON) >= outcomes[-1].sequence
        epoch = client.stats().epoch
        lease = client.lease([key_of(0)], 30.0)
        assert read_under(client, lease, 0)[0].reason is Reason.HIT
        daemon.kill()
        start = time.monotonic()
        for _ in range(20):
            assert client.match([key_of(0)])[0].tier is None
            assert reasons(store_all(client, ["lost"])) == [Reason.UNAVAILABLE]
        assert time.monotonic() - start < 10
        assert client.stats().epoch == epoch, "the last one known"
    with running(over_log, place) as daemon:
        assert in_time(lambda: client.match([key_of(0)])[0].tier is Tier.NVME)
        assert client.stats().epoch != epoch
        assert read_under(client, lease, 0)[0].reason is Reason.EXPIRED
        with client.lease([key_of(1)], 30.0) as fresh:
            assert fresh.number == lease.number
            lease.release()
            assert read_under(client, fresh, 1)[0].reason is Reason.HIT, "not released with its namesake"
        assert all(holds(client, name) for name in names)
        status, said = daemon.end()
        assert (status, said) == (0, "")
    client.close()


STALLING = """
import sys, time
from pathlib import Path
from isthmus.contracts.clock import SystemClock
from isthmus.state.kv.client import open_client
from isthmus.state.kv.lanepool import ClientSettings
from tests.support.stores import key_of, read_under
client = open_client(Path(sys.argv[1]), SystemClock(), ClientSettings(window_bytes=1 << 20, area_bytes=1 << 19))
lease = client.lease([key_of(name) for name in range(84)], 30.0)
print(sum(one is not None for one in lease.granted), flush=True)
sys.stdin.readline()
print(read_under(client, lease, 3)[0].reason, flush=True)
with client.lease([key_of("new-0")], 10.0) as lease:
    print(read_under(client, lease, "new-0")[0].reason, flush=True)
"""


def test_a_client_stopped_past_its_lease_harms_nobody(tmp_path: Path) -> None:
    """It holds all of DRAM, is stopped, and goes on when its lease has long ended and the memory is somebody else's."""
    brief = StoreSettings(arena_bytes=1 << 20, region_bytes=1 << 19, lease_s=1.0)
    with house(tmp_path, brief) as here:
        good = here.client()
        assert reasons(store_all(good, list(range(84)))) == [Reason.STORED] * 84
        root = Path(__file__).resolve().parents[3]
        command = [sys.executable, "-c", STALLING, str(here.path)]
        stalled = subprocess.Popen(command, cwd=root, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert stalled.stdout is not None
            assert stalled.stdin is not None
            assert stalled.stdout.readline() == "84\n"
            stop(stalled.pid)
            before = here.daemon.clients
            assert reasons(store_all(good, ["new-0"])) == [Reason.FULL]
            assert holds(good, 5), "others read on meanwhile"
            assert in_time(lambda: len(here.store.reader) == 0), "its lease ends without it"
            assert in_time(lambda: here.daemon.clients < before), "it is dropped"
            assert here.counted("client_none_stalled") == 1
            names = [f"new-{index}" for index in range(84)]
            assert reasons(store_all(good, names)) == [Reason.STORED] * 84
            stalled.send_signal(signal.SIGCONT)
            stalled.stdin.write("\n")
            stalled.stdin.flush()
            assert stalled.stdout.readline() == "expired\n"
            assert stalled.stdout.readline() == "hit\n", "and it may come back"
        finally:
            stalled.kill()
            stalled.communicate(timeout=20)


def test_a_hung_daemon_costs_a_call_no_more_than_its_limit(tmp_path: Path) -> None:
    place = DaemonSettings(socket=str(tmp_path / "run" / "s"))
    settings_ = ClientSettings(call_s=0.3, connect_s=0.3, window_bytes=1 << 20, backoff_s=(0.001, 0.01))
    with running(STORE, place) as daemon:
        client = open_client(Path(place.socket), CLOCK, settings_)
        store_all(client, ["x"])
        lease = client.lease([key_of("x")], 20.0)
        stop(daemon.process.pid)
        start = time.monotonic()
        assert client.match([key_of("x")])[0].tier is None
        assert client.write([put_of("y")], 0.3)[0].reason in (Reason.LATE, Reason.UNAVAILABLE)
        assert client.flush(0.3) == 0
        assert read_under(client, lease, "x")[0].reason is Reason.HIT, "shared memory needs no daemon"
        assert time.monotonic() - start < 5
        daemon.process.send_signal(signal.SIGCONT)
        assert in_time(lambda: holds(client, "x"))
        client.close()


def test_reads_through_the_area_are_cut_where_they_do_not_fit(tmp_path: Path) -> None:
    over_log = StoreSettings(arena_bytes=1 << 20, region_bytes=1 << 19, path=str(tmp_path / "log"), log=LOG)
    with house(tmp_path, over_log) as here:
        client = here.client(area_bytes=8192)
        assert reasons(store_all(client, list(range(8)))) == [Reason.STORED] * 8
        assert client.flush(SOON)
        assert here.store.admin.evict(Tier.DRAM, 1 << 20, 1.0) > 0
        with client.lease([key_of(name) for name in range(8)], 10.0) as lease:
            assert set(lease.granted) == {Tier.NVME}
            buffers = [bytearray(SHAPE.record_bytes) for _ in range(8)]
            wants = [Want(key_of(name), SHAPE, memoryview(buffers[name])) for name in range(8)]
            outcomes = client.read(lease, wants, SOON)
        assert [(one.reason, one.tier) for one in outcomes] == [(Reason.HIT, Tier.NVME)] * 8
        assert buffers == [payload_of(name, SHAPE.record_bytes) for name in range(8)]
        tiny = here.client(area_bytes=4096, window_bytes=4096)
        assert holds(tiny, 0), "three chunks a page do not fit, one does"
        assert reasons(store_all(tiny, ["big"])) == [Reason.TOO_LARGE]


def test_memory_whose_generation_changed_is_not_believed(tmp_path: Path) -> None:
    """The bytes are still right: only the generation says that they are not this record's any more."""
    with house(tmp_path) as here:
        client = here.client()
        store_all(client, ["x"])
        (record,) = here.store._parts.dram.where([key_of("x")])
        assert record is not None
        with client.lease([key_of("x")], 10.0) as lease:
            assert read_under(client, lease, "x")[0].reason is Reason.HIT
            assert here.counted("read_dram_hit") == 0, "read without a word to the daemon"
            here.store.arena.memory.generations[record.page] += 1
            assert read_under(client, lease, "x")[0].reason is Reason.HIT
            assert here.counted("read_dram_hit") == 1, "the daemon was asked"
            here.store.arena.memory.generations[record.page] -= 1
        assert in_time(lambda: here.counted("read_dram_hit") == 2), "what the client read alone is counted, too"


def test_an_administrator_asks_from_outside(tmp_path: Path) -> None:
    over_log = StoreSettings(arena_bytes=1 << 20, region_bytes=1 << 19, path=str(tmp_path / "log"), log=LOG)
    with house(tmp_path, over_log) as here:
        client = here.client()
        store_all(client, list(range(5)))
        client.flush(SOON)
        admin = Administrator(here.path, CLOCK)
        assert admin.status().tiers[0].records == 5
        assert {one.key for one in admin.ls(Tier.DRAM, 0, 10)} == {key_of(name) for name in range(5)}
        assert len(admin.ls(Tier.NVME, 1, 2)) == 2
        assert admin.verify(10.0).dram_good == 5
        assert admin.evict(Tier.DRAM, 1, 5.0) >= 12288
        assert admin.compact(5.0) >= 0
        assert admin.forget(OWNER.namespace_id).number == 1
        assert not holds(client, 1)
        with pytest.raises(StoreUnavailable, match="tier"):
            admin.ls(Tier.REMOTE, 0, 1)
        admin.close()
        nobody = Administrator(tmp_path / "nowhere", CLOCK)
        with pytest.raises(StoreUnavailable, match="nowhere"):
            nobody.status()
        nobody.close()


def test_a_connection_that_is_gone_is_made_again_within_the_call(tmp_path: Path) -> None:
    with house(tmp_path) as here:
        client = here.client()
        store_all(client, ["x"])
        for serving in list(here.daemon._serving):
            serving.drop()
        assert in_time(lambda: here.daemon.clients == 0)
        assert holds(client, "x")


def test_errors_of_the_socket_are_of_two_kinds(tmp_path: Path) -> None:
    near, far = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    one = Connection(near, CLOCK)
    far.sendall(b"\0" * 64)
    with pytest.raises(WireViolation, match="descriptors"):
        one.receive_descriptors(1, 1.0)
    far.close()
    with pytest.raises(Closed):
        Connection(near, CLOCK).send_descriptors([0], 1.0)
    near.close()
