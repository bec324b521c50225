"""Settings of an engine process: sent to it as its first frame, validated by being built."""

import msgspec

from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.ids import MAX_MODEL_NAME_CHARS
from isthmus.execution.inference.grammar.settings import GrammarSettings
from isthmus.execution.inference.paging.settings import PagingSettings

DTYPES = ("auto", "f32", "bf16", "f16")
COMPILED = ("off", "auto")
SNAPSHOT_POLICIES = ("turns", "every-block", "last-only")


class SchedulerSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits and policy of the scheduler.

    `max_batch_tokens`: tokens computed by one step (the chunk size of long prompts). `mixed_prompt_tokens`: those of
    prompts in a step in which others decode, which wait for it. `max_running`: sequences that hold
    blocks at a time. `max_waiting`: requests queued beyond those; one more is refused. `ageing_s`: seconds of waiting
    that make up for one level of priority. `draft_tokens`: guesses a request a step by prompt lookup, 0 for none.
    `overlap`: schedule the next step while one runs, where it can be told (ahead.py).
    `snapshots`: which recurrent states of a hybrid model are kept for reuse, one of `SNAPSHOT_POLICIES` (recurrent.py);
    the others than `turns` are there to be compared with. `paging`: limits of what is loaded from the block store and
    written to it.
    """

    max_batch_tokens: int = 2048
    mixed_prompt_tokens: int = 512
    max_running: int = 64
    max_waiting: int = 512
    ageing_s: float = 5.0
    draft_tokens: int = 0
    overlap: bool = True
    snapshots: str = "turns"
    paging: PagingSettings = PagingSettings()

    def __post_init__(self) -> None:
        limits = {
            "max_batch_tokens": 1 << 20,
            "mixed_prompt_tokens": 1 << 20,
            "max_running": 4096,
            "max_waiting": 1 << 20,
        }
        for name, high in limits.items():
            if not 1 <= getattr(self, name) <= high:
                raise InvalidInput(f"{name} is {getattr(self, name)}, accepted: 1 to {high}", name)
        if self.max_batch_tokens < self.max_running:
            raise InvalidInput("max_batch_tokens is under max_running: a decode step would not fit", "max_batch_tokens")
        if not 0.001 <= self.ageing_s <= 86_400:
            raise InvalidInput(f"ageing_s is {self.ageing_s}, accepted: 0.001 to 86400", "ageing_s")
        if not 0 <= self.draft_tokens <= 16:
            raise InvalidInput(f"draft_tokens is {self.draft_tokens}, accepted: 0 to 16", "draft_tokens")
        if self.snapshots not in SNAPSHOT_POLICIES:
            raise InvalidInput(f"snapshots is not one of {', '.join(SNAPSHOT_POLICIES)}", "snapshots")


class EngineSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine process serves and how.

    `model` is a folder in the Hugging Face layout; `name` is what clients call it. `kv_bytes` is the size of the block
    pool's memory, `state_bytes` that of the recurrent states of a hybrid model (others take none). `max_model_len` 0
    means the model's own limit. `threads` 0: see cores.py. `profile`: tell where the time of
    steps goes (profile.py). `compiled`: `auto` compiles the pointwise pieces beside the running engine (on a CPU, not
    in exact mode) and keeps them in `compiled_dir` (compiled/), and on a GPU uses its kernels and graphs (gpu.py);
    `off` does neither.
    """

    model: str
    name: str
    dtype: str = "auto"
    device: str = "cpu"
    exact: bool = False
    block_tokens: int = 16
    kv_bytes: int = 256 * 1024 * 1024
    state_bytes: int = 256 * 1024 * 1024
    max_model_len: int = 0
    threads: int = 0
    profile: bool = False
    compiled: str = "off"
    compiled_dir: str = ""
    scheduler: SchedulerSettings = SchedulerSettings()
    grammar: GrammarSettings = GrammarSettings()

    def __post_init__(self) -> None:
        if not 1 <= len(self.name) <= MAX_MODEL_NAME_CHARS:
            raise InvalidInput(f"a model name has 1 to {MAX_MODEL_NAME_CHARS} characters", "name")
        if self.dtype not in DTYPES:
            raise InvalidInput(f"dtype is not one of {', '.join(DTYPES)}", "dtype")
        if not 1 <= self.block_tokens <= 1024:
            raise InvalidInput(f"block_tokens is {self.block_tokens}, accepted: 1 to 1024", "block_tokens")
        if not 1 << 16 <= self.kv_bytes <= 1 << 44:
            raise InvalidInput(f"kv_bytes is {self.kv_bytes}, accepted: 64 KiB to 16 TiB", "kv_bytes")
        if not 1 <= self.state_bytes <= 1 << 44:
            raise InvalidInput(f"state_bytes is {self.state_bytes}, accepted: 1 to 16 TiB", "state_bytes")
        if not 0 <= self.max_model_len <= 1 << 24:
            raise InvalidInput(f"max_model_len is {self.max_model_len}, accepted: 0 to {1 << 24}", "max_model_len")
        if not 0 <= self.threads <= 1024:
            raise InvalidInput(f"threads is {self.threads}, accepted: 0 to 1024", "threads")
        if self.compiled not in COMPILED:
            raise InvalidInput(f"compiled is not one of {', '.join(COMPILED)}", "compiled")
        if self.compiled != "off" and not self.compiled_dir:
            raise InvalidInput("compiled needs a folder, compiled_dir", "compiled_dir")
