"""What the handlers share: the ports they were handed and the model they serve."""

from collections.abc import Callable
from dataclasses import dataclass

from isthmus.contracts.clock import Clock, Entropy
from isthmus.contracts.events import ModelInfo
from isthmus.contracts.ids import Namespace
from isthmus.contracts.ports import Engine, Lineage, Prompting
from isthmus.contracts.sampling import OPENAI_DEFAULTS, SamplingDefaults
from isthmus.contracts.telemetry import Count, Metrics, RequestLog
from isthmus.gateway.plan import Planner
from isthmus.gateway.schema_requests import IGNORED_FIELDS, SamplingFields
from isthmus.gateway.sequence import SequenceRunner
from isthmus.gateway.settings import GatewaySettings


@dataclass(frozen=True, slots=True)
class GatewayDeps:
    """The ports that `app.py` hands the gateway. `namespace` is that of the keyless default tenant.

    `defaults` hold where a request says nothing about sampling.
    """

    engine: Engine
    prompting: Prompting
    lineage: Lineage
    metrics: Metrics
    log: RequestLog
    clock: Clock
    entropy: Entropy
    namespace: Namespace
    defaults: SamplingDefaults = OPENAI_DEFAULTS


@dataclass(frozen=True, slots=True)
class Service:
    """One served model behind the routes. `fingerprint` names the weights: with the seed it names an answer."""

    deps: GatewayDeps
    settings: GatewaySettings
    info: ModelInfo
    planner: Planner
    sequences: SequenceRunner
    fingerprint: str
    started_wall: float
    draining: Callable[[], bool]

    def count_ignored(self, body: SamplingFields) -> None:
        """Count each field that was sent and changes nothing (see `schema_requests`)."""
        for name in IGNORED_FIELDS:
            if getattr(body, name, None) is not None:
                self.deps.metrics.count(Count.IGNORED_FIELD)

    @property
    def engine(self) -> Engine:
        """The engine."""
        return self.deps.engine

    @property
    def prompting(self) -> Prompting:
        """Text to tokens and back."""
        return self.deps.prompting

    @property
    def clock(self) -> Clock:
        """Time."""
        return self.deps.clock


def build_service(deps: GatewayDeps, settings: GatewaySettings, draining: Callable[[], bool]) -> Service:
    """The service for what the engine serves. Raises `EngineFailed` before the engine is ready."""
    info = deps.engine.info
    return Service(
        deps=deps,
        settings=settings,
        info=info,
        planner=Planner(info, deps.namespace, settings, deps.entropy, deps.defaults),
        sequences=SequenceRunner(deps.engine, info, deps.prompting, deps.lineage, deps.metrics, deps.clock),
        fingerprint=f"fp_{info.weights.hex()[:16]}",
        started_wall=deps.clock.wall(),
        draining=draining,
    )
