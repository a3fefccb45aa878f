"""Signatures by the real minisign: what it signs we take, and what it refuses we refuse."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.signature import PublicKey, verify

pytestmark = pytest.mark.skipif(shutil.which("minisign") is None, reason="minisign is not installed")


def minisign(*arguments: str | Path) -> bool:
    """Whether it said yes. A key made with -W has no password to ask for."""
    command = ["minisign", *map(str, arguments)]
    return subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False).returncode == 0


@pytest.fixture
def key(tmp_path: Path) -> PublicKey:
    assert minisign("-G", "-W", "-f", "-p", tmp_path / "key.pub", "-s", tmp_path / "key")
    return PublicKey.parse((tmp_path / "key.pub").read_text())


def test_we_and_the_program_agree(tmp_path: Path, key: PublicKey) -> None:
    content, signature = tmp_path / "content", tmp_path / "content.minisig"
    content.write_bytes(b"image" * 100_000)
    digest = hashlib.blake2b(content.read_bytes()).digest()
    assert minisign("-S", "-s", tmp_path / "key", "-m", content, "-t", "demo 2")
    original = signature.read_text()
    assert verify(key, original, digest) == "demo 2"
    # A changed letter of each line, the untrusted comment's among them, which is nobody's.
    places = [original.index("\n") * 2 // 3, 70, original.index("demo"), len(original) - 20]
    for place, passes in zip(places, (True, False, False, False), strict=True):
        changed = original[:place] + ("A" if original[place] != "A" else "B") + original[place + 1 :]
        signature.write_text(changed)
        assert minisign("-V", "-P", str(key), "-m", content) == passes
        try:
            verify(key, changed, digest)
        except ImageError:
            assert not passes
        else:
            assert passes


def test_what_it_signs_the_legacy_way_is_refused(tmp_path: Path, key: PublicKey) -> None:
    content = tmp_path / "content"
    content.write_bytes(b"image")
    assert minisign("-S", "-l", "-s", tmp_path / "key", "-m", content)
    assert minisign("-V", "-P", str(key), "-m", content)
    assert not minisign("-V", "-H", "-P", str(key), "-m", content)
    with pytest.raises(ImageError, match="legacy kind"):
        verify(key, Path(f"{content}.minisig").read_text(), hashlib.blake2b(b"image").digest())
