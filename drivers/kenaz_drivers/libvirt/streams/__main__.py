"""Runs `program` in a Python that knows no packages: what it is part of is found from here."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[3]))
    from kenaz_drivers.libvirt.streams.program import main

    sys.exit(main(sys.argv[1:]))
