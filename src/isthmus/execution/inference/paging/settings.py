"""Limits of paging."""

import msgspec

from isthmus.contracts.errors import InvalidInput


class PagingSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`look_s`: how long a request waits to hear what the store has. `load_s`: how long a load may take. `max_loading`:
    requests that load at a time. `keep_bytes`: bytes on the device that wait to be written to the store. `lease_s`: of
    the leases on the store. A request starts before its load is complete when the rest is expected within the part
    `early_share` (0: never) of the time that its own step takes, and that has at least `early_tokens` tokens.
    """

    look_s: float = 1.0
    load_s: float = 10.0
    max_loading: int = 8
    keep_bytes: int = 64 * 1024 * 1024
    early_share: float = 0.5
    early_tokens: int = 32
    lease_s: float = 15.0

    def __post_init__(self) -> None:
        for name, low, high in (("look_s", 0.001, 60), ("load_s", 0.01, 600), ("lease_s", 0.1, 600)):
            if not low <= getattr(self, name) <= high:
                raise InvalidInput(f"{name} is {getattr(self, name)}, accepted: {low} to {high}", name)
        if not 1 <= self.max_loading <= 1024:
            raise InvalidInput(f"max_loading is {self.max_loading}, accepted: 1 to 1024", "max_loading")
        if not 0 <= self.keep_bytes <= 1 << 40:
            raise InvalidInput(f"keep_bytes is {self.keep_bytes}, accepted: 0 to 1 TiB", "keep_bytes")
        if not 0 <= self.early_share <= 1:
            raise InvalidInput(f"early_share is {self.early_share}, accepted: 0 to 1", "early_share")
