"""`isthmus store`: run the block store of a host, look into one, verify it, make room, forget."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from isthmus.cli.failure import FAILED, OK, USAGE, CommandFailed
from isthmus.cli.flags import add_settings, load_settings
from isthmus.cli.terminal import BOLD, DIM, Screen
from isthmus.contracts.blocks import ID_BYTES, NO_SESSION, Tier

if TYPE_CHECKING:
    from isthmus.state.kv.administrator import Administrator
    from isthmus.state.kv.upkeep import Kept

_STORE = ("state_dir", "store_memory", "store_disk", "store_file", "store_policy", "store_wear")
_DAY_S = 86_400.0
_MOST_LISTED = 100_000
_MOST_PICTURED = 16_384
_PAGE = 1024


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "store",
        help="run, inspect and administer the block store",
        description=__doc__,
        epilog="`isthmus serve` has a store of its own unless it is told to use another; both answer at the socket\n"
        "<state_dir>/store/store.sock.\n\nexamples:\n  isthmus store status\n"
        "  isthmus store serve --store-disk 64GiB      then: isthmus serve --store <its socket>\n"
        "  isthmus store forget --session 'support chat 7'\n  isthmus store verify",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    kinds = parser.add_subparsers(title="what to do", metavar="WHAT", required=True)
    serve = _kind(kinds, "serve", "run the store of this host until told to end (the daemon)")
    add_settings(serve, only=_STORE)
    serve.set_defaults(run=run_serve)
    status = _kind(kinds, "status", "tiers, residency, hits and misses by reason, write amplification")
    status.add_argument("--json", action="store_true", help="as JSON")
    ls = _kind(kinds, "ls", "the records that are kept")
    ls.add_argument("--tier", choices=(Tier.DRAM.value, Tier.NVME.value), default=Tier.NVME.value, help="[%(default)s]")
    ls.add_argument("--limit", type=int, default=50, help="most lines [%(default)s]")
    verify = _kind(kinds, "verify", "read and verify everything that is kept; status 1 when something is wrong")
    evict = _kind(kinds, "evict", "make room")
    evict.add_argument(
        "--tier", choices=(Tier.DRAM.value, Tier.NVME.value), default=Tier.DRAM.value, help="[%(default)s]"
    )
    evict.add_argument("size", help="how much, e.g. 64MiB")
    compact = _kind(kinds, "compact", "rewrite what is left of segments that hold little")
    forget = _kind(
        kinds, "forget", "erase a tenant's state, or one session's, from every tier; durable when it returns"
    )
    forget.add_argument(
        "--tenant", default="", help="name of the tenant, or the 32 hex digits of its id [the default one]"
    )
    forget.add_argument(
        "--session", default="", help="name of the session, or id=<32 hex digits>; without: all of them"
    )
    forget.add_argument("--yes", action="store_true", help="do not ask when a whole tenant is to be forgotten")
    bench = _kind(kinds, "bench", "the same as `isthmus bench store`; see its help")
    bench.add_argument("rest", nargs=argparse.REMAINDER, help=argparse.SUPPRESS)
    bench.set_defaults(run=run_bench)
    for parser_, run in ((status, "status"), (ls, "ls"), (verify, "verify"), (evict, "evict"), (compact, "compact")):
        parser_.set_defaults(run=run_admin, verb=run)
    forget.set_defaults(run=run_admin, verb="forget")
    for one in (status, ls, verify, evict, compact, forget):
        one.add_argument("--socket", type=Path, help="of the store [<state_dir>/store/store.sock]")
        one.add_argument("--timeout-s", type=float, default=600.0, help="give up after so long [%(default)s]")
        add_settings(one, only=("state_dir",))


def _kind(
    kinds: "argparse._SubParsersAction[argparse.ArgumentParser]", name: str, text: str
) -> argparse.ArgumentParser:
    return kinds.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")


def run_serve(arguments: argparse.Namespace) -> int:
    """Run the daemon."""
    settings = load_settings(arguments).settings
    from isthmus.app import serve_store

    screen = Screen()

    def ready(socket: str) -> None:
        screen.err.write(f"Isthmus keeps blocks at {socket}\n\nisthmus serve --store {socket}\n")
        screen.err.flush()

    serve_store(settings, ready)
    return OK


def run_bench(arguments: argparse.Namespace) -> int:
    """Hand over to `isthmus bench store`."""
    from isthmus.cli.main import main

    return main(["bench", "store", *arguments.rest])


def run_admin(arguments: argparse.Namespace) -> int:
    """Ask a running store."""
    from isthmus.contracts.clock import SystemClock
    from isthmus.state.kv.administrator import Administrator

    settings = load_settings(arguments).settings
    if not 0 < arguments.timeout_s <= _DAY_S:
        raise CommandFailed("--timeout-s is over 0 and at most a day", USAGE)
    screen = Screen()
    admin = Administrator(arguments.socket or settings.store_socket, SystemClock())
    try:
        match arguments.verb:
            case "status":
                return _status(admin, screen, as_json=arguments.json)
            case "ls":
                return _ls(admin, screen, Tier(arguments.tier), arguments.limit)
            case "verify":
                return _verify(admin, screen, arguments.timeout_s)
            case "evict":
                freed = admin.evict(Tier(arguments.tier), _size(arguments.size), arguments.timeout_s)
                screen.line(f"evicted {freed} bytes from {arguments.tier}")
                return OK
            case "compact":
                screen.line(f"freed {admin.compact(arguments.timeout_s)} segments")
                return OK
            case _:
                return _forget(admin, screen, arguments, settings.secret_path)
    finally:
        admin.close()


def _status(admin: "Administrator", screen: Screen, *, as_json: bool) -> int:
    import msgspec

    from isthmus.cli.store_picture import status_lines

    stats = admin.status()
    if as_json:
        screen.line(msgspec.json.format(msgspec.json.encode(stats), indent=1).decode())
        return OK
    entries = [one for tier in (Tier.DRAM, Tier.NVME) for one in _entries(admin, tier)]
    for line in status_lines(stats, entries):
        screen.line(line, *([] if line.startswith(" ") or not line else [BOLD]))
    return OK


def _entries(admin: "Administrator", tier: Tier) -> "list[Kept]":
    """What the picture is drawn from; nothing of a tier that this store does not have."""
    held = {one.tier for one in admin.status().tiers}
    return _listed(admin, tier, _MOST_PICTURED) if tier.value in held else []


def _listed(admin: "Administrator", tier: Tier, most: int) -> "list[Kept]":
    """At most `most` records, asked for page by page."""
    found: list[Kept] = []
    while len(found) < most:
        limit = min(_PAGE, most - len(found))
        page = admin.ls(tier, len(found), limit)
        found += page
        if len(page) < limit:
            break
    return found


def _ls(admin: "Administrator", screen: Screen, tier: Tier, limit: int) -> int:
    if not 1 <= limit <= _MOST_LISTED:
        raise CommandFailed(f"--limit is 1 to {_MOST_LISTED}", USAGE)
    screen.line(f"{'key':<18}{'tenant':<18}{'session':<18}{'kind':<7}{'bytes':>10}  lifetime  segment  pins", DIM)
    for one in _listed(admin, tier, limit):
        session = "-" if one.session_id == NO_SESSION else one.session_id.hex()[:16]
        screen.line(
            f"{one.key.hex()[:16]:<18}{one.namespace_id.hex()[:16]:<18}{session:<18}{one.kind.name.lower():<7}"
            f"{one.record_bytes:>10}  {one.lifetime.name.lower():<8}  {one.segment if one.segment >= 0 else '-':>7}"
            f"  {one.pins:>4}"
        )
    return OK


def _verify(admin: "Administrator", screen: Screen, timeout_s: float) -> int:
    found = admin.verify(timeout_s)
    screen.line(f"dram  {found.dram_good:>12,} good  {found.dram_corrupt:>8,} damaged")
    unreadable = found.nvme_unreadable
    screen.line(f"disk  {found.nvme_good:>12,} good  {found.nvme_corrupt:>8,} damaged  {unreadable:>8,} unreadable")
    return FAILED if found.dram_corrupt or found.nvme_corrupt or unreadable else OK


def _forget(admin: "Administrator", screen: Screen, arguments: argparse.Namespace, secret: Path) -> int:
    """Names become ids by the installation's secret, which only its owner can read; ids are taken as they are."""
    tenant, session = _scope(arguments.tenant, arguments.session, secret)
    if session == NO_SESSION and not arguments.yes:
        raise CommandFailed("this forgets all sessions of the tenant: say --yes, or name one by --session", USAGE)
    erasure = admin.forget(tenant, session, arguments.timeout_s)
    what = "the tenant" if session == NO_SESSION else "the session"
    screen.line(f"forgotten: {what} is gone from every tier, durably (erasure {erasure.number})")
    return OK


def _scope(tenant: str, session: str, secret: Path) -> tuple[bytes, bytes]:
    from isthmus.contracts.blocks import namespace_id, session_id
    from isthmus.trust.namespace import DEFAULT_TENANT, derive_namespace, read_secret

    given, named = _id(tenant), session.removeprefix("id=")
    if given is not None:
        chosen = NO_SESSION if not session else _id(named)
        if chosen is None:
            raise CommandFailed(
                "with the id of a tenant a session is named by its id: --session id=<32 hex digits>", USAGE
            )
        return given, chosen
    namespace = derive_namespace(read_secret(secret), tenant or DEFAULT_TENANT)
    chosen = _id(named) if session.startswith("id=") else session_id(namespace, session)
    if chosen is None:
        raise CommandFailed("--session id= takes 32 hex digits", USAGE)
    return namespace_id(namespace), chosen


def _id(text: str) -> bytes | None:
    try:
        raw = bytes.fromhex(text) if len(text) == 2 * ID_BYTES else b""
    except ValueError:
        return None
    return raw or None


def _size(text: str) -> int:
    from isthmus.config import parse_size

    size = parse_size(text)
    if size is None:
        raise CommandFailed(f"{text[:40]!r} is no size, e.g. 64MiB", USAGE)
    return size
