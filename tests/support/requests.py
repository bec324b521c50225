"""Short ways to build requests."""

from isthmus.contracts.ids import Namespace, RequestId
from isthmus.contracts.keys import PrefixScope
from isthmus.contracts.requests import EngineRequest, Work
from isthmus.contracts.sampling import SamplingParams

SCOPE = PrefixScope(Namespace(b"n" * 32), "fake")


def make_request(
    request_id: str,
    prompt: list[int],
    max_tokens: int = 4,
    seed: int = 0,
    work: Work = Work.GENERATE,
    output_ids: list[int] | None = None,
    priority: int = 0,
    deadline_s: float | None = None,
    scope: PrefixScope = SCOPE,
    **sampling: object,
) -> EngineRequest:
    params = SamplingParams(max_tokens=max_tokens, seed=seed, **sampling)  # type: ignore[arg-type]
    return EngineRequest(RequestId(request_id), scope, prompt, params, work, output_ids or [], (), priority, deadline_s)
