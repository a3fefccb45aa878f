"""The builder's parts that need no packages, and how it fails."""

from __future__ import annotations

import json
import lzma
import queue
import re
import struct
import subprocess
import threading
from pathlib import Path

import pytest

from kenaz_engine.guest import build as builder
from kenaz_engine.guest import cpio, ext4
from kenaz_engine.guest.recipe import (
    ARCHITECTURES,
    CONSOLE_PATTERNS,
    FILES,
    HOST_PACKAGES,
    LATE_MODULES,
)
from kenaz_engine.guest.sigilos import GROUPS
from kenaz_engine.images.manifest import PATTERN_EVENTS


def modules(tmp_path: Path) -> builder.Modules:
    dependencies = {
        "ring": "",
        "virtio": "k/ring.ko",
        "pci": "k/legacy.ko k/virtio.ko k/ring.ko",
        "legacy": "",
    }
    (tmp_path / "k").mkdir()
    for name in dependencies:
        (tmp_path / f"k/{name}.ko").write_text(name)
    lines = [f"k/{name}.ko: {needs}".rstrip() for name, needs in dependencies.items()]
    (tmp_path / "modules.dep").write_text("\n".join(lines))
    return builder.Modules(tmp_path)


def test_modules_come_after_what_they_need_and_once(tmp_path: Path) -> None:
    found = modules(tmp_path).in_load_order(["virtio", "pci"])
    assert list(found.items()) == [
        ("ring", b"ring"),
        ("virtio", b"virtio"),
        ("legacy", b"legacy"),
        ("pci", b"pci"),
    ]


def test_a_module_that_the_kernel_lacks_is_named(tmp_path: Path) -> None:
    listed = modules(tmp_path)
    assert "zork" not in listed
    with pytest.raises(builder.BuildError, match="no module zork"):
        listed.in_load_order(["zork"])


def test_cpio_reads_back_what_was_put_in(tmp_path: Path) -> None:
    content = cpio.archive(
        [
            cpio.directory("a"),
            cpio.file("a/b", b"odd", 0o755),
            cpio.file("empty", b""),
            cpio.character_device("null", 1, 3),
        ]
    )
    assert content[:6] == b"070701"
    assert len(content) % 4 == 0
    shown = subprocess.run(
        ["cpio", "-itv", "--numeric-uid-gid"], input=content, capture_output=True, check=True
    )
    lines = [re.split(r"\s+", line) for line in shown.stdout.decode().splitlines()]
    assert [(line[0], line[2], line[3], line[-1]) for line in lines] == [
        ("drwxr-xr-x", "0", "0", "a"),
        ("-rwxr-xr-x", "0", "0", "a/b"),
        ("-rw-r--r--", "0", "0", "empty"),
        ("crw-------", "0", "0", "null"),
    ]
    unpacked = subprocess.run(
        ["cpio", "-i", "--to-stdout", "--quiet", "a/b"], input=content, capture_output=True, check=True
    )
    assert unpacked.stdout == b"odd"


def setup_header(payload: bytes) -> bytes:
    header = bytearray(1024)
    header[0x1F1] = 1
    struct.pack_into("<II", header, 0x248, 0, len(payload))
    return bytes(header) + payload


def test_an_x86_kernel_is_unpacked(tmp_path: Path) -> None:
    packed = subprocess.run(["lz4", "-lc"], input=b"vmlinux" * 1000, capture_output=True, check=True).stdout
    path = tmp_path / "vmlinuz"
    path.write_bytes(setup_header(packed + struct.pack("<I", 7000)))
    assert builder.unpack_kernel(ARCHITECTURES["x86_64"], path, print) == b"vmlinux" * 1000


def test_a_kernel_packed_otherwise_or_of_another_kind_stays_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(setup_header(b"BZh9"))
    said: list[str] = []
    assert builder.unpack_kernel(ARCHITECTURES["x86_64"], path, said.append) == path.read_bytes()
    assert said == ["the kernel is packed neither with lz4 nor with xz; using it packed, which boots slower"]
    assert builder.unpack_kernel(ARCHITECTURES["aarch64"], path, said.append) == path.read_bytes()


