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
