"""The policies by name, for those who choose one."""

from collections.abc import Iterator, Mapping

from isthmus.contracts.errors import InvalidInput
from isthmus.state.kv.retention.arc import Arc
from isthmus.state.kv.retention.hints import HintLimits
from isthmus.state.kv.retention.leaf_first import LeafFirst
from isthmus.state.kv.retention.lru import Lru
from isthmus.state.kv.retention.order import MakeOrder, Order, Record
from isthmus.state.kv.retention.port import K
from isthmus.state.kv.retention.quotas import Quotas
from isthmus.state.kv.retention.s3fifo import S3Fifo

NAMES = ("lru", "s3fifo", "arc")
NO_QUOTAS = Quotas()


def make(name: str, capacity: int, quotas: Quotas = NO_QUOTAS, limits: HintLimits | None = None) -> LeafFirst[K]:
    """Retention by the policy `name` for a tier of `capacity` bytes. The capacity sizes what a policy remembers and its
    shares; to keep to it is the caller's. Without `limits` pins may cover half of it.

    Raises `InvalidInput` for an unknown name or a capacity under 1.
    """
    if capacity < 1:
        raise InvalidInput(f"a tier has at least 1 byte, not {capacity}", "capacity")
    return LeafFirst(_order(name, capacity), quotas, limits or HintLimits(capacity // 2))


def _order(name: str, capacity: int) -> MakeOrder[K]:
    def lru(records: Mapping[K, Record[K]], serials: Iterator[int]) -> Order[K]:
        return Lru(records, serials)

    def s3fifo(records: Mapping[K, Record[K]], serials: Iterator[int]) -> Order[K]:
        return S3Fifo(capacity, records, serials)

    def arc(records: Mapping[K, Record[K]], serials: Iterator[int]) -> Order[K]:
        return Arc(capacity, records, serials)

    orders: dict[str, MakeOrder[K]] = {"lru": lru, "s3fifo": s3fifo, "arc": arc}
    if name not in orders:
        raise InvalidInput(f"{name!r} is no policy; there are {', '.join(NAMES)}", "policy")
    return orders[name]
