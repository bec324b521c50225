"""Metrics that are there only when the engine tells of something."""

from prometheus_client.parser import text_string_to_metric_families

from isthmus.contracts.events import EngineStats
from isthmus.observability.metrics import PrometheusMetrics


def _samples(stats: EngineStats, name: str) -> list[tuple[dict[str, str], float]]:
    text = PrometheusMetrics("m").render(stats, None).decode()  # type: ignore[arg-type]
    families = text_string_to_metric_families(text)
    return [(one.labels, one.value) for family in families if family.name == name for one in family.samples]


def test_the_state_of_compiled_pieces_is_one_sample_with_its_reason() -> None:
    assert _samples(EngineStats(), "isthmus_compiled_pieces") == []
    stats = EngineStats(compiled="failed", compiled_reason="there is no g++ on this machine")
    labels = {"model_name": "m", "state": "failed", "reason": "there is no g++ on this machine"}
    assert _samples(stats, "isthmus_compiled_pieces") == [(labels, 1.0)]


def test_paging_is_told_by_event_tier_and_reason() -> None:
    stats = EngineStats(
        paging={
            "load_nvme_hit": 7,
            "load_state_corrupt": 1,
            "miss_recompute_cheaper": 2,
            "keep_stored": 3,
            "keep_owed_bytes": 4096,
            "tokens_dram": 64,
            "loading": 1,
            "break_even_tokens_nvme": 12.5,
        }
    )
    blocks = {
        (labels["event"], labels["tier"], labels["reason"]): value
        for labels, value in _samples(stats, "isthmus_store_blocks")
    }
    assert blocks == {
        ("load", "nvme", "hit"): 7,
        ("load", "state", "corrupt"): 1,
        ("miss", "", "recompute_cheaper"): 2,
        ("keep", "", "stored"): 3,
    }
    assert _samples(stats, "isthmus_reused_tokens") == [({"model_name": "m", "tier": "dram"}, 64)]
    gauges = {labels["what"]: value for labels, value in _samples(stats, "isthmus_paging")}
    assert gauges == {"keep_owed_bytes": 4096, "loading": 1, "break_even_tokens_nvme": 12.5}
