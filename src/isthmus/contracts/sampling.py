"""Sampling parameters, validated once.

`SamplingParams` is what the engine needs to pick tokens; `TextParams` is what turns tokens into text and ends a text.
Both refuse invalid values when they are built, also when they are decoded from a frame, so the engine never checks
again. The random draw for output token i of a request is a function of (seed, i) alone: batch, chunking, reuse,
preemption and resume cannot change it.
"""

import math

import msgspec

from isthmus.contracts.errors import InvalidInput

MAX_LOGIT_BIAS = 1024
MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_CHARS = 256
MAX_STOP_TOKEN_IDS = 64
MAX_TOKENS_LIMIT = 1_048_576
MAX_TOP_K = 1_048_576
SEED_LIMIT = 2**64


def _within(name: str, value: float, low: float, high: float, *, open_low: bool = False) -> None:
    """Refuse a value outside [low, high] (or ]low, high]), and NaN."""
    inside = low < value <= high if open_low else low <= value <= high
    if not inside or math.isnan(value):
        bracket = "over" if open_low else "from"
        raise InvalidInput(f"{name} is {value}, accepted: {bracket} {low} to {high}", name)


class SamplingParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How to pick the next token, and when the engine stops.

    Order: logit bias and penalties on the raw logits; then temperature; then top-k, top-p, min-p on the result.
    `temperature` 0 is greedy (the other cuts are then without effect). `top_k` 0 and `top_p` 1 and `min_p` 0 are off.
    `repetition_penalty` counts prompt and output (Keskar et al. 2019, CTRL), `presence_penalty` and `frequency_penalty`
    count output only (OpenAI). `logprobs` n gives the chosen token's log probability and the n best, of the raw logits'
    log softmax. `max_tokens` counts output tokens; `min_tokens` masks end and stop tokens before it is reached.
    Raises `InvalidInput` naming the field and the limit.
    """

    max_tokens: int
    seed: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        _within("max_tokens", self.max_tokens, 1, MAX_TOKENS_LIMIT)
        _within("seed", self.seed, 0, SEED_LIMIT - 1)
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_k", self.top_k, 0, MAX_TOP_K)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)
        _within("min_tokens", self.min_tokens, 0, self.max_tokens)
        if self.logprobs is not None:
            _within("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidInput(f"logit_bias has {len(self.logit_bias)} entries, limit {MAX_LOGIT_BIAS}", "logit_bias")
        for token, bias in self.logit_bias.items():
            if token < 0:
                raise InvalidInput("logit_bias has a negative token id", "logit_bias")
            _within("logit_bias", bias, -100.0, 100.0)
        if len(self.stop_token_ids) > MAX_STOP_TOKEN_IDS:
            raise InvalidInput(f"stop_token_ids has over {MAX_STOP_TOKEN_IDS} entries", "stop_token_ids")

    @property
    def greedy(self) -> bool:
        """Whether the best token is taken without a draw."""
        return self.temperature == 0.0

    @property
    def penalised(self) -> bool:
        """Whether logits depend on the tokens so far."""
        return self.presence_penalty != 0.0 or self.frequency_penalty != 0.0 or self.repetition_penalty != 1.0


class SamplingDefaults(msgspec.Struct, frozen=True, omit_defaults=True):
    """What a request that says nothing gets: OpenAI's defaults, or those that a model's folder names.

    Raises `InvalidInput` naming the field and the limit.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        _within("temperature", self.temperature, 0.0, 2.0)
        _within("top_k", self.top_k, 0, MAX_TOP_K)
        _within("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _within("min_p", self.min_p, 0.0, 1.0)
        _within("repetition_penalty", self.repetition_penalty, 0.0, 10.0, open_low=True)


OPENAI_DEFAULTS = SamplingDefaults()


class TextParams(msgspec.Struct, frozen=True, omit_defaults=True):
    """How tokens become text. A stop string ends the output before itself unless `include_stop`.

    Text within the first `min_tokens` tokens is not searched for stop strings. Raises `InvalidInput`.
    """

    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    min_tokens: int = 0

    def __post_init__(self) -> None:
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidInput(f"stop has {len(self.stop)} strings, limit {MAX_STOP_STRINGS}", "stop")
        if any(not 1 <= len(text) <= MAX_STOP_CHARS for text in self.stop):
            raise InvalidInput(f"a stop string has 1 to {MAX_STOP_CHARS} characters", "stop")
