"""Kernel vsock (vhost-vsock-pci) through a guest, on a host that has none: bench_transports.py runs in an
emulated machine that plays the host, and its guest is emulated by an emulated QEMU. virtio-serial is measured
there, too: only the ratios between the figures say anything. Takes some four minutes; needs what
test_kernel_vsock.py needs.
"""

from __future__ import annotations

import runpy
import sys
import tempfile
from pathlib import Path

from kenaz_engine.images.catalog import default_cache, find_image

HERE = Path(__file__).parent
MACHINE = HERE.parent / "integration/kernel_vsock/machine.py"
PATIENCE = 1200
RUN = f"""
export KENAZ_BENCH_TRIPS=200 KENAZ_BENCH_BULK={4 << 20} KENAZ_BENCH_PATIENCE={PATIENCE // 2}
qemu-system-x86_64 -version >/dev/null  # read from the disk once, for the probe has deadlines
cd /lib/kenaz-host
python3.11 bench_transports.py --image image/image.json --qemu /lib/kenaz-host/qemu virtio-serial vsock
"""


def main() -> int:
    """Measures and prints. There is no bound: what it takes is the emulators'."""
    machine = runpy.run_path(str(MACHINE), run_name="machine")
    image = find_image("demo", "x86_64", default_cache())
    with tempfile.TemporaryDirectory(prefix="kenaz-") as folder:
        scripts = [HERE / "bench_transports.py"]
        disk = machine["make_disk"](image, Path(folder), RUN, machines=True, scripts=scripts)
        lines = machine["boot"](image, disk, 2048, PATIENCE)
    return 0 if "kenaz-host: status 0" in lines else 1


if __name__ == "__main__":
    sys.exit(main())
