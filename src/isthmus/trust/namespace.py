"""Tenant namespaces: the key material that keeps one tenant's state apart from another's.

A namespace is derived from a per-installation secret that never leaves this host and never reaches a worker:

    namespace = BLAKE3 derive_key("isthmus tenant namespace v1", secret, tenant, version)

so equal text of two tenants never has equal keys, and a new version forgets everything the old one could reach. The
secret is kept in a file that only its owner may read; it is made on the first start and is stable over restarts, so
that stored state stays reachable.
"""

import os
import stat
from pathlib import Path

from blake3 import blake3

from isthmus.contracts.clock import Entropy
from isthmus.contracts.errors import ConfigInvalid
from isthmus.contracts.framing import frame
from isthmus.contracts.ids import Namespace

SECRET_BYTES = 32
DEFAULT_TENANT = "default"
_CONTEXT = "isthmus tenant namespace v1"


def derive_namespace(secret: bytes, tenant: str, version: int = 1) -> Namespace:
    """The namespace of `tenant`. Another version is another namespace."""
    material = frame(b"tenant", secret, tenant.encode(), version.to_bytes(8, "little"))
    return Namespace(blake3(material, derive_key_context=_CONTEXT).digest())


def load_secret(path: Path, entropy: Entropy) -> bytes:
    """The installation's secret, made when `path` does not exist yet.

    Raises `ConfigInvalid` when others may read it, when it has the wrong length, or when it cannot be made.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return read_secret(path)
    except OSError as error:
        raise ConfigInvalid(f"state_dir: {path} cannot be made: {error.strerror}") from error
    secret = entropy.token_bytes(SECRET_BYTES)
    with os.fdopen(handle, "wb") as file:
        file.write(secret)
        file.flush()
        os.fsync(file.fileno())
    return secret


def read_secret(path: Path) -> bytes:
    """The installation's secret. Raises `ConfigInvalid` when it is not there, or not its owner's alone."""
    try:
        with path.open("rb") as file:
            if stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigInvalid(f"{path} may be read by others: chmod 600 it, or delete it to make a new secret")
            secret = file.read(SECRET_BYTES + 1)
    except OSError as error:
        raise ConfigInvalid(f"state_dir: {path} cannot be read: {error.strerror}") from error
    if len(secret) != SECRET_BYTES:
        raise ConfigInvalid(f"{path} has not {SECRET_BYTES} bytes: delete it to make a new secret")
    return secret
