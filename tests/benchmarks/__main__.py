"""Runs every benchmark beside this file, one after the other, each in a process of its own.

Each prints its figures as JSON and exits with 1 when it misses a bound. `make bench` runs this; the figures
that were measured are in docs/performance.md.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Returns 1 when any benchmark missed a bound or failed."""
    worst = 0
    for program in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"# {program.stem}", flush=True)
        worst = max(worst, min(1, abs(subprocess.run([sys.executable, program], check=False).returncode)))
    return worst


if __name__ == "__main__":
    sys.exit(main())
