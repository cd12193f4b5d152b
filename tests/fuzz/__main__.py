"""`python -m tests.fuzz --count 5000 --seed 1`: the fuzzer by hand; `--only N` makes one input again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path

from tests.fuzz.run import Fuzzer, Outcome


def main() -> int:
    """Run it, print each fault as it is found, and return 1 if there was one."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="one input, by its number")
    parser.add_argument("--reader", help="inputs of this reader alone")
    options = parser.parse_args()
    outcome, begun = Outcome(), time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        fuzzer = Fuzzer(Path(place) / "world", options.seed)
        numbers = range(options.count) if options.only is None else [options.only]
        for number in numbers:
            seen = len(outcome.faults)
            fuzzer.input(number, outcome, options.reader)
            for fault in outcome.faults[seen:]:
                print(fault, flush=True)  # noqa: T201
    print(f"{time.monotonic() - begun:.0f} s: {dict(outcome.counts)}")  # noqa: T201
    return 1 if outcome.faults else 0


if __name__ == "__main__":
    sys.exit(main())
