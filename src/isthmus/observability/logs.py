"""JSON log lines: one a request, ids, lengths, times and outcomes only. Implements `contracts.telemetry.RequestLog`.

A writer thread owns the stream, behind a bounded queue: a stalled terminal or pipe can neither block the event loop nor
grow memory; lines that do not fit are dropped and counted. The record type has no field that could hold content.
"""

import threading
from collections.abc import Callable
from queue import Empty, Full, Queue
from typing import BinaryIO

import msgspec

from isthmus.contracts.telemetry import RequestRecord

DEFAULT_CAPACITY = 4096
MAX_LINE_BYTES = 4096

_encoder = msgspec.json.Encoder()


class JsonRequestLog:
    """Writes one JSON line for each record to `stream`. `dropped` is called for each line that could not be taken."""

    def __init__(
        self, stream: BinaryIO, *, capacity: int = DEFAULT_CAPACITY, dropped: Callable[[], None] | None = None
    ) -> None:
        self._stream = stream
        self._dropped = dropped
        self._queue: Queue[bytes | None] = Queue(capacity)
        self.drops = 0
        self._thread = threading.Thread(target=self._run, name="isthmus-log", daemon=True)
        self._thread.start()

    def write(self, record: RequestRecord) -> None:
        """See `RequestLog`."""
        line = _encoder.encode(record) + b"\n"
        if len(line) > MAX_LINE_BYTES:
            self._drop()
            return
        try:
            self._queue.put_nowait(line)
        except Full:
            self._drop()

    def close(self, timeout_s: float = 2.0) -> bool:
        """Write what is queued and end the thread; False when the stream did not take it within `timeout_s` seconds."""
        try:
            self._queue.put(None, timeout=timeout_s)
        except Full:
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _drop(self) -> None:
        self.drops += 1
        if self._dropped is not None:
            self._dropped()

    def _run(self) -> None:
        """Write lines until told to stop; several that are waiting go out in one write."""
        ending = False
        while not ending:
            lines = [self._queue.get()]
            try:
                while len(lines) < DEFAULT_CAPACITY:
                    lines.append(self._queue.get_nowait())
            except Empty:
                pass
            ending = None in lines
            data = b"".join(line for line in lines if line is not None)
            try:
                self._stream.write(data)
                self._stream.flush()
            except (OSError, ValueError):
                # The log's reader is gone. Serving goes on; what could not be written is counted.
                for line in lines:
                    if line is not None:
                        self._drop()
