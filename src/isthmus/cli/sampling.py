"""Flags that `chat` and `complete` share."""

import argparse
from typing import Any

from isthmus.cli.client import DEFAULT_URL
from isthmus.config import read_environment

_FIELDS = ("max_tokens", "temperature", "top_p", "seed")


def add_client_flags(parser: argparse.ArgumentParser) -> None:
    """Which server, which model, how to sample."""
    parser.add_argument("--url", help=f"the server (else ISTHMUS_URL, {DEFAULT_URL})")
    parser.add_argument("--model", help="model to ask (else the first that the server has)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of an answer")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--top-p", type=float, metavar="P", help="nucleus sampling")
    parser.add_argument("--seed", type=int, metavar="N", help="the same seed gives the same answer")


def url_of(arguments: argparse.Namespace) -> str:
    """The server's address: flag, environment, default."""
    return str(arguments.url or read_environment().get("ISTHMUS_URL") or DEFAULT_URL)


def sampling_of(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields of a request that were given; the server checks them."""
    return {name: getattr(arguments, name) for name in _FIELDS if getattr(arguments, name) is not None}
