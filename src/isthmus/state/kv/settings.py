"""Settings of the store, and the limits on them. Sizes in bytes, times in seconds."""

from typing import Literal

import msgspec

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.arena.extents import PAGE_BYTES
from isthmus.state.kv.arena.memory import MAX_REGION_BYTES
from isthmus.state.kv.log.settings import LogSettings
from isthmus.state.kv.retention.policies import NAMES

_MIB = 1 << 20
_MOST = 1 << 48
MAX_SOCKET_PATH = 107


class StoreSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What a store is made of. Raises `InvalidInput`, naming the field and its limits, for anything that cannot work.

    Whether the arena fits into this machine's memory is found out when it is made (`ConfigInvalid`).
    """

    arena_bytes: int = 256 * _MIB
    """The DRAM tier: a multiple of 4096. A record takes whole pages of 4096 bytes."""
    region_bytes: int = MAX_REGION_BYTES
    """The arena is cut in pieces of at most so much; no record crosses their ends, so it is also the largest record."""
    policy: str = "s3fifo"
    """Which records leave the arena first: one of `retention.policies.NAMES`."""
    tenant_bytes: int = 0
    """Most bytes of the arena that one tenant may take; 0: all of it."""
    max_leases: int = 4096
    lease_s: float = 60.0
    """The longest lease; longer ones are cut."""
    call_s: float = 60.0
    """The longest that any call may take, whatever it asks for."""
    prefetch_keys: int = 4096
    """Most keys waiting to be brought to DRAM; more are dropped."""
    path: str = ""
    """File or raw device of the log; empty: nothing is kept beyond DRAM."""
    log: LogSettings | None = None
    disk_backend: Literal["auto", "io_uring", "threads"] = "auto"

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "arena_bytes": (16 * PAGE_BYTES, _MOST),
            "region_bytes": (PAGE_BYTES, MAX_REGION_BYTES),
            "tenant_bytes": (0, _MOST),
            "max_leases": (1, 1 << 20),
            "lease_s": (0.001, 3600.0),
            "call_s": (0.01, 3600.0),
            "prefetch_keys": (1, 1 << 20),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidInput(f"{name} is {value}, accepted: {low:.15g} to {high:.15g}", name)
        for name in ("arena_bytes", "region_bytes"):
            if getattr(self, name) % PAGE_BYTES:
                raise InvalidInput(f"{name} is a multiple of {PAGE_BYTES}", name)
        if bool(self.path) != (self.log is not None):
            raise InvalidInput("a log has a path and settings, or neither", "path")
        if self.policy not in NAMES:
            raise InvalidInput(f"policy is {self.policy!r}, accepted: {', '.join(NAMES)}", "policy")


class DaemonSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the daemon serves a store. Raises `InvalidInput`, naming the field and its limits."""

    socket: str
    """Path of the Unix socket, in a folder of the owner's alone (made when it is missing)."""
    max_clients: int = 64
    """Connections at a time; one more is refused."""
    window_bytes: int = 256 * _MIB
    """The largest window, and the largest area, that a client may bring."""
    handshake_s: float = 2.0
    frame_s: float = 5.0
    """For a frame that has begun to arrive, and for an answer to be taken."""
    admin_s: float = 600.0
    """The longest that verifying and compacting may take in one request."""

    def __post_init__(self) -> None:
        limits: dict[str, tuple[float, float]] = {
            "max_clients": (1, 4096),
            "window_bytes": (PAGE_BYTES, MAX_REGION_BYTES),
            "handshake_s": (0.01, 60.0),
            "frame_s": (0.01, 600.0),
            "admin_s": (0.01, 86_400.0),
        }
        for name, (low, high) in limits.items():
            value = getattr(self, name)
            if not low <= value <= high:
                raise InvalidInput(f"{name} is {value}, accepted: {low:.15g} to {high:.15g}", name)
        if not 1 <= len(self.socket.encode()) <= MAX_SOCKET_PATH:
            raise InvalidInput(f"the path of a Unix socket has 1 to {MAX_SOCKET_PATH} bytes", "socket")
