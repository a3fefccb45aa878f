"""How files get into a pool of a real libvirt on another host, as it were; see libvirt_daemon.py."""

import ctypes
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from kenaz_drivers.libvirt.elsewhere import STREAMS
from kenaz_drivers.libvirt.streams.library import LIBRARY, Connection, Pool
from kenaz_drivers.libvirt.streams.store import PIECE
from kenaz_drivers.libvirt.streams.upload import STILL

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="libvirtd runs on Linux"),
    pytest.mark.only_where(sys.platform == "linux" and os.geteuid() == 0),
]

NAME = f"kenaz-{'a' * 64}"

CONTENT = b"content!" * (PIECE // 4)


@pytest.fixture
def pool(elsewhere_libvirtd) -> Iterator[Pool]:
    pool = Connection(elsewhere_libvirtd.uri, ctypes.CDLL(LIBRARY)).pool("default")
    yield pool
    pool.delete(NAME)


@pytest.fixture
def file(tmp_path) -> Path:
    (tmp_path / "file").write_bytes(CONTENT)
    return tmp_path / "file"


@contextmanager
def uploading(daemon, file) -> Iterator[subprocess.Popen[str]]:
    command = [*STREAMS, daemon.uri, "upload", "default", str(file), NAME]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as running:
        yield running


def test_what_another_brings_slowly_is_not_brought_again(pool, file, elsewhere_libvirtd):
    assert pool.create(NAME, len(CONTENT))
    with uploading(elsewhere_libvirtd, file) as running:

        def slowly() -> Iterator[bytes]:
            """A byte each time that the other has looked."""
            for at in range(PIECE, PIECE + STILL + 3):
                assert running.stdout.readline() == f"0 waiting {len(CONTENT)}\n"
                yield CONTENT[at : at + 1]
            yield CONTENT[PIECE + STILL + 3 :]

        pool.write(NAME, PIECE, len(CONTENT) - PIECE, slowly())
        pool.write(NAME, 0, PIECE, iter([CONTENT[:PIECE]]))
        said = running.stdout.readlines()
    assert running.returncode == 0, said
    assert set(said) <= {f"0 waiting {len(CONTENT)}\n"}
    assert pool.read(NAME, 0, len(CONTENT)) == CONTENT


@pytest.mark.parametrize("known", [False, True])
def test_a_pool_that_changed_without_libvirt_is_looked_at_anew(pool, file, elsewhere_libvirtd, known):
    there = Path(f"/proc/{elsewhere_libvirtd.pid}/root/var/lib/libvirt/default") / NAME
    if known:
        assert pool.create(NAME, len(CONTENT))
        there.unlink()
    else:
        there.write_bytes(CONTENT)
    with uploading(elsewhere_libvirtd, file) as running:
        said = running.stdout.read()
    assert (running.returncode, said.count("waiting")) == (0, 0), said
    assert (said != "") == known  # it is brought where it is not there
    assert there.read_bytes() == CONTENT
