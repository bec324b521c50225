"""What `isthmus bench store` measures: this store in its forms, plain copies, and stores of others.

Each is a tree of processes that answers questions (store_records.py), and is stopped while another is measured.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from isthmus.bench.targets import LinesTarget

PEERS = ("lmcache", "mooncake")
MEMCPY, MEMCPY_HOT = "memcpy", "memcpy-hot"
ARENA, DAEMON, STORE, LOG = "arena", "daemon", "store", "log"
LOG_DURABLE = "log-durable"
UNVERIFIED = "-unverified"
OURS = (MEMCPY, MEMCPY_HOT, ARENA, ARENA + UNVERIFIED, DAEMON, STORE, LOG, LOG + UNVERIFIED, LOG_DURABLE)

RIVALS = {
    ARENA: ("lmcache-cpu", "mooncake-local"),
    DAEMON: ("mooncake-tcp",),
    STORE: ("lmcache-disk", "lmcache-fs_native"),
    LOG: ("lmcache-disk", "lmcache-fs_native"),
}
"""Which of the others keep records in the same place as ours."""

_KINDS = {"lmcache": ("cpu", "disk", "fs_native"), "mooncake": ("local", "tcp")}
_SCRIPTS = Path("benchmarks/peers")


@dataclass(frozen=True, slots=True)
class Places:
    """Where targets find and put things: files on the disk that is measured, logs and sockets, the memory of producer
    and consumer (a path, and bytes of each), and the environments of peers.
    """

    folder: Path
    work: Path
    memory: str
    size: int
    peers: Path


def python_of(peer: str, places: Places) -> Path:
    """The interpreter of a peer's environment, whether it is there or not."""
    return places.peers.absolute() / peer / "bin" / "python"


def make_targets(kinds: Sequence[str], peers: Sequence[str], places: Places) -> list[LinesTarget]:
    """Targets for forms of ours (of `OURS`) and for every form of some peers."""
    found = [_own(kind, places) for kind in kinds]
    for peer in peers:
        found += [_peer(peer, kind, places) for kind in _KINDS[peer]]
    return found


def _own(kind: str, places: Places) -> LinesTarget:
    folder = _made((places.work if kind == DAEMON else places.folder) / kind)
    command = [sys.executable, "-m", "isthmus.bench.store_ours", kind, str(folder), places.memory, str(places.size)]
    return LinesTarget(kind, command, {}, places.work / f"{kind}.log")


def _peer(peer: str, kind: str, places: Places) -> LinesTarget:
    name = f"{peer}-{kind}"
    command = [str(python_of(peer, places)), str(_SCRIPTS / f"{peer}_store.py"), kind]
    if peer == "lmcache":
        command.append(str(_made(places.folder / name)))
    quiet = {"LMCACHE_TRACK_USAGE": "false", "LMCACHE_LOG_LEVEL": "WARNING"}
    return LinesTarget(name, [*command, places.memory, str(places.size)], quiet, places.work / f"{name}.log")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder
