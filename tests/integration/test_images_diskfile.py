"""Our reading of disk images' headers against that of qemu-img, on its own images and on damaged ones."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from kenaz_engine.images.diskfile import inspect_disk
from kenaz_engine.images.errors import ImageError

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-img is not installed")

HEADER = 112
ROUNDS = 150
SECRET = ("--object", "secret,id=s,data=abc")


def make(path: Path, *options: str, size: str = "64M") -> Path:
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *options, str(path), size]
    subprocess.run(command, check=True, capture_output=True)
    return path


def asked(path: Path) -> dict[str, Any] | None:
    """What qemu-img says of the image; None when it refuses it."""
    command = ["qemu-img", "info", "--output=json", str(path)]
    done = subprocess.run(command, capture_output=True, check=False)
    return json.loads(done.stdout) if done.returncode == 0 else None


@pytest.mark.parametrize(
    "options",
    [
        "",
        "compat=0.10",
        "cluster_size=512",
        "cluster_size=2M",
        "extended_l2=on",
        "compression_type=zstd",
        "lazy_refcounts=on",
        "refcount_bits=1",
        "refcount_bits=64",
        "preallocation=metadata",
    ],
)
@pytest.mark.parametrize("size", ["512", "64M", "10G"])
def test_what_qemu_img_makes_is_taken_for_what_it_says(tmp_path: Path, options: str, size: str) -> None:
    if options == "preallocation=metadata" and size == "10G":
        size = "100M"
    path = make(tmp_path / "disk", *(("-o", options) if options else ()), size=size)
    found, said = inspect_disk(path), asked(path)
    assert said is not None
    assert (found.format, found.virtual_size) == (said["format"], said["virtual-size"])


def test_a_raw_image_is_as_large_as_qemu_img_says(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    for size in (1, 512, 513, 4096):
        path.write_bytes(b"x" * size)
        said = asked(path)
        assert said is not None
        assert ("raw", said["virtual-size"]) == (
            inspect_disk(path).format,
            inspect_disk(path).virtual_size,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-b", "base", "-F", "raw"], "has a backing file"),
        (["-o", "compat=0.10,backing_file=base,backing_fmt=raw"], "has a backing file"),
        (["-o", "data_file=other"], "has an external data file"),
        (["-o", "data_file=other,data_file_raw=on"], "has an external data file"),
        # Not LUKS: qemu-img times its key, and fails where the clock of the processor stands still meanwhile.
        ([*SECRET, "-o", "encrypt.format=aes,encrypt.key-secret=s"], "is encrypted"),
    ],
)
def test_what_would_open_another_file_or_needs_a_key_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("base").write_bytes(bytes(1 << 20))
    with pytest.raises(ImageError, match=message):
        inspect_disk(make(tmp_path / "disk", *options))


@pytest.mark.parametrize("other", ["vmdk", "vhdx", "vdi", "qed", "parallels", "vpc"])
def test_other_formats_are_refused(tmp_path: Path, other: str) -> None:
    path = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", other, str(path), "64M"], check=True)
    with pytest.raises(ImageError, match=f"is of the format {other}"):
        inspect_disk(path)


def test_no_damaged_header_passes_that_qemu_img_would_read_otherwise(tmp_path: Path) -> None:
    """Whatever we take, QEMU opens as the same: one file, that size, and no other file behind it."""
    chance = random.Random(7)
    Path(tmp_path, "base").write_bytes(bytes(1 << 20))
    originals = [
        make(tmp_path / "plain").read_bytes(),
        make(tmp_path / "old", "-o", "compat=0.10").read_bytes(),
        make(tmp_path / "extended", "-o", "extended_l2=on,compression_type=zstd").read_bytes(),
        make(tmp_path / "overlay", "-b", "base", "-F", "raw").read_bytes(),
    ]
    path, taken, refused = tmp_path / "forged", 0, 0
    for _ in range(ROUNDS):
        content = bytearray(chance.choice(originals))
        for _ in range(chance.randint(1, 3)):
            place = chance.randrange(4, HEADER)
            content[place] = chance.choice([0, 1, content[place] ^ 1 << chance.randrange(8), 0xFF])
        path.write_bytes(content)
        try:
            found = inspect_disk(path)
        except ImageError:
            refused += 1
            continue
        taken += 1
        said = asked(path)
        assert said is not None, bytes(content[:HEADER]).hex()
        assert (said["format"], said["virtual-size"]) == ("qcow2", found.virtual_size)
        assert not {"backing-filename", "encrypted"} & said.keys()
        assert "data-file" not in said["format-specific"]["data"]
    assert taken > 10
    assert refused > 10
