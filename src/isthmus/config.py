"""The settings of a server: what they are, where they come from, which values are accepted.

One precedence, highest first: command-line flags, environment (`ISTHMUS_<NAME>`), a TOML file (`--config`, else
`ISTHMUS_CONFIG`, else `./isthmus.toml` if there is one), defaults. A setting has one name in all of them:
`max_running` is `--max-running`, `ISTHMUS_MAX_RUNNING` and `max_running = ...`. Promise: a name that is no setting,
or a value that is not accepted, is `ConfigInvalid` naming the setting and its source; nothing is ignored. This module
is the only reader of the environment. docs/configuration.md is generated from it by `isthmus config --markdown`.
"""

import dataclasses
import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from isthmus.contracts.address import is_loopback
from isthmus.contracts.errors import ConfigInvalid
from isthmus.contracts.ids import MAX_MODEL_NAME_CHARS
from isthmus.contracts.requests import MAX_DEADLINE_S

KIB, MIB, GIB = 1024, 1024**2, 1024**3
PREFIX = "ISTHMUS_"
EMBEDDED = "embedded"
DEFAULT_FILE = "isthmus.toml"
MAX_FILE_BYTES = MIB
# Read by parts of the command line other than the settings.
OTHER_VARIABLES = frozenset({"ISTHMUS_CONFIG", "ISTHMUS_URL"})

Kind = Literal["text", "integer", "number", "switch", "size", "path", "list"]
_SIZE = re.compile(r"(\d{1,15})\s*(B|KiB|MiB|GiB|TiB)?")
_UNITS = {"": 1, "B": 1, "KiB": KIB, "MiB": MIB, "GiB": GIB, "TiB": 1024**4}
_SWITCHES = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class Spec:
    """What is accepted for a setting. `low` and `high` are inclusive; `pattern` must match the whole text."""

    group: str
    kind: Kind
    help: str
    low: float = 0
    high: float = 0
    choices: tuple[str, ...] = ()
    pattern: str = ""

    @property
    def accepted(self) -> str:
        """The accepted values, for people."""
        if self.choices:
            return ", ".join(self.choices)
        if self.kind == "size":
            return f"{show_size(int(self.low))} to {show_size(int(self.high))}"
        if self.kind in ("integer", "number"):
            return f"{self.low:g} to {self.high:.15g}"
        names = {"switch": "true or false", "path": "a path", "list": "names, separated by commas"}
        return names.get(self.kind, "text")


