"""Settings of structured output: a part of `EngineSettings`, validated by being built."""

import msgspec

from isthmus.contracts.errors import InvalidInput

MIB = 1024 * 1024


class GrammarSettings(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the grammar process. Times in seconds on the engine's clock, sizes in bytes.

    `compile_s`: for a constraint to be compiled (after a resume also: followed through the output there is). `step_s`:
    for the next masks, without any answer. `start_s`: for the process to load the tokenizer. `memory_bytes`: what the
    process may map beyond the bare interpreter. Over a time, or when it dies, it is killed and started again.
    """

    compile_s: float = 5.0
    step_s: float = 2.0
    start_s: float = 60.0
    memory_bytes: int = 1024 * MIB

    def __post_init__(self) -> None:
        for name in ("compile_s", "step_s", "start_s"):
            if not 0.01 <= getattr(self, name) <= 3600:
                raise InvalidInput(f"{name} is {getattr(self, name)}, accepted: 0.01 to 3600", name)
        if not 64 * MIB <= self.memory_bytes <= 1 << 40:
            raise InvalidInput(f"memory_bytes is {self.memory_bytes}, accepted: 64 MiB to 1 TiB", "memory_bytes")
