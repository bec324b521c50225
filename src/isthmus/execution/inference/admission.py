"""What the engine refuses, and in which words. Checked once, when a request arrives."""

from collections import deque
from collections.abc import Collection

from isthmus.contracts.errors import Draining, InvalidInput, IsthmusError, Overloaded, TooLarge
from isthmus.contracts.events import ErrorInfo, Finish, ModelInfo, RequestOutput
from isthmus.contracts.ids import RequestId
from isthmus.contracts.requests import EngineRequest, Work
from isthmus.execution.inference.settings import SchedulerSettings

RATE_WINDOW = 32
MAX_RETRY_AFTER_S = 60.0


class Admission:
    """The checks that need the model's limits or the engine's state."""

    def __init__(self, info: ModelInfo, settings: SchedulerSettings) -> None:
        self._info = info
        self._settings = settings
        self._arrivals: deque[float] = deque(maxlen=RATE_WINDOW)
        self.draining = False

    def refuse(
        self, request: EngineRequest, known: Collection[RequestId], queued: int, now: float
    ) -> RequestOutput | None:
        """None to take `request`, else the output that refuses it and says why."""
        try:
            self._check(request, known, queued, now)
        except IsthmusError as error:
            return refusal(request.request_id, error)
        self._arrivals.append(now)
        return None

    def _check(self, request: EngineRequest, known: Collection[RequestId], queued: int, now: float) -> None:
        if self.draining:
            raise Draining("the engine is draining and takes no new requests")
        if request.request_id in known:
            raise InvalidInput("a request with this id is running", "request_id")
        info = self._info
        length = len(request.prompt_ids) + len(request.output_ids)
        room = 1 if request.work is Work.GENERATE else 0
        if length + room > info.max_model_len:
            limit = info.max_model_len - room
            raise TooLarge(f"the prompt has {length} tokens, the limit of this model is {limit}", "prompt")
        most = min(length + request.sampling.max_tokens - len(request.output_ids), info.max_model_len)
        if -(-most // info.block_tokens) > info.blocks:
            capacity = info.blocks * info.block_tokens
            raise TooLarge(f"prompt and max_tokens may need {most} tokens, KV memory holds {capacity}", "max_tokens")
        ids = (*request.sampling.logit_bias, *request.sampling.stop_token_ids)
        for name, tokens in (("prompt", request.prompt_ids), ("output_ids", request.output_ids), ("logit_bias", ids)):
            if tokens and not (min(tokens) >= 0 and max(tokens) < info.vocab_size):
                raise InvalidInput(f"a token id is outside the vocabulary of {info.vocab_size}", name)
        if queued >= self._settings.max_waiting:
            raise Overloaded(f"{queued} requests are waiting, the limit", self._retry_after(queued, now))

    def _retry_after(self, queued: int, now: float) -> float:
        """When a quarter of the queue should be gone, at the rate at which requests were taken of late: in a full queue
        requests are taken as fast as they leave.
        """
        if len(self._arrivals) < 2:
            return 1.0
        rate = len(self._arrivals) / max(now - self._arrivals[0], 1e-3)
        return min(max(queued / rate / 4, 1.0), MAX_RETRY_AFTER_S)


def refusal(request_id: RequestId, error: IsthmusError) -> RequestOutput:
    """The one output of a refused request."""
    field = error.field if isinstance(error, InvalidInput) else ""
    retry = error.retry_after_s if isinstance(error, Overloaded) else None
    info = ErrorInfo(error.code, str(error), field, retry)
    return RequestOutput(request_id, finish=Finish.REJECTED, error=info)