def _setting(default: Any, group: str, kind: Kind, help_: str, **limits: Any) -> Any:
    return dataclasses.field(default=default, metadata={"spec": Spec(group, kind, help_, **limits)})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """Every setting of `isthmus serve`, checked. Sizes in bytes, times in seconds. Made by `load`."""

    model: str = _setting(
        EMBEDDED, "Model", "path", "Folder in the Hugging Face layout, or `embedded` (the model that comes along)."
    )
    model_name: str = _setting(
        "", "Model", "text", "What clients call the model; empty for the folder's name (`isthmus` when embedded)."
    )
    dtype: str = _setting(
        "auto", "Model", "text",
        "Element type of weights and state; `auto`: the model's own, or `f32` where the processor cannot compute so.",
        choices=("auto", "f32", "bf16", "f16"),
    )  # fmt: skip
    device: str = _setting("cpu", "Model", "text", "`cpu`, `cuda` or `cuda:<index>`.", pattern=r"cpu|cuda(:\d{1,3})?")
    sampling_defaults: bool = _setting(
        True, "Model", "switch",
        "Where a request says nothing, sample as the model's `generation_config.json` says (temperature, top_k, top_p, "
        "min_p, repetition_penalty); off: as OpenAI does.",
    )  # fmt: skip
    exact: bool = _setting(
        False, "Model", "switch", "Bitwise equal logits for any batch, chunking or reuse (fp32, or refused)."
    )
    max_model_len: int = _setting(
        0, "Model", "integer", "Most tokens of prompt and output together; 0 for the model's own limit.", high=2**20
    )
    kv_memory: int = _setting(
        256 * MIB, "Engine", "size", "Memory of the block pool (the KV cache).", low=MIB, high=64 * 1024 * GIB
    )
    state_memory: int = _setting(
        256 * MIB, "Engine", "size", "Memory of the recurrent states of a hybrid model; others take none.",
        low=MIB, high=16 * 1024 * GIB,
    )  # fmt: skip
    block_tokens: int = _setting(16, "Engine", "integer", "Tokens a block.", low=1, high=1024)
    max_batch_tokens: int = _setting(
        2048, "Engine", "integer", "Tokens computed by one step; longer prompts go in chunks.", low=1, high=2**20
    )
    mixed_prompt_tokens: int = _setting(
        512, "Engine", "integer", "Tokens of prompts in a step in which other requests decode; they wait for it.",
        low=1, high=2**20,
    )  # fmt: skip
    max_running: int = _setting(64, "Engine", "integer", "Sequences computed at a time.", low=1, high=4096)
    max_waiting: int = _setting(
        512, "Engine", "integer", "Sequences queued beyond those; one more is answered 503.", low=1, high=2**20
    )
    ageing_s: float = _setting(
        5.0, "Engine", "number", "Seconds of waiting that make up for one level of priority.", low=0.001, high=86_400
    )
    overlap: str = _setting(
        "auto", "Engine", "text",
        "Hand in the next step while one runs; `auto`: unless a step takes the processor itself (device `cpu`).",
        choices=("auto", "on", "off"),
    )  # fmt: skip
    speculate: int = _setting(
        0, "Engine", "integer", "Tokens guessed a step from repeated text in the request itself; 0 is off.", high=16
    )
    threads: int = _setting(
        0, "Engine", "integer", "Threads of the engine; 0 for one a core, within the quota of the cgroup.", high=1024
    )
    compile: bool = _setting(
        True, "Engine", "switch",
        "Compile the model's norms and rotations beside the running server, once, with the machine's `g++`, and keep "
        "them in `<state_dir>/compiled`; on `cuda`, use attention kernels and graphs of decode steps. Without a "
        "compiler and in exact mode nothing is compiled.",
    )  # fmt: skip
    profile_steps: bool = _setting(
        False, "Engine", "switch", "Measure where the time of steps goes (`isthmus_step_seconds`; device `cpu` only)."
    )
    grammar_deadline_s: float = _setting(
        5.0, "Engine", "number", "For the schema or grammar of a constrained output to be compiled.",
        low=0.01, high=3600,
    )  # fmt: skip
    grammar_step_s: float = _setting(
        2.0, "Engine", "number", "For a constrained output's next masks.", low=0.01, high=3600
    )
    grammar_memory: int = _setting(
        GIB, "Engine", "size", "Memory that the grammar process may map beyond the interpreter.",
        low=64 * MIB, high=64 * GIB,
    )  # fmt: skip
    host: str = _setting("127.0.0.1", "Edge", "text", "Address to bind; loopback only until there are API keys.")
    port: int = _setting(8000, "Edge", "integer", "Port to bind; 0 takes a free one.", high=65_535)
    allowed_hosts: tuple[str, ...] = _setting(
        (), "Edge", "list", "Names accepted in the Host header besides those of loopback."
    )
    max_connections: int = _setting(
        1024, "Edge", "integer", "Open connections; one more is refused.", low=1, high=65_536
    )
    max_in_flight: int = _setting(
        512, "Edge", "integer", "Requests being answered; one more is answered 503.", low=1, high=65_536
    )
    max_body: int = _setting(16 * MIB, "Edge", "size", "Body of one request.", low=KIB, high=48 * MIB)
    max_buffered: int = _setting(
        256 * MIB, "Edge", "size", "Bodies of all requests being received; over it requests are answered 503.",
        low=KIB, high=64 * GIB,
    )  # fmt: skip
    header_timeout_s: float = _setting(
        10.0, "Edge", "number", "For the headers of a request to arrive.", low=0.01, high=3600
    )
    body_timeout_s: float = _setting(60.0, "Edge", "number", "For the body to arrive.", low=0.01, high=3600)
    idle_timeout_s: float = _setting(75.0, "Edge", "number", "Between requests of a connection.", low=0.01, high=86_400)
    write_timeout_s: float = _setting(
        30.0, "Edge", "number", "How long a client may leave its answer unread.", low=0.01, high=3600
    )
    max_sequences: int = _setting(64, "Edge", "integer", "Sequences of one request: prompts times n.", low=1, high=4096)
    default_max_tokens: int = _setting(
        4096, "Edge", "integer", "Output tokens when a request names no limit.", low=1, high=2**20
    )
    default_deadline_s: float = _setting(
        0.0, "Edge", "number", "Deadline of requests that name none; 0 for no deadline.", high=MAX_DEADLINE_S
    )
    max_deadline_s: float = _setting(
        3600.0, "Edge", "number", "Longest deadline that a request may ask for.", low=0.001, high=MAX_DEADLINE_S
    )
    drain_s: float = _setting(
        30.0, "Edge", "number", "For accepted requests to finish after SIGTERM, before they are ended.", high=86_400
    )
    prompt_helpers: int = _setting(
        1, "Prompting", "integer", "Processes that render chat templates and tokenise.", low=1, high=64
    )
    prompt_waiting: int = _setting(
        256, "Prompting", "integer", "Prompts queued for them; one more is answered 503.", low=1, high=65_536
    )
    prompt_deadline_s: float = _setting(
        10.0, "Prompting", "number", "For one prompt to be rendered and tokenised.", low=0.01, high=3600
    )
    prompt_memory: int = _setting(
        GIB, "Prompting", "size", "Memory that one helper may map beyond the interpreter.", low=64 * MIB, high=64 * GIB
    )
    max_prompt: int = _setting(8 * MIB, "Prompting", "size", "Text of one request, in UTF-8.", low=KIB, high=8 * MIB)
    tool_parser: str = _setting(
        "auto", "Prompting", "text", "How the model writes tool calls; `auto` goes by its chat template.",
        choices=("auto", "hermes", "llama", "mistral", "none"),
    )  # fmt: skip
    reasoning_parser: str = _setting(
        "auto", "Prompting", "text", "How the model sets its reasoning apart; `auto` goes by its chat template.",
        choices=("auto", "think", "mistral", "none"),
    )  # fmt: skip
    state_dir: str = _setting(
        "", "State", "path", "Where state is kept; empty for `$XDG_STATE_HOME/isthmus` (`~/.local/state/isthmus`)."
    )
    store: str = _setting(
        "own", "State", "text",
        "Where state goes that leaves the device: `own` (a block store in the engine's process), `off`, or the path of "
        "the socket of `isthmus store` on this host.", pattern=r"own|off|.*/.*",
    )  # fmt: skip
    store_memory: int = _setting(128 * MIB, "State", "size", "DRAM of the block store.", low=MIB, high=64 * 1024 * GIB)
    store_disk: int = _setting(
        GIB, "State", "size", "Disk of the block store, taken at the start; 0 for none.", low=0, high=1024 * 1024 * GIB
    )
    store_file: str = _setting(
        "", "State", "path", "File or raw block device of the block store; empty for `<state_dir>/store/log`."
    )
    store_policy: str = _setting(
        "s3fifo", "State", "text", "Which blocks leave DRAM first.", choices=("lru", "s3fifo", "arc")
    )
    store_wear: int = _setting(
        0, "State", "size", "Bytes a day that the block store may write to its disk; 0 for no limit.", high=2**60
    )
    journal: bool = _setting(True, "State", "switch", "Record one lineage fact a request, for `isthmus explain`.")
    journal_max: int = _setting(
        16 * GIB, "State", "size", "Size of the journal, over which nothing more is recorded.", low=MIB, high=1024 * GIB
    )

    @property
    def model_folder(self) -> Path:
        """The folder of the model that is served."""
        if self.model == EMBEDDED:
            return Path(__file__).parent / "data" / "embedded"
        return Path(self.model)

    @property
    def served_name(self) -> str:
        """What clients call the model."""
        if self.model_name:
            return self.model_name
        if self.model == EMBEDDED:
            return "isthmus"
        return self.model_folder.resolve().name[:MAX_MODEL_NAME_CHARS] or "model"

    @property
    def journal_path(self) -> Path:
        """The journal's file. `load` always sets `state_dir`."""
        return Path(self.state_dir) / "journal.db"

    @property
    def store_path(self) -> Path:
        """The block store's file or device."""
        return Path(self.store_file) if self.store_file else Path(self.state_dir) / "store" / "log"

    @property
    def store_socket(self) -> Path:
        """Where a store answers its administrator (and, a daemon's, engines)."""
        return Path(self.state_dir) / "store" / "store.sock"

    @property
    def secret_path(self) -> Path:
        """The installation's secret, from which tenant namespaces are derived."""
        return Path(self.state_dir) / "tenant.secret"

    @property
    def compiled_path(self) -> Path:
        """The folder of compiled pieces."""
        return Path(self.state_dir) / "compiled"

    @property
    def chat_history_path(self) -> Path:
        """Lines typed into `isthmus chat`."""
        return Path(self.state_dir) / "chat_history"