def test_a_kernel_packed_with_xz_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(setup_header(lzma.compress(b"vmlinux" * 1000)))
    assert builder.unpack_kernel(ARCHITECTURES["x86_64"], path, print) == b"vmlinux" * 1000


def test_missing_tools_are_told_with_their_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder, "_which", lambda tool: None if tool == "lz4" else tool)
    with pytest.raises(builder.BuildError, match="needs tools that this host lacks: lz4") as caught:
        builder.build("x86_64", tmp_path / "image")
    assert caught.value.hint == f"apt-get install {' '.join(HOST_PACKAGES)}"
    assert list(tmp_path.iterdir()) == []


def test_a_tool_that_fails_is_told_with_its_last_words(tmp_path: Path) -> None:
    with pytest.raises(builder.BuildError, match="dpkg -x failed with status 2: dpkg-deb: error: "):
        builder.run("dpkg", "-x", tmp_path / "none.deb", tmp_path)


def answers(monkeypatch: pytest.MonkeyPatch, **by_tool: str) -> None:
    """Lets the builder hear `by_tool` in place of what the tools say; keys are tool and first argument."""

    def run(tool: str, *arguments: object, **_: object) -> str:
        return by_tool[f"{tool}_{arguments[0]}".replace("-", "_")]

    monkeypatch.setattr(builder, "run", run)


