"""Prometheus metrics of a server, in a registry of its own. Implements `contracts.telemetry.Metrics`.

Names are vLLM's (`vllm:`) where the meaning is the same, so that its dashboards work; the rest is `isthmus_`.
Counters that the engine keeps itself are read from its snapshot at scrape time, so that they count each thing once.
"""

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from isthmus.contracts.events import EngineStats, ModelInfo
from isthmus.contracts.journal import LineageFact
from isthmus.contracts.telemetry import Count, RequestRecord

_SECONDS_LONG = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 60.0, 120.0, 300.0)
_SECONDS_FIRST = (0.005, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.25, 2.5, 5.0, 10.0, 30.0, 60.0)
_SECONDS_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)

_GAUGES = (
    ("vllm:num_requests_running", "Requests in the running batch.", "running"),
    ("vllm:num_requests_waiting", "Requests in the engine's queue.", "waiting"),
    ("isthmus_blocks", "KV blocks of the device pool.", "blocks_total"),
    ("isthmus_blocks_free", "KV blocks that hold nothing.", "blocks_free"),
    ("isthmus_blocks_cached", "KV blocks kept for reuse and leased by nobody.", "blocks_cached"),
    ("isthmus_blocks_leased", "KV blocks in use by requests.", "blocks_leased"),
    ("isthmus_state_slots", "Slots of recurrent state (hybrid models).", "states_total"),
    ("isthmus_state_slots_free", "State slots that hold nothing.", "states_free"),
    ("isthmus_state_snapshots", "State snapshots kept for reuse.", "states_cached"),
    ("isthmus_state_slots_leased", "State slots in use by requests.", "states_leased"),
)
_COUNTERS = (
    ("vllm:num_preemptions", "Preemptions.", "preemptions"),
    ("vllm:prefix_cache_queries", "Prompt tokens looked up in the prefix cache.", "prompt_tokens"),
    ("vllm:prefix_cache_hits", "Prompt tokens whose state was reused.", "cached_tokens"),
    ("vllm:spec_decode_num_draft_tokens", "Draft tokens proposed.", "draft_tokens"),
    ("vllm:spec_decode_num_accepted_tokens", "Draft tokens accepted.", "accepted_drafts"),
    ("isthmus_engine_steps", "Steps of the engine loop.", "steps"),
    ("isthmus_engine_steps_ahead", "Steps that were scheduled while another ran.", "steps_ahead"),
    ("isthmus_engine_computed_tokens", "Prompt tokens computed rather than reused.", "computed_tokens"),
    ("isthmus_engine_dedup_waits", "Waits for a block that another request was computing.", "dedup_waits"),
    ("isthmus_engine_rejected", "Requests the engine refused.", "rejected"),
    ("isthmus_engine_aborted", "Requests aborted.", "aborted"),
    ("isthmus_engine_finished", "Requests finished.", "finished"),
    ("isthmus_snapshots_taken", "State snapshots taken.", "snapshots_taken"),
    ("isthmus_snapshots_evicted", "State snapshots evicted.", "snapshots_evicted"),
    ("isthmus_snapshot_hits", "Requests that started from a state snapshot.", "snapshot_hits"),
    ("isthmus_constrained", "Requests with a constraint on their output.", "constrained"),
    ("isthmus_grammar_refused", "Constraints that were refused or could not be followed.", "grammar_refused"),
    ("isthmus_grammar_restarts", "Restarts of the grammar process.", "grammar_restarts"),
    ("isthmus_grammar_masks", "Masks computed by the grammar process.", "masks_computed"),
    ("isthmus_mask_wait_seconds", "What constrained outputs waited for masks, summed.", "mask_wait_s"),
)


