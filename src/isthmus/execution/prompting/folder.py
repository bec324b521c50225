"""Reads the text side of a Hugging Face model folder, once, with limits. Nothing in the folder is ever run.

Promise: what is returned is complete and within limits, or `ModelInvalid` names the file, the entry and what was
expected. Read: `tokenizer.json` (required), `tokenizer_config.json`, `special_tokens_map.json`, `chat_template.jinja`
(optional; the file wins over the entry `chat_template` of the config, as in transformers); and of
`generation_config.json` (optional) what it says about sampling.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from isthmus.contracts.errors import InvalidInput, ModelInvalid
from isthmus.contracts.sampling import SamplingDefaults

MAX_TOKENIZER_BYTES = 48 * 1024 * 1024
MAX_CONFIG_BYTES = 8 * 1024 * 1024
MAX_TEMPLATE_BYTES = 1024 * 1024
SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The bytes of `tokenizer.json`, the chat template's source (None without one) and the named special tokens."""

    folder: Path
    tokenizer: bytes
    template: str | None
    specials: dict[str, str]


def read_text_files(folder: Path) -> TextFiles:
    """Read the text side of `folder`. Raises `ModelInvalid`."""
    tokenizer = _read(folder / "tokenizer.json", MAX_TOKENIZER_BYTES)
    if tokenizer is None:
        raise ModelInvalid(f"{folder / 'tokenizer.json'} is missing: a served model needs it")
    config = _read_object(folder / "tokenizer_config.json")
    fallback = _read_object(folder / "special_tokens_map.json")
    specials: dict[str, str] = {}
    for name in SPECIAL_NAMES:
        token = _special(folder, name, config.get(name, fallback.get(name)))
        if token is not None:
            specials[name] = token
    template = _config_template(folder / "tokenizer_config.json", config.get("chat_template"))
    source = _read(folder / "chat_template.jinja", MAX_TEMPLATE_BYTES)
    if source is not None:
        template = _utf8(folder / "chat_template.jinja", source)
    return TextFiles(folder, tokenizer, template, specials)


def read_sampling_defaults(folder: Path) -> SamplingDefaults:
    """How the model's makers say it should be sampled: the entries of `SamplingDefaults` in `generation_config.json`.

    `do_sample` and the length limits are not read, as in vLLM: a request that wants greedy decoding says so. Raises
    `ModelInvalid` for a value that no request could ask for.
    """
    path = folder / "generation_config.json"
    found: dict[str, float] = {}
    for name, value in _read_object(path).items():
        if name not in SamplingDefaults.__struct_fields__ or value is None:
            continue
        whole = name == "top_k"
        if isinstance(value, bool) or not isinstance(value, int | float) or (whole and not isinstance(value, int)):
            raise ModelInvalid(f"{path}: {name} is not {'a whole number' if whole else 'a number'}")
        found[name] = max(0, value) if whole else value
    try:
        return msgspec.convert(found, SamplingDefaults)
    except (InvalidInput, msgspec.ValidationError) as error:
        raise ModelInvalid(f"{path}: {error}; sampling_defaults = false leaves it out") from error


def _read(path: Path, limit: int) -> bytes | None:
    """The bytes of `path`, None when there is no such file."""
    try:
        with path.open("rb") as file:
            data = file.read(limit + 1)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelInvalid(f"{path} cannot be read: {error.strerror}") from error
    if len(data) > limit:
        raise ModelInvalid(f"{path} is over the limit of {limit} bytes")
    return data


def _utf8(path: Path, data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ModelInvalid(f"{path} is not UTF-8 (byte {error.start})") from error


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`, empty when there is no such file."""
    data = _read(path, MAX_CONFIG_BYTES)
    if data is None:
        return {}
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    except (msgspec.DecodeError, msgspec.ValidationError, RecursionError) as error:
        raise ModelInvalid(f"{path} is not a JSON object: {error}") from error


def _special(folder: Path, name: str, value: Any) -> str | None:
    """A special token is a string or an object with a `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    if value is None or isinstance(value, str):
        return value
    raise ModelInvalid(f"{folder / 'tokenizer_config.json'}: {name} is neither a string nor an object with a content")


def _config_template(path: Path, value: Any) -> str | None:
    """`chat_template` is a string, or a list of named ones of which `default` (or the only one) is taken."""
    if isinstance(value, list):
        named: dict[str, Any] = {}
        for entry in value:
            if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
                raise ModelInvalid(f"{path}: chat_template is a list, but an entry of it has no name")
            named[entry["name"]] = entry.get("template")
        if "default" in named:
            value = named["default"]
        elif len(named) == 1:
            value = next(iter(named.values()))
        else:
            raise ModelInvalid(f"{path}: chat_template is a list of {len(named)} templates, none is named default")
    if value is None:
        return None
    if not isinstance(value, str):
        raise ModelInvalid(f"{path}: chat_template is neither a string nor a list of named templates")
    if len(value.encode(errors="replace")) > MAX_TEMPLATE_BYTES:
        raise ModelInvalid(f"{path}: chat_template is over the limit of {MAX_TEMPLATE_BYTES} bytes")
    return value