@dataclass(frozen=True, slots=True)
class Loaded:
    """Settings, and for each by name where its value came from."""

    settings: Settings
    sources: Mapping[str, str]


def specs() -> dict[str, tuple[Spec, Any]]:
    """Every setting by name, in order, with its default."""
    return {item.name: (item.metadata["spec"], item.default) for item in dataclasses.fields(Settings)}


def read_environment() -> dict[str, str]:
    """The variables that Isthmus looks at. The only look at the process environment."""
    wanted = ("HOME", "XDG_STATE_HOME", "NO_COLOR")
    return {name: value for name, value in os.environ.items() if name.startswith(PREFIX) or name in wanted}


def inherited_environment() -> dict[str, str]:
    """The whole environment, to hand on to programs of others that we start (the peers of `isthmus bench`)."""
    return dict(os.environ)


def load(flags: Mapping[str, object], environment: Mapping[str, str], config: str | None = None) -> Loaded:
    """Settings from flags (by setting name; text or bool), environment and file. Raises `ConfigInvalid`."""
    layers = [_from_file(config, environment), _from_environment(environment), _from_flags(flags)]
    values: dict[str, Any] = {}
    sources = dict.fromkeys(specs(), "default")
    for layer in layers:
        for name, (value, source) in layer.items():
            values[name] = _accept(name, value, source)
            sources[name] = source
    if not values.get("state_dir"):
        values["state_dir"] = str(_default_state_dir(environment))
    settings = Settings(**values)
    _check_together(settings, sources)
    return Loaded(settings, sources)


