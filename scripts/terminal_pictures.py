"""Record what `isthmus serve`, `chat` and `explain` show, as pictures under docs/images. Needs tmux.

A real server and a real chat run in a tmux session of their own; its screen is captured with its colours and drawn as
SVG. `python -m scripts.terminal_pictures`.
"""

import io
import re
import subprocess
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "docs" / "images"
WIDTH = 100
PORT = "8765"
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}">
<style>{styles} text {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


class Terminal:
    """A tmux session."""

    def __init__(self, name: str, height: int) -> None:
        self._name = f"isthmus-{name}"
        self._run("kill-session", check=False)
        size = ["-x", str(WIDTH), "-y", str(height)]
        self._run("new-session", "-d", *size, "env PS1='$ ' bash --norc --noprofile", target="-s")

    def _run(self, *arguments: str, check: bool = True, target: str = "-t") -> str:
        command = ["tmux", "-L", "isthmus-pictures", arguments[0], target, self._name, *arguments[1:]]
        return subprocess.run(command, check=check, capture_output=True, text=True, cwd=ROOT).stdout

    def type(self, text: str) -> None:
        """Type a line."""
        self._run("send-keys", "-l", text)
        self._run("send-keys", "Enter")

    def screen(self) -> str:
        """What is shown, with colours."""
        return self._run("capture-pane", "-p", "-e")

    def wait(self, pattern: str, seconds: float = 60) -> None:
        """Until the screen matches."""
        end = time.monotonic() + seconds
        while not re.search(pattern, self._run("capture-pane", "-p"), re.MULTILINE | re.DOTALL):
            if time.monotonic() > end:
                raise RuntimeError(f"the screen never showed {pattern!r}:\n{self.screen()}")
            time.sleep(0.1)

    def close(self) -> None:
        """End the session."""
        self._run("kill-session", check=False)


def draw(name: str, screen: str, title: str) -> None:
    """Write docs/images/<name>.svg and the same as text."""
    lines = screen.rstrip().splitlines()
    console = Console(record=True, width=WIDTH, file=io.StringIO(), force_terminal=True)
    for line in lines:
        console.print(Text.from_ansi(line), no_wrap=True, overflow="crop")
    IMAGES.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title=title, code_format=SVG, unique_id=name)
    (IMAGES / f"{name}.svg").write_text(re.sub(r"[ \t]+$", "", svg, flags=re.MULTILINE))
    print(f"drew docs/images/{name}.svg")


def main() -> None:
    """Draw all pictures."""
    with tempfile.TemporaryDirectory() as state:
        serve, chat = Terminal("serve", 16), Terminal("chat", 30)
        serve.type("export PATH=.venv/bin:$PATH; clear")
        serve.type(f"isthmus serve --port {PORT} --state-dir {state}")
        serve.wait("curl -N")
        time.sleep(0.5)
        draw("serve", serve.screen(), "isthmus serve")
        chat.type("export PATH=.venv/bin:$PATH; clear")
        chat.type(f"isthmus chat --url http://127.0.0.1:{PORT}")
        for line in ("Hello, who are you?", "Remember: the blue key is 4417.", "What is the blue key?"):
            before = chat.screen().count("tok/s")
            chat.wait("> *$|you", 30)
            chat.type(line)
            for _ in range(300):
                if chat.screen().count("tok/s") > before:
                    break
                time.sleep(0.1)
        time.sleep(0.5)
        draw("chat", chat.screen(), "isthmus chat")
        chat.close()
        serve.close()


if __name__ == "__main__":
    main()
