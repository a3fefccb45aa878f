"""What is written here for macOS and Windows is read there, too: nothing of POSIX is needed to import it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

HIDDEN = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
POSIX = (
    "fork",
    "geteuid",
    "getuid",
    "getpgid",
    "killpg",
    "mkfifo",
    "openpty",
    "pidfd_open",
    "setsid",
    "uname",
)

IMPORT_ALL = """
import importlib, os, pkgutil, signal, socket, sys, types

platform, hidden, posix = sys.argv[1], sys.argv[2].split(","), sys.argv[3].split(",")
packages = ("kenaz_drivers", "kenaz_engine", "kenaz_specs")

def everything():
    for package in packages:
        found = importlib.import_module(package)
        yield package
        for module in pkgutil.walk_packages(found.__path__, package + "."):
            yield module.name

names = sorted(set(everything()) - {"kenaz_engine.guest.agent"})  # which runs in the guest
for name in names:  # so that all of others is there, and is none of the matter
    importlib.import_module(name)
for name in [name for name in sys.modules if name.split(".")[0] in packages]:
    del sys.modules[name]
sys.platform = platform
for name in hidden:
    sys.modules[name] = None
if platform == "win32":
    for name in ("msvcrt", "_winapi", "asyncio.windows_utils"):
        sys.modules[name] = types.ModuleType(name)
    sys.modules["asyncio.windows_utils"].pipe = None
    for name in posix:
        if hasattr(os, name):
            delattr(os, name)
    del os.O_CLOEXEC, signal.SIGKILL, socket.AF_UNIX
del socket.AF_VSOCK
for name in names:
    importlib.import_module(name)
print(len(names))
"""


@pytest.mark.parametrize(("platform", "hidden"), [("darwin", ()), ("win32", HIDDEN)])
def test_every_module_can_be_imported(platform: str, hidden: tuple[str, ...]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_ALL, platform, ",".join(hidden) or "none", ",".join(POSIX)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = [path for source in ("engine", "drivers", "specs") for path in (ROOT / source).rglob("*.py")]
    assert len(written) - 2 <= int(done.stdout) <= len(written)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_types_are_right_elsewhere(platform: str) -> None:
    mypy = [sys.executable, "-m", "mypy", "--platform", platform, "--cache-dir", f".mypy_cache/{platform}"]
    done = subprocess.run(mypy, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


ELSEWHERE = """
import importlib, sys, types
import pytest

class Elsewhere:
    def pytest_sessionstart(self, session):
        # All of others is there, and does not notice; all of ours is imported anew.
        for name in sys.argv[2].split(","):
            importlib.import_module(name)
        for name in [name for name in sys.modules if name.split(".")[0] in ("kenaz_engine", "kenaz_drivers")]:
            del sys.modules[name]
        sys.platform = sys.argv[1]
        if sys.platform == "win32":
            for name in ("msvcrt", "_winapi", "asyncio.windows_utils"):
                sys.modules[name] = types.ModuleType(name)
            sys.modules["asyncio.windows_utils"].pipe = None

sys.exit(pytest.main(sys.argv[3:], plugins=[Elsewhere()]))
"""
OTHERS = (
    "trio trio.testing httpx jsonschema yaml transitions platformdirs pycdlib jiter hypothesis asyncio "
    "ctypes subprocess multiprocessing concurrent.futures ssl uuid "
    "cryptography.hazmat.primitives.asymmetric.ed25519"
)
PURE = (
    "property/test_driver_properties.py property/test_hyperv_properties.py property/test_spec_properties.py "
    "property/test_vfkit_properties.py unit/test_channel_framing.py unit/test_channel_protocol.py "
    "unit/test_driver_qemu_argv.py unit/test_driver_vfkit.py "
    "unit/test_journal_records.py unit/test_lifecycle_machine.py unit/test_spec_resolve.py"
)


@pytest.mark.slow
@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_what_is_pure_is_the_same_elsewhere(platform: str) -> None:
    """The tests of what decides, where the system says that it is another."""
    tests = [str(ROOT / "tests" / name) for name in PURE.split()]
    words = ["-q", "-p", "no:cacheprovider", "-p", "no:kenaz", *tests]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, platform, ",".join(OTHERS.split()), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