_Layer = dict[str, tuple[object, str]]


def _from_flags(flags: Mapping[str, object]) -> _Layer:
    return {name: (value, "--" + name.replace("_", "-")) for name, value in flags.items()}


def _from_environment(environment: Mapping[str, str]) -> _Layer:
    layer: _Layer = {}
    for variable, value in environment.items():
        if variable.startswith(PREFIX) and variable not in OTHER_VARIABLES:
            name = variable.removeprefix(PREFIX).lower()
            _check_name(name, f"environment variable {variable}")
            layer[name] = (value, variable)
    return layer


def _from_file(config: str | None, environment: Mapping[str, str]) -> _Layer:
    """The settings in the TOML file. A file that is named must exist, `./isthmus.toml` need not."""
    named = config or environment.get("ISTHMUS_CONFIG")
    path = Path(named or DEFAULT_FILE)
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise ConfigInvalid(f"{path} is over {MAX_FILE_BYTES} bytes")
        table = tomllib.loads(data.decode())
    except FileNotFoundError as error:
        if named is None:
            return {}
        raise ConfigInvalid(f"{path} does not exist (from {'--config' if config else 'ISTHMUS_CONFIG'})") from error
    except OSError as error:
        raise ConfigInvalid(f"{path} cannot be read: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigInvalid(f"{path} is not TOML: {error}") from error
    for name in table:
        _check_name(name, str(path))
    return {name: (value, str(path)) for name, value in table.items()}


def _check_name(name: str, source: str) -> None:
    if name not in specs():
        close = difflib.get_close_matches(name, specs(), n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ConfigInvalid(f"{name[:80]} ({source}) is no setting{hint}")


def _accept(name: str, value: object, source: str) -> Any:
    """`value` as the setting's type. Raises `ConfigInvalid`."""
    spec, _ = specs()[name]
    parsed = _parse(spec, value)
    outside = isinstance(parsed, int | float) and spec.kind != "switch" and not spec.low <= parsed <= spec.high
    unknown = isinstance(parsed, str) and (
        (spec.choices and parsed not in spec.choices) or (spec.pattern and not re.fullmatch(spec.pattern, parsed))
    )
    if parsed is None or outside or unknown:
        accepted = f"must match {spec.pattern}" if spec.pattern else f"accepted: {spec.accepted}"
        raise ConfigInvalid(f"{name} is {str(value)[:80]!r} ({source}), {accepted}")
    return parsed


def _parse(spec: Spec, value: object) -> Any:
    """`value` (text, or of TOML's types) as the type of `spec`, None when it is none."""
    match spec.kind, value:
        case (("text" | "path"), str()):
            return value if len(value) <= 4096 and "\0" not in value else None
        case "switch", bool():
            return value
        case "switch", str():
            return _SWITCHES.get(value.lower())
        case (("integer" | "number" | "size"), bool()):
            return None
        case (("integer" | "size"), int()):
            return value
        case "number", int() | float():
            return float(value)
        case "integer", str():
            return int(value) if re.fullmatch(r"[+-]?\d{1,18}", value) else None
        case "number", str():
            return float(value) if re.fullmatch(r"[+-]?(\d{1,18}(\.\d{0,18})?|\.\d{1,18})", value) else None
        case "size", str():
            return parse_size(value)
        case "list", str():
            return tuple(part.strip() for part in value.split(",") if part.strip())
        case "list", list() if all(isinstance(part, str) for part in value):
            return tuple(value)
    return None


def _default_state_dir(environment: Mapping[str, str]) -> Path:
    """The XDG base directory specification: a relative XDG_STATE_HOME is to be ignored."""
    base = Path(environment.get("XDG_STATE_HOME", ""))
    if base.is_absolute():
        return base / "isthmus"
    return Path(environment.get("HOME", "/")) / ".local" / "state" / "isthmus"


def _check_together(settings: Settings, sources: Mapping[str, str]) -> None:
    """What no setting can be checked for alone."""
    if not is_loopback(settings.host):
        raise ConfigInvalid(
            f"host is {settings.host!r} ({sources['host']}): only loopback is served until there are API keys; use "
            "127.0.0.1 behind a tunnel or a proxy that authenticates"
        )
    if settings.max_batch_tokens < settings.max_running:
        raise ConfigInvalid(
            f"max_batch_tokens is {settings.max_batch_tokens} ({sources['max_batch_tokens']}), under max_running "
            f"{settings.max_running} ({sources['max_running']}): a step must hold one token of each"
        )
    if settings.default_deadline_s > settings.max_deadline_s:
        raise ConfigInvalid(
            f"default_deadline_s is {settings.default_deadline_s} ({sources['default_deadline_s']}), over "
            f"max_deadline_s {settings.max_deadline_s} ({sources['max_deadline_s']})"
        )
    if len(settings.model_name) > MAX_MODEL_NAME_CHARS:
        raise ConfigInvalid(f"model_name ({sources['model_name']}) is over {MAX_MODEL_NAME_CHARS} characters")
    if settings.exact and settings.dtype not in ("auto", "f32"):
        raise ConfigInvalid(f"exact ({sources['exact']}) needs dtype f32, not {settings.dtype} ({sources['dtype']})")


def parse_size(text: str) -> int | None:
    """The bytes that `text` (e.g. `64MiB`) says; None when it is no size."""
    found = _SIZE.fullmatch(text.strip())
    return int(found[1]) * _UNITS[found[2] or ""] if found else None


def show_size(size: int) -> str:
    """A size in the largest unit that divides it, as it may be written in a setting."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % _UNITS[unit] == 0:
            return f"{size // _UNITS[unit]}{unit}"
    return str(size)
