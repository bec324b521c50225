"""The error tree. Every error that crosses a boundary of Isthmus is one of these, and its `code` never changes.

    IsthmusError
    ├── InvalidInput          invalid_input        the caller sent something wrong: names the field and the limit
    │   ├── Unsupported       unsupported          well formed, but not something this build or model does
    │   ├── TooLarge          too_large            over a limit in bytes, tokens, depth or count
    │   └── UnknownModel      unknown_model        no such model (or adapter) is served here
    ├── Overloaded            overloaded           a bounded queue is full; retry after `retry_after_s`
    ├── Draining              draining             the process is shutting down and takes no new work
    ├── DeadlineExceeded      deadline_exceeded    the request's own deadline passed
    ├── EngineFailed          engine_failed        the engine process ended or broke its contract
    ├── ModelInvalid          model_invalid        a model folder cannot be served, and why (at start-up)
    ├── ExactUnavailable      exact_unavailable    this machine cannot keep the promise of exact mode (at start-up)
    ├── ConfigInvalid         config_invalid       a setting is wrong: names it and where it came from (at start-up)
    ├── WireViolation         wire_violation       a peer sent a frame that breaks the protocol or its limits
    ├── JournalError
    │   ├── JournalConflict   journal_conflict     the stream is not at the expected version
    │   └── JournalUnavailable journal_unavailable the journal cannot be written or read
    └── StoreError            store_error
        ├── StoreUnavailable  store_unavailable    no store answers, or it refuses us
        ├── StoreLocked       store_locked         another process has the log open
        ├── StoreFull         store_full           the disk has no room for the log (at start-up)
        ├── StoreCorrupt      store_corrupt        what says how the log is laid out cannot be trusted
        ├── StoreFormat       store_format         the log is of a version that this build does not read
        └── DiskFailed        disk_failed          a call to the disk failed: names the call and the errno

Errors are translated at the edges only: the gateway maps them to HTTP, the command line to an exit status.
Messages never contain prompt or output text; they name fields, limits, ids and lengths.
"""

import os
from typing import ClassVar


class IsthmusError(Exception):
    """Root of the tree. `code` is stable and machine-readable; the message is for people."""

    code: ClassVar[str] = "internal"


class InvalidInput(IsthmusError, ValueError):
    """The caller sent something wrong.

    `field` is the path of the offending field as the caller wrote it (empty when the whole input is meant).
    """

    code: ClassVar[str] = "invalid_input"

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field


class Unsupported(InvalidInput):
    """Well formed, but not something that this build or the served model does."""

    code: ClassVar[str] = "unsupported"


class TooLarge(InvalidInput):
    """Over a stated limit in bytes, tokens, depth or count."""

    code: ClassVar[str] = "too_large"


class UnknownModel(InvalidInput):
    """The named model or adapter is not served here."""

    code: ClassVar[str] = "unknown_model"


class Overloaded(IsthmusError):
    """A bounded queue is full. `retry_after_s` is the estimate of when it is worth trying again, in seconds."""

    code: ClassVar[str] = "overloaded"

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class Draining(IsthmusError):
    """The process is shutting down: what was accepted is finished, nothing new is taken."""

    code: ClassVar[str] = "draining"


class DeadlineExceeded(IsthmusError):
    """The request's own deadline passed before it finished."""

    code: ClassVar[str] = "deadline_exceeded"


class EngineFailed(IsthmusError):
    """The engine process ended, or broke its contract."""

    code: ClassVar[str] = "engine_failed"


class ModelInvalid(IsthmusError):
    """A model folder cannot be served. The message names the file, the entry and what was expected."""

    code: ClassVar[str] = "model_invalid"


class ExactUnavailable(IsthmusError):
    """The self-test of exact mode failed on this machine, so the mode is refused."""

    code: ClassVar[str] = "exact_unavailable"


class ConfigInvalid(IsthmusError):
    """A setting is wrong. The message names the setting, its source and what is accepted."""

    code: ClassVar[str] = "config_invalid"


class WireViolation(IsthmusError):
    """A peer sent a frame that breaks the protocol or one of its limits. The connection is closed."""

    code: ClassVar[str] = "wire_violation"


class JournalError(IsthmusError):
    """Root of the journal's errors."""

    code: ClassVar[str] = "journal_error"


class JournalConflict(JournalError):
    """The stream is not at the version that the append expected. Nothing was written."""

    code: ClassVar[str] = "journal_conflict"


class JournalUnavailable(JournalError):
    """The journal cannot be written or read. Nothing was acknowledged."""

    code: ClassVar[str] = "journal_unavailable"


class StoreError(IsthmusError):
    """Root of the block store's errors."""

    code: ClassVar[str] = "store_error"


class StoreUnavailable(StoreError):
    """No store answers at the address, or it refuses this process."""

    code: ClassVar[str] = "store_unavailable"


class StoreLocked(StoreError):
    """Another process has the log open."""

    code: ClassVar[str] = "store_locked"


class StoreFull(StoreError):
    """The disk has no room for a log of the size asked for."""

    code: ClassVar[str] = "store_full"


class StoreCorrupt(StoreError):
    """What says how the log is laid out cannot be trusted: nothing of it is used."""

    code: ClassVar[str] = "store_corrupt"


class StoreFormat(StoreError):
    """The log is of a format version that this build does not read. Nothing was changed."""

    code: ClassVar[str] = "store_format"


class DiskFailed(StoreError):
    """A call to the disk failed. `errno` is the operating system's number."""

    code: ClassVar[str] = "disk_failed"

    def __init__(self, call: str, errno: int) -> None:
        super().__init__(f"{call} failed: {os.strerror(errno)}")
        self.errno = errno
