"""Named sets of options for a benchmark, so that `benchmarks/gpu.py` can run it in parts of a few minutes each."""

import argparse
import sys
from collections.abc import Mapping, Sequence


def parse_arguments(
    parser: argparse.ArgumentParser, parts: Mapping[str, Sequence[str]], quick: Sequence[str]
) -> argparse.Namespace:
    """Parses the command line with three more options: --part NAME, --list-parts and --quick.

    Args:
        parser: of the benchmark.
        parts: name -> options of that part. Options of the command line win over a part's.
        quick: options that turn any part into a test of a few seconds on a CPU; they win over a part's.
    """
    parser.add_argument("--part", choices=parts, help="run this part: its options come before those given here")
    parser.add_argument("--list-parts", action="store_true", help="print the parts and their options, and end")
    parser.add_argument("--quick", action="store_true", help="smallest sizes: whether the part runs, not how fast")
    args = parser.parse_args()
    if args.list_parts:
        for name, options in parts.items():
            print(name, *options)
        parser.exit()
    if args.part or args.quick:
        options = [*parts.get(args.part or "", ()), *(quick if args.quick else ())]
        args = parser.parse_args([*options, *sys.argv[1:]])
    return args
