"""Tenant namespaces: apart for every tenant and version, stable over restarts, readable by the owner alone."""

from pathlib import Path

import pytest

from isthmus.contracts.clock import SystemEntropy
from isthmus.contracts.errors import ConfigInvalid
from isthmus.trust.namespace import derive_namespace, load_secret


def test_tenants_versions_and_secrets_are_apart() -> None:
    spaces = {derive_namespace(s, t, v) for s in (b"a" * 32, b"b" * 32) for t in ("x", "y") for v in (1, 2)}
    assert len(spaces) == 8
    assert all(len(space) == 32 for space in spaces)


def test_the_secret_is_made_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "state" / "tenant.secret"
    first = load_secret(path, SystemEntropy())
    assert load_secret(path, SystemEntropy()) == first
    assert path.stat().st_mode & 0o777 == 0o600


def test_a_secret_that_others_may_read_or_of_a_wrong_size_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tenant.secret"
    load_secret(path, SystemEntropy())
    path.chmod(0o644)
    with pytest.raises(ConfigInvalid, match="read by others"):
        load_secret(path, SystemEntropy())
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(ConfigInvalid, match="32 bytes"):
        load_secret(path, SystemEntropy())


def test_a_state_dir_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigInvalid, match="state_dir"):
        load_secret(tmp_path / "file" / "tenant.secret", SystemEntropy())
