"""The store on a terminal: how full each tier is, where sessions live, what came of reads and writes."""

from collections.abc import Sequence

from isthmus.config import show_size
from isthmus.contracts.blocks import NO_SESSION, StoreStats, Tier
from isthmus.state.kv.upkeep import Kept

_BAR = 40
_SESSIONS = 12
_MIB = 1 << 20


def status_lines(stats: StoreStats, entries: Sequence[Kept]) -> list[str]:
    """Everything `isthmus store status` shows."""
    lines = ["tiers"]
    for tier in stats.tiers:
        share = tier.used / tier.capacity if tier.capacity else 0.0
        full = round(_BAR * share)
        bar = "█" * full + "·" * (_BAR - full)
        size = f"{_human(tier.used)} of {_human(tier.capacity)}"
        lines.append(f"  {tier.tier:<8}{bar}  {share:6.1%}  {size:<24}{tier.records:>10,} records")
    lines += ["", *_residency(entries)]
    lines += ["", "operations by tier and reason"]
    lines += [f"  {name.replace('_', ' '):<40}{count:>14,}" for name, count in sorted(stats.counts.items())]
    if stats.gauges:
        lines += ["", "gauges"]
        lines += [f"  {name.replace('_', ' '):<40}{value:>14,.6g}" for name, value in sorted(stats.gauges.items())]
    lag = stats.sequence - stats.durable
    lines += ["", f"disk: {stats.backend or 'none'}; written up to {stats.sequence:,}, durable but for {max(0, lag):,}"]
    return lines


def _residency(entries: Sequence[Kept]) -> list[str]:
    """A line a session, the largest first: how much of it lies in each tier, to one scale."""
    sizes: dict[bytes, dict[Tier, int]] = {}
    for one in entries:
        session = sizes.setdefault(one.namespace_id + one.session_id, {})
        session[one.tier] = session.get(one.tier, 0) + one.record_bytes
    if not sizes:
        return ["residency: nothing is kept"]
    ordered = sorted(sizes.items(), key=lambda item: -max(item[1].values()))
    scale = max(max(found.values()) for _, found in ordered)
    lines = ["residency by session (█ dram, ▒ disk)"]
    for scope, found in ordered[:_SESSIONS]:
        owner = scope[-len(NO_SESSION) :]
        name = "no session" if owner == NO_SESSION else owner.hex()[:12]
        dram, disk = found.get(Tier.DRAM, 0), found.get(Tier.NVME, 0)
        lines.append(f"  {scope.hex()[:8]} {name:<12} {'█' * _marks(dram, scale):<{_BAR}} {_human(dram):>9} in DRAM")
        lines.append(f"  {'':<21} {'▒' * _marks(disk, scale):<{_BAR}} {_human(disk):>9} on disk")
    if len(ordered) > _SESSIONS:
        lines.append(f"  and {len(ordered) - _SESSIONS} smaller ones")
    return lines


def _marks(size: int, scale: int) -> int:
    """At least one mark for anything at all."""
    return max(1, round(_BAR * size / scale)) if size else 0


def _human(size: int) -> str:
    return f"{size / _MIB:.1f} MiB" if size % _MIB and size >= _MIB // 10 else show_size(size)
