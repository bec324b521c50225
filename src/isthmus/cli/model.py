"""`isthmus model info|check`: what a model folder holds, and whether it can be served, without serving it."""

import argparse
import asyncio
from pathlib import Path

import msgspec

from isthmus.cli.failure import OK
from isthmus.cli.terminal import Screen, printable
from isthmus.config import EMBEDDED, Settings
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.errors import InvalidInput
from isthmus.contracts.prompting import ChatMessage
from isthmus.contracts.sampling import OPENAI_DEFAULTS


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("model", help="look at a model folder", description="Look at a model folder.")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, run, text in (
        ("info", run_info, "Show what a model folder holds."),
        ("check", run_check, "Check config, weight headers, tokenizer and chat template, and name what is wrong."),
    ):
        verb = verbs.add_parser(
            name,
            help=text.rstrip(".").lower(),
            description=text,
            epilog=f"example:\n  isthmus model {name} ./Qwen3-0.6B",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("folder", nargs="?", default=EMBEDDED, metavar="DIR", help="the folder [embedded]")
        verb.set_defaults(run=run)


def run_info(arguments: argparse.Namespace) -> int:
    """Print the summary. Raises `ModelInvalid`."""
    from isthmus.execution.inference.check import check_folder

    report = check_folder(_folder(arguments))
    config = report.config
    itemsize = 4 if config.dtype == "f32" else 2
    rows = [
        ("type", config.model_type),
        ("parameters", f"{report.parameters / 1e6:.1f} M"),
        ("weights", f"{report.weight_bytes / 2**20:.1f} MiB, {config.dtype}, {len(report.weight_files)} file(s)"),
        ("layers", f"{config.layers}, hidden {config.hidden_size}, MLP {config.intermediate_size}"),
        ("attention", f"{config.heads} heads, {config.kv_heads} KV heads, {config.head_dim} wide"),
        ("vocabulary", f"{config.vocab_size}, end tokens {', '.join(map(str, config.eos_token_ids)) or 'none'}"),
        ("context", f"{config.max_positions} tokens"),
        ("sampling", _sampling(_folder(arguments))),
        ("KV", f"{report.kv_bytes_per_token(itemsize)} bytes a token in {config.dtype}"),
    ]
    if report.code_files:
        rows.append(("code", f"{', '.join(map(printable, report.code_files))} (never run)"))
    screen = Screen()
    for name, value in rows:
        screen.line(f"{name:<12}{value}")
    return OK


def run_check(arguments: argparse.Namespace) -> int:
    """Print one line for each part that is in order. Raises `ModelInvalid` for the first that is not."""
    from isthmus.execution.inference.check import check_folder

    screen = Screen()
    folder = _folder(arguments)
    report = check_folder(folder)
    screen.line(f"ok  config.json: {report.config.model_type}")
    screen.line(f"ok  weights: {report.parameters} parameters in {', '.join(report.weight_files)}")
    for line in asyncio.run(_check_prompting(folder, report.config.vocab_size)):
        screen.line(f"ok  {line}")
    return OK


async def _check_prompting(folder: Path, model_rows: int) -> list[str]:
    """Load tokenizer and template as a server would, and use them once. Raises `ModelInvalid`."""
    from isthmus.contracts.errors import ModelInvalid
    from isthmus.execution.prompting.service import PromptingSettings, open_prompting

    prompting = open_prompting(folder, PromptingSettings(), SystemClock())
    if prompting.vocab_size > model_rows:
        size = prompting.vocab_size
        raise ModelInvalid(f"tokenizer.json has {size} tokens, the model in config.json only {model_rows}")
    await prompting.start()
    try:
        lines = [f"tokenizer.json: {prompting.vocab_size} tokens"]
        if not prompting.has_template:
            return [*lines, "no chat template: completions only"]
        try:
            ids = await prompting.encode_chat([ChatMessage("user", "Hello!")])
        except InvalidInput as error:
            raise ModelInvalid(f"the chat template fails on a plain conversation: {error}") from error
        return [*lines, f"chat template: a greeting has {len(ids)} tokens"]
    finally:
        await prompting.close()


def _sampling(folder: Path) -> str:
    """What a request that says nothing about sampling gets. Raises `ModelInvalid`."""
    from isthmus.execution.prompting.folder import read_sampling_defaults

    defaults = read_sampling_defaults(folder)
    values = ", ".join(f"{name} {value:g}" for name, value in msgspec.structs.asdict(defaults).items())
    return values if defaults != OPENAI_DEFAULTS else f"{values} (generation_config.json says nothing)"


def _folder(arguments: argparse.Namespace) -> Path:
    return Settings(model=arguments.folder).model_folder
