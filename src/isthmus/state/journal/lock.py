"""One writer a journal: an advisory lock of the operating system, which the death of its holder releases."""

import fcntl
import os
from pathlib import Path

from isthmus.contracts.errors import JournalUnavailable


class WriterLock:
    """Holds `<journal>.lock` from construction to `release`. Raises `JournalUnavailable` when another holder lives."""

    def __init__(self, journal: Path) -> None:
        path = journal.with_name(journal.name + ".lock")
        try:
            self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise JournalUnavailable(f"{path} cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = os.pread(self._descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._descriptor)
            raise JournalUnavailable(
                f"{journal} already has a writer (process {holder}): stop it, or set another state directory"
            ) from error
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, f"{os.getpid()}\n".encode(), 0)

    def release(self) -> None:
        """Let another process write. The file stays: removing it would race with the next holder."""
        os.close(self._descriptor)
