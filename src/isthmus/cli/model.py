"""`isthmus model info|check`: what a model folder holds, and whether it can be served."""

import argparse
import asyncio
from pathlib import Path

from isthmus.cli.failure import OK
from isthmus.cli.terminal import BOLD, DIM, Screen
from isthmus.config import EMBEDDED, Settings, show_size
from isthmus.contracts.clock import SystemClock
from isthmus.contracts.errors import InvalidInput, ModelInvalid, Unsupported
from isthmus.contracts.prompting import ChatMessage

_ITEMSIZES = {"f32": 4, "bf16": 2, "f16": 2}
_SAMPLE = [ChatMessage("user", "Hello")]


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command and its two subcommands."""
    parser = commands.add_parser(
        "model", help="look at a model folder", description="Look at a model folder in the Hugging Face layout."
    )
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    info = actions.add_parser("info", help="family, sizes, context, memory a token")
    check = actions.add_parser(
        "check",
        help="say whether the folder can be served, or exactly what is wrong",
        description="Check config, weight headers, tokenizer and chat template, without loading the weights.",
        epilog="example:\n  isthmus model check ./Qwen3-0.6B && isthmus serve ./Qwen3-0.6B",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for action, run in ((info, run_info), (check, run_check)):
        action.add_argument("folder", nargs="?", default=EMBEDDED, help="the folder (default: the embedded model)")
        action.set_defaults(run=run)


def run_info(arguments: argparse.Namespace) -> int:
    """Print what the folder holds. Raises `ModelInvalid`."""
    from isthmus.execution.inference.check import check_folder

    screen, folder = Screen(), _folder(arguments)
    report = check_folder(folder)
    config = report.config
    kv = report.kv_bytes_per_token(_ITEMSIZES[config.dtype])
    rows = {
        "family": f"{config.model_type}, {config.layers} layers, hidden {config.hidden_size}",
        "attention": f"{config.heads} heads over {config.kv_heads} KV heads of {config.head_dim}",
        "parameters": f"{report.parameters / 1e6:.1f} million, {config.dtype}, {report.weight_bytes / 2**20:.1f} MiB",
        "files": ", ".join(report.weight_files),
        "vocabulary": f"{config.vocab_size} tokens, {'tied' if config.tied else 'untied'} embeddings",
        "context": f"{config.max_positions} tokens, rope {config.rope.kind}",
        "KV memory": f"{show_size(kv)} a token, {kv * config.max_positions / 2**20:.0f} MiB a full context",
    }
    screen.line(str(folder), BOLD)
    for name, text in rows.items():
        screen.line(f"  {screen.paint(f'{name:<12}', DIM)}{text}")
    if report.code_files:
        screen.line(f"  code in the folder is never run: {', '.join(report.code_files)}")
    return OK


def run_check(arguments: argparse.Namespace) -> int:
    """Check the folder; a line for each part. Raises `ModelInvalid` naming what is wrong."""
    from isthmus.execution.inference.check import check_folder
    from isthmus.execution.prompting.service import PromptingSettings, open_prompting

    screen, folder = Screen(), _folder(arguments)
    report = check_folder(folder)
    screen.line(f"config.json    ok  {report.config.model_type}, {report.parameters / 1e6:.1f} million parameters")
    screen.line(f"weights        ok  {len(report.weight_files)} file(s), every header checked")
    prompting = open_prompting(folder, PromptingSettings(), SystemClock())
    if prompting.vocab_size > report.config.vocab_size:
        ids, rows = prompting.vocab_size, report.config.vocab_size
        raise ModelInvalid(f"tokenizer.json has {ids} token ids, config.json only {rows}")
    screen.line(f"tokenizer.json ok  {prompting.vocab_size} token ids")

    async def render() -> str:
        await prompting.start()
        try:
            return f"ok  a greeting has {len(await prompting.encode_chat(_SAMPLE))} tokens"
        except Unsupported:
            return "none: /v1/chat/completions will be refused, /v1/completions works"
        except InvalidInput as error:
            raise ModelInvalid(f"the chat template refuses a plain greeting: {error}") from error
        finally:
            await prompting.close()

    screen.line(f"chat template  {asyncio.run(render())}")
    screen.line("can be served")
    return OK


def _folder(arguments: argparse.Namespace) -> Path:
    return Settings(model=arguments.folder).model_folder
