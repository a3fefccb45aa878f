"""Where qemu-img is."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path


def find_qemu_img() -> str:
    """Its path: of the usual search path, on Windows also where QEMU's installer puts it; empty where there
    is none."""
    places = os.environ.get("PATH", "")
    if sys.platform == "win32":
        installed = Path(os.environ.get("PROGRAMFILES", "C:\\Program Files")) / "qemu"
        places = os.pathsep.join([places, str(installed)])
    return shutil.which("qemu-img", path=places) or ""
