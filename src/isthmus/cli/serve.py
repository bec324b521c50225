"""`isthmus serve`: progress while the model loads, then the address and a request to paste, then logs until the end."""

import argparse
import json
import shlex
from types import TracebackType

from isthmus.cli.failure import OK
from isthmus.cli.flags import add_settings, load_settings
from isthmus.cli.terminal import BOLD, DIM, Screen
from isthmus.contracts.events import ModelInfo

_BAR = 24


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser(
        "serve",
        help="serve a model over the OpenAI API",
        description="Serve a model over the OpenAI API. Without a folder: the small model that comes with Isthmus.",
        epilog="examples:\n  isthmus serve\n  isthmus serve ./Qwen3-0.6B --port 8001 --kv-memory 1GiB\n"
        "  isthmus serve --exact\n\n"
        "Settings may also come from the environment (ISTHMUS_PORT=8001) or a TOML file; flags win.\n"
        "SIGTERM or Ctrl-C finishes what was accepted, then ends; a second Ctrl-C ends at once.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", nargs="?", help="model folder in the Hugging Face layout (same as --model)")
    add_settings(parser)
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Serve until told to end."""
    if arguments.folder is not None:
        arguments.setting_model = arguments.folder
    settings = load_settings(arguments).settings
    from isthmus.app import serve

    with ConsoleUi(Screen()) as ui:
        serve(settings, ui)
    return OK


class ConsoleUi:
    """What a person sees of a server's life, on standard error. Calls come from one thread."""

    def __init__(self, screen: Screen) -> None:
        self._screen = screen
        self._live = screen.err.isatty()
        self._stage = ""
        self._drawn = False

    def __enter__(self) -> "ConsoleUi":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._clear()

    def on_progress(self, stage: str, fraction: float) -> None:
        """Start-up is at `stage`, `fraction` (0 to 1) of it done."""
        if not self._live:
            if stage != self._stage:
                self._say(f"{stage} ...")
            self._stage = stage
            return
        done = round(_BAR * min(1.0, max(0.0, fraction)))
        self._clear()
        self._screen.err.write(f"{'━' * done}{'─' * (_BAR - done)} {stage}")
        self._screen.err.flush()
        self._drawn = True

    def on_ready(self, url: str, info: ModelInfo) -> None:
        """The server takes requests at `url`."""
        self._clear()
        mode = "exact " if info.exact else ""
        tokens = info.blocks * info.block_tokens
        self._say(
            f"{info.name}: {info.model_type}, {info.parameters / 1e6:.1f}M parameters, {mode}{info.dtype.lower()} on "
            f"{info.device}, context {info.max_model_len}, KV for {tokens} tokens",
            DIM,
        )
        self._say(f"Isthmus serves {info.name} at {url}", BOLD)
        self._say(f"\n{curl(url, info.name)}\n")
        self._say("Or talk to it: isthmus chat" + ("" if url.endswith(":8000") else f" --url {url}"), DIM)

    def on_stopping(self, accepted: int) -> None:
        """The server takes nothing new; `accepted` requests are being finished."""
        self._clear()
        self._say(f"finishing {accepted} {'request' if accepted == 1 else 'requests'}; Ctrl-C again to end at once")

    def _say(self, text: str, *codes: str) -> None:
        self._screen.err.write((self._screen.paint(text, *codes) if self._live else text) + "\n")
        self._screen.err.flush()

    def _clear(self) -> None:
        if self._drawn:
            self._screen.err.write("\r\x1b[2K")
            self._drawn = False


def curl(url: str, model: str) -> str:
    """A request to paste into a shell."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello!"}], "stream": True})
    return f"curl -N {url}/v1/chat/completions -H 'Content-Type: application/json' \\\n  -d {shlex.quote(body)}"
