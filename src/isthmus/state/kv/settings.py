"""Settings of the store, and the limits on them. Sizes in bytes, times in seconds."""

import msgspec

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.arena.extents import PAGE_BYTES
from isthmus.state.kv.arena.memory import MAX_REGION_BYTES
from isthmus.state.kv.retention.policies import NAMES

_MIB = 1 << 20
_MOST = 1 << 48


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
        if self.policy not in NAMES:
            raise InvalidInput(f"policy is {self.policy!r}, accepted: {', '.join(NAMES)}", "policy")
