"""How much memory this process may still take: what the machine has left, and what its cgroups leave it.

Both versions of cgroups, every level up to the root, page cache that the kernel would drop counted as free. Files that
are not there limit nothing.
"""

from collections.abc import Iterator
from pathlib import Path

from isthmus.contracts.errors import ConfigInvalid

MARGIN_BYTES = 64 << 20
"""Left for everything else: what is taken to the last byte ends in the kernel killing processes."""
_UNLIMITED = 1 << 60


def available_memory(root: Path = Path("/")) -> tuple[int, str]:
    """(bytes, what limits them): the least of `MemAvailable` and what each cgroup of this process has left."""
    found = [(_UNLIMITED, "nothing")]
    left = _field(root / "proc/meminfo", "MemAvailable:")
    if left is not None:
        found.append((left * 1024, "MemAvailable of /proc/meminfo"))
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if controllers == "":
            found += _version_2(root, path)
        elif "memory" in controllers.split(","):
            found += _version_1(root, path)
    return min(found)


def check_fits(wanted: int, root: Path = Path("/")) -> None:
    """Raise `ConfigInvalid`, naming the limit, unless `wanted` bytes of memory and a margin are to be had."""
    left, limit = available_memory(root)
    if wanted + MARGIN_BYTES > left:
        mib = 1 << 20
        raise ConfigInvalid(
            f"arena_bytes is {wanted} ({wanted // mib} MiB), accepted: at most "
            f"{max(0, left - MARGIN_BYTES) // mib} MiB, because {limit} leaves {left // mib} MiB "
            f"and {MARGIN_BYTES // mib} MiB stay free"
        )


def _version_2(root: Path, path: str) -> Iterator[tuple[int, str]]:
    for mount in ("sys/fs/cgroup", "sys/fs/cgroup/unified"):
        for folder, name in _levels(root / mount, path):
            limit, used = _number(folder / "memory.max"), _number(folder / "memory.current")
            if limit is not None and used is not None:
                yield (
                    limit - used + (_field(folder / "memory.stat", "inactive_file") or 0),
                    f"memory.max of cgroup {name}",
                )


def _version_1(root: Path, path: str) -> Iterator[tuple[int, str]]:
    for folder, name in _levels(root / "sys/fs/cgroup/memory", path):
        limit, used = _number(folder / "memory.limit_in_bytes"), _number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None and limit < _UNLIMITED:
            left = limit - used + (_field(folder / "memory.stat", "total_inactive_file") or 0)
            yield left, f"memory.limit_in_bytes of cgroup {name}"


def _levels(mount: Path, path: str) -> Iterator[tuple[Path, str]]:
    """The cgroup at `path` and those above it. One that a container does not see is skipped."""
    parts = [part for part in path.split("/") if part not in ("", "..")]
    for count in range(len(parts), -1, -1):
        yield mount.joinpath(*parts[:count]), "/" + "/".join(parts[:count])


def _number(path: Path) -> int | None:
    """None when the file is not there, or says `max`."""
    text = _read(path)
    return int(text) if text.isdigit() else None


def _field(path: Path, name: str) -> int | None:
    """The number behind `name` in a file of names and numbers; None when it is not there."""
    for line in _read(path).splitlines():
        words = line.split()
        if len(words) >= 2 and words[0] == name and words[1].isdigit():
            return int(words[1])
    return None


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
