"""Bytes that each tenant may have, and has.

A tenant over its quota pays before anybody else does; whoever writes asks `Quotas.excess` first and evicts that much of
the tenant's own.
"""

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.retention.port import RetentionCorrupt


@dataclass(frozen=True, slots=True)
class Quotas:
    """`named` tenants have their own limit in bytes, all others `default`; None: no limit but the capacity."""

    default: int | None = None
    named: Mapping[Hashable, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if any(limit < 0 for limit in (*self.named.values(), self.default or 0)):
            raise InvalidInput("a quota is at least 0 bytes", "quotas")

    def limit(self, tenant: Hashable) -> int | None:
        """The bytes that `tenant` may have; None: as many as there are."""
        return self.named.get(tenant, self.default)

    def excess(self, tenant: Hashable, used: int, incoming: int = 0) -> int:
        """By how many bytes `tenant` would be over its limit if it had `incoming` more than it has."""
        limit = self.limit(tenant)
        return 0 if limit is None else max(0, used + incoming - limit)


class TenantBytes:
    """The account: bytes present by tenant, and who is over. Tenants without records are not remembered."""

    __slots__ = ("_limited", "_over", "_quotas", "_used", "total")

    def __init__(self, quotas: Quotas) -> None:
        self._quotas = quotas
        self._limited = quotas.default is not None or bool(quotas.named)
        self._used: dict[Hashable, int] = {}
        self._over: dict[Hashable, None] = {}
        self.total = 0

    def add(self, tenant: Hashable, size: int) -> None:
        """`tenant` has `size` bytes more, or less when it is negative."""
        self.total += size
        used = self._used.get(tenant, 0) + size
        if used:
            self._used[tenant] = used
        else:
            self._used.pop(tenant, None)
        if not self._limited:
            return
        if self._quotas.excess(tenant, used):
            self._over[tenant] = None
        else:
            self._over.pop(tenant, None)

    def used(self, tenant: Hashable) -> int:
        """Bytes that `tenant` has."""
        return self._used.get(tenant, 0)

    def over(self) -> list[tuple[Hashable, int]]:
        """Tenants over their limit, and by how many bytes; the one that has been over for longest comes first."""
        return [(tenant, self._quotas.excess(tenant, self._used[tenant])) for tenant in self._over]

    def check(self, used: Mapping[Hashable, int]) -> None:
        """Raise `RetentionCorrupt` unless the account is `used`, by tenant."""
        over = {tenant for tenant, size in used.items() if self._quotas.excess(tenant, size)}
        if self._used != dict(used) or self.total != sum(used.values()) or set(self._over) != over:
            raise RetentionCorrupt("the bytes by tenant do not add up")
