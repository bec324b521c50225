"""The log's bound: a stalled or broken stream neither blocks nor grows, and what is lost is counted."""

import io
import json
import threading

from isthmus.contracts.telemetry import RequestRecord
from isthmus.observability.logs import JsonRequestLog

RECORD = RequestRecord("r-1", "GET", "/health", 200, 1.0, 0.5, 0, 10)


class Stalled(io.RawIOBase):
    """A stream whose reader has stopped, until `go` is set."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.entered = threading.Event()
        self.data = b""

    def write(self, data: bytes) -> int:
        self.entered.set()
        self.go.wait(20)
        self.data += data
        return len(data)


def test_lines_are_json_one_a_record() -> None:
    stream = io.BytesIO()
    log = JsonRequestLog(stream)
    for _ in range(3):
        log.write(RECORD)
    assert log.close()
    lines = stream.getvalue().splitlines()
    assert [json.loads(line)["status"] for line in lines] == [200, 200, 200]


def test_a_stalled_stream_drops_and_counts_instead_of_waiting() -> None:
    stream, told = Stalled(), []
    log = JsonRequestLog(stream, capacity=4, dropped=lambda: told.append(1))
    log.write(RECORD)
    assert stream.entered.wait(20)
    for _ in range(10):
        log.write(RECORD)
    assert log.drops == len(told) == 6
    stream.go.set()
    assert log.close(20)
    assert len(stream.data.splitlines()) == 5


def test_a_stream_that_never_moves_does_not_hold_up_the_end() -> None:
    stream = Stalled()
    log = JsonRequestLog(stream, capacity=1)
    log.write(RECORD)
    assert stream.entered.wait(20)
    log.write(RECORD)
    assert log.close(0.01) is False
    stream.go.set()


def test_a_closed_stream_is_counted() -> None:
    stream = io.BytesIO()
    stream.close()
    log = JsonRequestLog(stream)
    log.write(RECORD)
    assert log.close()
    assert log.drops == 1