def test_a_foreign_architecture_must_be_known_to_dpkg(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(monkeypatch, dpkg___print_architecture="amd64\n", dpkg___print_foreign_architectures="")
    with pytest.raises(builder.BuildError, match="no packages for arm64") as caught:
        builder.resolve(ARCHITECTURES["aarch64"])
    assert caught.value.hint == "dpkg --add-architecture arm64 && apt-get update"


def test_empty_package_lists_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    answers(
        monkeypatch,
        dpkg___print_architecture="amd64\n",
        dpkg___print_foreign_architectures="arm64\n",
        apt_cache_depends="linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-1-cloud-amd64\n",
        apt_cache_policy="libc6:\n  Candidate: 2.36\nzlib1g:\n  Candidate: (none)\n",
    )
    with pytest.raises(
        builder.BuildError, match=r"do not have linux-image-6\.1\.0-1-cloud-amd64, busybox"
    ) as caught:
        builder.resolve(ARCHITECTURES["x86_64"])
    assert "libc6," not in str(caught.value)
    assert caught.value.hint == "apt-get update"


def test_a_failed_download_says_how_to_renew_the_lists(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def run(*_: object, **__: object) -> str:
        raise builder.BuildError("404")

    monkeypatch.setattr(builder, "run", run)
    with pytest.raises(builder.BuildError, match="packages could not be fetched: 404") as caught:
        builder.download(ARCHITECTURES["x86_64"], {"libc6": "1"}, tmp_path)
    assert caught.value.hint == "apt-get update"


def test_a_package_with_modules_for_no_kernel_is_refused(tmp_path: Path) -> None:
    (tmp_path / "lib/modules").mkdir(parents=True)
    with pytest.raises(builder.BuildError, match="modules for 0 kernels"):
        builder.kernel_release(tmp_path)


@pytest.fixture
def false_make(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces the costly part of a build; gets a line for each build that is made."""
    made: list[str] = []
    monkeypatch.setattr(builder, "resolve", lambda target: {"libc6": "1"})
    monkeypatch.setattr(builder, "_require_tools", lambda kind: None)

    def make(target: object, packages: object, inputs: str, scratch: Path, report: object) -> Path:
        made.append(inputs)
        (scratch / "new").mkdir()
        part = {"file": "kernel", "size": 6}
        (scratch / "new/kernel").write_text("kernel")
        (scratch / "new/image.json").write_text(json.dumps({"inputs": inputs, "parts": {"kernel": part}}))
        return scratch / "new"

    monkeypatch.setattr(builder, "_make", make)
    return made


def test_an_image_is_built_once_and_again_when_asked_or_damaged(
    tmp_path: Path, false_make: list[str]
) -> None:
    output = tmp_path / "demo" / "x86_64"
    said: list[str] = []

    def build(*, force: bool = False) -> int:
        assert builder.build("x86_64", output, force=force, report=said.append) == output / "image.json"
        return len(false_make)

    assert build() == 1
    assert build() == 1
    assert said[-1] == f"demo image for x86_64 is current: {output}"
    assert build(force=True) == 2
    (output / "kernel").write_text("short")
    assert build() == 3
    (output / "image.json").write_text("{}")
    assert build() == 4
    assert sorted(path.name for path in output.parent.iterdir()) == [".x86_64.lock", "x86_64"]


def test_new_package_lists_with_the_same_packages_build_nothing(
    tmp_path: Path, false_make: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    builder.build("x86_64", tmp_path / "image", report=print)
    monkeypatch.setattr(builder, "_package_lists", lambda target: [("new", 1, 2)])
    builder.build("x86_64", tmp_path / "image", report=print)
    monkeypatch.setattr(builder, "_package_lists", lambda target: [("newer", 1, 2)])
    monkeypatch.setattr(builder, "resolve", lambda target: {"libc6": "2"})
    builder.build("x86_64", tmp_path / "image", report=print)
    assert len(false_make) == 2


def test_a_failed_build_leaves_the_old_image(
    tmp_path: Path, false_make: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "image"
    builder.build("x86_64", output, report=print)

    def fail(*_: object) -> Path:
        raise builder.BuildError("no")

    monkeypatch.setattr(builder, "_make", fail)
    with pytest.raises(builder.BuildError):
        builder.build("x86_64", output, force=True, report=print)
    assert (output / "kernel").read_text() == "kernel"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".image.lock", "image"]


def test_a_second_build_waits_for_the_first(tmp_path: Path) -> None:
    said: queue.Queue[str] = queue.Queue()

    def second() -> None:
        with builder._locked(tmp_path / "lock", said.put):
            said.put("in")

    thread = threading.Thread(target=second)
    with builder._locked(tmp_path / "lock", said.put):
        thread.start()
        assert said.get(timeout=10) == "waiting for another build of the same image"
        assert said.empty()
    assert said.get(timeout=10) == "in"
    thread.join()


def test_a_tree_is_told_in_order_and_with_plain_permissions(tmp_path: Path) -> None:
    for name, mode in {"b/tool": 0o700, "a": 0o600}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("content")
        (tmp_path / name).chmod(mode)
    (tmp_path / "b").chmod(0o700)
    (tmp_path / "c").symlink_to("b/tool")
    told = ext4.commands(tmp_path, 1234)
    assert [line for line in told if line.startswith(("mkdir", "write", "symlink"))] == [
        f'write "{tmp_path}/a" "/a"',
        'mkdir "/b"',
        f'write "{tmp_path}/b/tool" "/b/tool"',
        'symlink "/c" b/tool',
    ]
    modes = [line.split()[1:] for line in told if " mode " in line]
    assert modes == [
        ['"/a"', "mode", "0100644"],
        ['"/b"', "mode", "040755"],
        ['"/b/tool"', "mode", "0100755"],
        ['"/c"', "mode", "0120777"],
    ]
    assert {word for line in told for word in line.split() if word.startswith("@")} == {"@1234"}
    # Two files of one block each, a directory and a link, and what is to stay free.
    assert ext4.options(tmp_path, 10 * 4096)[1] == 2 + 4 + 10


def test_a_file_that_debugfs_cannot_take_is_told(tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (root / "large").write_bytes(b"x" * (1 << 20))
    with (
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(builder.BuildError, match=r"debugfs could not fill the root file system: .*write"),
    ):
        patch.setattr(ext4, "options", lambda *_: (["-q", "-F", "-t", "ext4", "-b", "4096"], 64))
        builder.make_ext4(root, tmp_path / "image", 1234)


def test_console_patterns_raise_known_events_and_compile() -> None:
    for event, pattern in CONSOLE_PATTERNS:
        assert event in PATTERN_EVENTS
        re.compile(pattern)


def test_the_inits_load_what_the_recipe_packs() -> None:
    script = (FILES / "initrd-init.sh").read_text()
    assert set(re.findall(r"\bload ([a-z]+)", script)) == set(GROUPS)
    assert "evdev" in LATE_MODULES


@pytest.mark.parametrize("script", sorted(FILES.iterdir()), ids=lambda path: path.name)
def test_the_inits_are_shell(script: Path) -> None:
    subprocess.run(["sh", "-n", script], check=True)
