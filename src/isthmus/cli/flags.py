"""The settings as command-line flags, and the way from parsed arguments to checked settings."""

import argparse
from collections.abc import Collection

from isthmus.config import Loaded, load, read_environment, show_size, specs


def show(value: object) -> str:
    """A default or a value as it may be written."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def show_setting(name: str, value: object) -> str:
    """As `show`, with sizes in units."""
    if specs()[name][0].kind == "size" and isinstance(value, int):
        return show_size(value)
    return show(value)


def add_settings(parser: argparse.ArgumentParser, only: Collection[str] = ()) -> None:
    """A flag for every setting (or for those in `only`), grouped, and `--config`."""
    parser.add_argument("--config", metavar="FILE", help="TOML file of settings (else ISTHMUS_CONFIG, ./isthmus.toml)")
    groups: dict[str, argparse._ArgumentGroup] = {}
    for name, (spec, default) in specs().items():
        if only and name not in only:
            continue
        if spec.group not in groups:
            groups[spec.group] = parser.add_argument_group(spec.group.lower())
        flag = "--" + name.replace("_", "-")
        text = f"{spec.help} [{show_setting(name, default) or 'empty'}]".replace("%", "%%").replace("`", "")
        target = f"setting_{name}"
        if spec.kind == "switch":
            groups[spec.group].add_argument(
                flag, dest=target, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
            )
        else:
            metavar = "|".join(spec.choices) if spec.choices else spec.kind.upper()
            groups[spec.group].add_argument(flag, dest=target, default=argparse.SUPPRESS, metavar=metavar, help=text)


def load_settings(arguments: argparse.Namespace) -> Loaded:
    """The effective settings. Raises `ConfigInvalid`."""
    given = vars(arguments)
    flags = {name.removeprefix("setting_"): value for name, value in given.items() if name.startswith("setting_")}
    return load(flags, read_environment(), given.get("config"))
