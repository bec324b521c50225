"""The meter of the disk's limits measures something, everywhere, and cleans up."""

from pathlib import Path

import pytest

from isthmus.bench import disk_limits


def test_every_combination_is_measured_and_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk_limits, "SIZES", (65536, 1 << 20))
    monkeypatch.setattr(disk_limits, "DEPTHS", (1, 4))
    monkeypatch.setattr(disk_limits, "COPY_BYTES", 2 << 20)
    rates = list(disk_limits.disk_rates(tmp_path, 0.001, 4 << 20))
    assert len(rates) == len({(rate.backend, rate.operation, rate.size, rate.depth) for rate in rates}) == 16
    assert all(rate.gb_per_s > 0 and rate.cpu_ms_per_gb >= 0 for rate in rates)
    copies = list(disk_limits.copy_rates(0.001))
    assert len(copies) == 4
    assert all(rate.gb_per_s > 0 for rate in copies)
    assert list(tmp_path.iterdir()) == []
