"""`python -m benchmarks [NAME ...]`: run some or all benchmarks, one after the other, under one lock."""

import argparse
import importlib

from benchmarks.common import lock

NAMES = ("parity", "exactness", "serving", "structured", "snapshots", "learned_index")


def main() -> None:
    """Run what is named; without a name everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"one of {', '.join(NAMES)} (default: all)")
    names = parser.parse_args().names or NAMES
    for name in names:
        if name not in NAMES:
            parser.error(f"{name} is not one of {', '.join(NAMES)}")
    with lock():
        for name in names:
            print(f"== {name}")
            importlib.import_module(f"benchmarks.{name}").main([])


if __name__ == "__main__":
    main()
