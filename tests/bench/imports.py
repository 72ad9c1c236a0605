"""What each deferred import saves of a start: ``python -m tests.bench.imports``.

Each row compares starts in which all of ``DEFERRED`` is deferred with starts in which that one is imported at once, in
turns: the median of the differences, in seconds.
"""

import argparse
import subprocess
import sys
import time
from statistics import median

from src.startup.import_libraries import DEFERRED, import_libraries
from tests.support.processes import ROOT


def import_seconds(eager: str = "") -> float:
    command = [sys.executable, "-m", "tests.bench.imports", "--eager", eager]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(ran.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure what each deferred import saves.")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--eager", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.eager is not None:
        begun = time.monotonic()
        import_libraries(eager=[arguments.eager])
        return print(time.monotonic() - begun, flush=True)
    import_seconds()
    print(f"{'import':<20}{'saves':>8}")
    for name in DEFERRED:
        saved = [import_seconds(name) - import_seconds() for _ in range(arguments.runs)]
        print(f"{name:<20}{median(saved):>6.2f} s", flush=True)


if __name__ == "__main__":
    main()