class _EngineCollector(Collector):
    """The engine's last snapshot as metric families."""

    def __init__(self, model: str) -> None:
        self._model = model
        self.stats = EngineStats()

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`."""
        labels = ["model_name"]
        for name, text, attribute in _GAUGES:
            yield self._valued(GaugeMetricFamily(name, text, labels=labels), getattr(self.stats, attribute))
        used = self.stats.blocks_leased / self.stats.blocks_total if self.stats.blocks_total else 0.0
        text = "Share of KV blocks in use by requests (1 is all)."
        yield self._valued(GaugeMetricFamily("vllm:kv_cache_usage_perc", text, labels=labels), used)
        for name, text, attribute in _COUNTERS:
            yield self._valued(CounterMetricFamily(name, text, labels=labels), getattr(self.stats, attribute))
        text = "Where the time of steps goes, by part; only with the setting `profile_steps`."
        parts = CounterMetricFamily("isthmus_step_seconds", text, labels=["model_name", "part"])
        for part, seconds in self.stats.profile_s.items():
            parts.add_metric([self._model, part], seconds)
        yield parts
        yield from self._paging()
        text = "1 for the state of what is compiled for the device (building, ready, failed), and why."
        pieces = GaugeMetricFamily("isthmus_compiled_pieces", text, labels=["model_name", "state", "reason"])
        if self.stats.compiled:
            pieces.add_metric([self._model, self.stats.compiled, self.stats.compiled_reason], 1)
        yield pieces

    def _paging(self) -> Iterable[Metric]:
        """Loads from the block store and writes to it, by what came of them; gauges beside them."""
        text = (
            "Blocks loaded from the store (load), looked for in vain (miss), written behind (keep); by tier and reason."
        )
        events = CounterMetricFamily("isthmus_store_blocks", text, labels=["model_name", "event", "tier", "reason"])
        text = "Prompt tokens whose state was reused, by the tier it came from."
        tokens = CounterMetricFamily("isthmus_reused_tokens", text, labels=["model_name", "tier"])
        text = "Gauges of paging: loads under way, bytes owed to the store, break-even lengths in tokens by tier."
        gauges = GaugeMetricFamily("isthmus_paging", text, labels=["model_name", "what"])
        for name, value in self.stats.paging.items():
            event, _, rest = name.partition("_")
            if event == "load" and rest != "ing":
                tier, _, reason = rest.partition("_")
                events.add_metric([self._model, event, tier, reason], value)
            elif event == "tokens":
                tokens.add_metric([self._model, rest], value)
            elif event in ("miss", "keep", "hint", "early") and rest != "owed_bytes":
                events.add_metric([self._model, event, "", rest], value)
            else:
                gauges.add_metric([self._model, name], value)
        yield events
        yield tokens
        yield gauges

    def _valued(self, family: GaugeMetricFamily | CounterMetricFamily, value: float) -> Metric:
        family.add_metric([self._model], value)
        return family


class _Watched(Collector):
    """A counter that another part keeps."""

    def __init__(self, name: str, text: str, read: Callable[[], float]) -> None:
        self._name, self._text, self._read = name, text, read

    def collect(self) -> Iterable[Metric]:
        """See `prometheus_client.registry.Collector`."""
        yield CounterMetricFamily(self._name, self._text, value=self._read())


class PrometheusMetrics:
    """See `contracts.telemetry.Metrics`."""

    def __init__(self, model: str) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        self._engine = _EngineCollector(model)
        self._registry.register(self._engine)
        name = {"model_name": model}

        def histogram(metric: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            family = Histogram(metric, text, ["model_name"], buckets=buckets, registry=self._registry)
            return family.labels(**name)

        def counter(metric: str, text: str) -> Counter:
            return Counter(metric, text, ["model_name"], registry=self._registry).labels(**name)

        self._ttft = histogram("vllm:time_to_first_token_seconds", "Received to first token.", _SECONDS_FIRST)
        self._itl = histogram("vllm:inter_token_latency_seconds", "Between tokens.", _SECONDS_TOKEN)
        self._e2e = histogram("vllm:e2e_request_latency_seconds", "Received to finish.", _SECONDS_LONG)
        self._queue = histogram("vllm:request_queue_time_seconds", "In the engine's queue.", _SECONDS_FIRST)
        self._prefill = histogram("vllm:request_prefill_time_seconds", "Start to first token.", _SECONDS_FIRST)
        self._decode = histogram("vllm:request_decode_time_seconds", "First token to finish.", _SECONDS_LONG)
        self._prompt_sizes = histogram("vllm:request_prompt_tokens", "Prompt tokens of a request.", _TOKENS)
        self._output_sizes = histogram("vllm:request_generation_tokens", "Output tokens of a request.", _TOKENS)
        self._prompt = counter("vllm:prompt_tokens", "Prompt tokens of engine requests that ended.")
        self._output = counter("vllm:generation_tokens", "Output tokens of engine requests that ended.")
        self._success = Counter(
            "vllm:request_success", "Requests finished.", ["model_name", "finished_reason"], registry=self._registry
        )
        self._model = model
        self._http = Counter("isthmus_http_requests", "HTTP requests.", ["route", "status"], registry=self._registry)
        self._http_seconds = Histogram(
            "isthmus_http_request_seconds", "Received to answered.", ["route"], buckets=_SECONDS_LONG,
            registry=self._registry,
        )  # fmt: skip
        self._edge = Counter("isthmus_edge", "Aborts, refusals and timeouts of the edge.", ["what"],
                             registry=self._registry)  # fmt: skip
        self._open = Gauge("isthmus_connections", "Open client connections.", registry=self._registry)
        self._answering = Gauge("isthmus_requests_in_flight", "Requests being answered.", registry=self._registry)
        self._drops = Counter("isthmus_log_dropped", "Log lines dropped.", registry=self._registry)
        for what in Count:
            self._edge.labels(what=what.value)

    def request_ended(self, record: RequestRecord) -> None:
        """See `Metrics`."""
        self._http.labels(route=record.route, status=str(record.status)).inc()
        self._http_seconds.labels(route=record.route).observe(record.total_s)

    def sequence_ended(self, fact: LineageFact) -> None:
        """See `Metrics`."""
        self._prompt.inc(fact.prompt_tokens)
        self._output.inc(fact.output_tokens)
        if fact.outcome not in {"stop", "length"}:
            return
        self._success.labels(model_name=self._model, finished_reason=fact.outcome).inc()
        self._e2e.observe(fact.total_s)
        self._queue.observe(fact.queue_s)
        self._prefill.observe(fact.prefill_s)
        self._decode.observe(fact.decode_s)
        self._prompt_sizes.observe(fact.prompt_tokens)
        self._output_sizes.observe(fact.output_tokens)

    def first_token(self, seconds: float) -> None:
        """See `Metrics`."""
        self._ttft.observe(seconds)

    def inter_token(self, seconds: float, tokens: int) -> None:
        """See `Metrics`. A step of several tokens counts as that many equal intervals."""
        for _ in range(tokens):
            self._itl.observe(seconds / tokens)

    def count(self, what: Count) -> None:
        """See `Metrics`."""
        self._edge.labels(what=what.value).inc()

    def connections(self, open_now: int, in_flight: int) -> None:
        """See `Metrics`."""
        self._open.set(open_now)
        self._answering.set(in_flight)

    def watch(self, name: str, text: str, read: Callable[[], float]) -> None:
        """Publish a counter that lives elsewhere: `read` is asked at scrape time. Names without `_total`."""
        self._registry.register(_Watched(name, text, read))

    def log_dropped(self) -> None:
        """A log line was dropped (handed to `JsonRequestLog` as its callback)."""
        self._drops.inc()

    def render(self, stats: EngineStats, info: ModelInfo) -> bytes:
        """See `Metrics`."""
        del info
        self._engine.stats = stats
        return generate_latest(self._registry)
