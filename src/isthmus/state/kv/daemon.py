"""The daemon: one store for a host, behind a Unix socket of its user's alone.

Promises: one daemon a socket (a lock whose holder's death releases it); at most `max_clients` connections, each served
by a thread of its own, one more is told so; every wait ends; a client whose lease ended by itself while it said nothing
has stalled and is dropped.
"""

import socket
import threading
from collections.abc import Callable
from pathlib import Path

from isthmus.contracts.clock import Clock, Entropy
from isthmus.contracts.errors import DeadlineExceeded, Overloaded
from isthmus.state.kv import wire
from isthmus.state.kv.address import Address
from isthmus.state.kv.connection import Closed, Connection
from isthmus.state.kv.holders import Holders
from isthmus.state.kv.reading import StoreLease
from isthmus.state.kv.serving import House, Serving
from isthmus.state.kv.settings import DaemonSettings
from isthmus.state.kv.store import Store

_ACCEPT_S = 0.5
_PAUSE_S = 0.05
_END_S = 5.0


class Daemon:
    """Serves `store` at the socket of the settings from `start` to `stop`."""

    def __init__(self, store: Store, settings: DaemonSettings, clock: Clock, entropy: Entropy) -> None:
        """Raises `StoreLocked` when a daemon serves there already, `ConfigInvalid` when the place is not private."""
        self._store = store
        self._settings = settings
        self._clock = clock
        self._ending = threading.Event()
        self._address = Address(Path(settings.socket), entropy)
        tokens = {role: wire.derive_token(self._address.secret, role) for role in wire.ROLES}
        self._holders = Holders(store.reader, entropy)
        self._house = House(store, settings, clock, tokens, self._holders, self._ending.is_set)
        self._lock = threading.Lock()
        self._serving: dict[Serving, threading.Thread] = {}
        self._accepting = threading.Thread(target=self._accept, name="store-accept", daemon=True)

    @property
    def clients(self) -> int:
        """Connections now."""
        with self._lock:
            return len(self._serving)

    def start(self) -> None:
        """Take clients in."""
        self._store.watch_expiry(self._expired)
        self._accepting.start()

    def stop(self) -> None:
        """Drop all clients. Bounded. The store stays open."""
        self._ending.set()
        self._address.wake()
        self._accepting.join(_END_S)
        with self._lock:
            serving = dict(self._serving)
        for one in serving:
            one.drop()
        deadline = self._clock.monotonic() + _END_S
        for thread in serving.values():
            thread.join(max(0.01, deadline - self._clock.monotonic()))
        self._store.watch_expiry(None)
        self._address.close()

    def _expired(self, lease: StoreLease) -> None:
        if self._holders.expired(lease):
            self._store.counts.add("client", None, "stalled")

    def _accept(self) -> None:
        self._address.socket.settimeout(_ACCEPT_S)
        while not self._ending.is_set():
            try:
                sock, _ = self._address.socket.accept()
            except TimeoutError:
                continue
            except OSError:
                # Out of descriptors, for one: those who wait may be let in when others have left.
                self._store.counts.add("client", None, "not_accepted")
                self._ending.wait(_PAUSE_S)
                continue
            if self._ending.is_set():
                sock.close()
            else:
                self._take_in(sock)

    def _take_in(self, sock: socket.socket) -> None:
        connection = Connection(sock, self._clock)
        serving = Serving(connection, self._house)
        thread = threading.Thread(target=self._run, args=(serving,), name="store-client", daemon=True)
        with self._lock:
            full = len(self._serving) >= self._settings.max_clients
            if not full:
                self._serving[serving] = thread
        if full:
            self._store.counts.add("client", None, "full")
            _turn_away(connection, self._settings.max_clients)
            return
        try:
            thread.start()
        except RuntimeError:  # no more threads are to be had
            self._store.counts.add("client", None, "not_accepted")
            connection.close()
            with self._lock:
                del self._serving[serving]

    def _run(self, serving: Serving) -> None:
        try:
            serving.run()
        finally:
            with self._lock:
                del self._serving[serving]


def _turn_away(connection: Connection, limit: int) -> None:
    try:
        refused = wire.Refused(0, Overloaded.code, f"{limit} clients are connected already")
        connection.send(refused, wire.HELLO_BYTES, 0.0)
    except (Closed, DeadlineExceeded):
        return  # it has left, or takes nothing: it learns by the end of the connection
    finally:
        connection.close()


def run_daemon(
    store: Store,
    settings: DaemonSettings,
    clock: Clock,
    entropy: Entropy,
    *,
    stop: threading.Event,
    on_ready: Callable[[str], None],
) -> None:
    """Serve until `stop` is set; `on_ready(socket)` when clients are taken in. The store is closed in the end.

    Raises as `Daemon`.
    """
    try:
        daemon = Daemon(store, settings, clock, entropy)
        try:
            daemon.start()
            on_ready(settings.socket)
            while not stop.wait(_ACCEPT_S):
                pass  # in slices, so that signals reach the main thread
        finally:
            daemon.stop()
    finally:
        store.close()
