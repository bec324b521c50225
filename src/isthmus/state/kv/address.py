"""The daemon's place in the file system: a private folder with the socket, its lock and the secret behind its tokens.

<socket>          0600, the socket
<socket>.lock     held by the running daemon; its death releases it
<socket>.secret   0600, 32 random bytes in hex, made when there is none. Tokens are derived from it: deleting it
                  before a start makes all tokens given out so far worthless
"""

import contextlib
import fcntl
import os
import socket
import stat
from pathlib import Path

from isthmus.contracts.clock import Entropy
from isthmus.contracts.errors import ConfigInvalid, StoreLocked, StoreUnavailable
from isthmus.state.kv.wire import SECRET_BYTES

BACKLOG = 128
_HEX = 2 * SECRET_BYTES


def secret_path(path: Path) -> Path:
    """Where the secret of the daemon at `path` is."""
    return path.with_name(path.name + ".secret")


def read_secret(path: Path) -> bytes:
    """The secret of the daemon at `path`. Raises `StoreUnavailable` when it is not there, or not ours to read."""
    file = secret_path(path)
    try:
        text = file.read_text()
        return bytes.fromhex(text.strip()) if len(text.strip()) == _HEX else b""
    except (OSError, ValueError) as error:
        raise StoreUnavailable(f"{file} cannot be read: {error}") from error


class Address:
    """The socket of one daemon, bound and listening, from construction to `close`.

    Raises `StoreLocked` when a daemon serves there, `ConfigInvalid` when the folder is not private.
    """

    def __init__(self, path: Path, entropy: Entropy) -> None:
        self.path = path
        make_private(path.parent)
        self._lock = _lock(path.with_name(path.name + ".lock"))
        with contextlib.ExitStack() as undo:
            undo.callback(os.close, self._lock)
            self.secret = _secret(path, entropy)
            self.socket = undo.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            try:
                path.unlink(missing_ok=True)  # what a daemon left that was killed: nobody else holds the lock
                self.socket.bind(str(path))
                path.chmod(0o600)
                self.socket.listen(BACKLOG)
            except OSError as error:
                raise ConfigInvalid(f"{path} cannot be served: {error}") from error
            undo.pop_all()

    def wake(self) -> None:
        """Give whoever accepts something to accept."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as knock, contextlib.suppress(OSError):
            knock.settimeout(0)
            knock.connect(str(self.path))

    def close(self) -> None:
        """Take the socket away and let another daemon serve."""
        self.socket.close()
        self.path.unlink(missing_ok=True)
        os.close(self._lock)


def make_private(folder: Path) -> None:
    """Make the folder, for its owner alone. Raises `ConfigInvalid` when that cannot be, or it is others', too."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        raise ConfigInvalid(f"{folder} cannot be made: {error}") from error
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
        raise ConfigInvalid(f"the folder of the socket, {folder}, has to be its owner's alone (mode 0700)")


def _lock(path: Path) -> int:
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be opened: {error}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        holder = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(descriptor)
        raise StoreLocked(f"a daemon (process {holder}) serves here already: {path}") from error
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
    return descriptor


def _secret(path: Path, entropy: Entropy) -> bytes:
    """The secret that is there, or a new one. Raises `ConfigInvalid` for one that others may read."""
    file = secret_path(path)
    try:
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        mode = file.stat()
        if mode.st_uid != os.geteuid() or stat.S_IMODE(mode.st_mode) & 0o077:
            raise ConfigInvalid(f"{file} has to be its owner's alone (mode 0600)") from None
        secret = read_secret(path)
        if len(secret) != SECRET_BYTES:
            raise ConfigInvalid(
                f"{file} holds no secret of {SECRET_BYTES} bytes in hex: delete it for a new one"
            ) from None
        return secret
    secret = entropy.token_bytes(SECRET_BYTES)
    with os.fdopen(descriptor, "w") as out:
        out.write(secret.hex() + "\n")
        out.flush()
        os.fsync(out.fileno())
    return secret
