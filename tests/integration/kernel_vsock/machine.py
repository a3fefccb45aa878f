"""The machine under TCG that plays the host: its disk, made here, and its boot.

It boots the demo image's kernel and initrd on a disk of its own, made of this machine's files and the modules
of that kernel's package. test_kernel_vsock.py and bench_kernel_vsock.py load it by `runpy`.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import time
from collections.abc import Iterable
from importlib.metadata import distribution
from importlib.metadata import requires as requirements_of
from pathlib import Path
from typing import Any

from kenaz_engine.guest import build
from kenaz_engine.guest.recipe import AGENT, ARCHITECTURES
from kenaz_engine.images.manifest import Image

HERE = Path(__file__).parent
ROOT = Path(__file__).parents[3]
PYTHON = Path("/usr/bin/python3.11")
LIBRARIES = Path("usr/lib/x86_64-linux-gnu")
MODULES = ("vsock_loopback", "vhost_vsock")
WITHOUT_MAX = """#!/bin/sh
for word; do
    shift
    [ "$word" != max ] || word=qemu64
    set -- "$@" "$word"
done
exec qemu-system-x86_64 "$@"
"""
"""QEMU for the machine inside: under two emulators, Linux on `-cpu max` stops for minutes where it first uses
the processor's extended state. The command line is the driver's in all other words."""

FIRMWARE = ("bios-256k.bin", "kvmvapic.bin", "linuxboot_dma.bin", "pvh.bin")


def copy(source: Path, root: Path, place: Path | None = None) -> None:
    """Puts a file or a directory where it is on this machine, or at `place`."""
    target = root / (place or source.relative_to("/"))
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        shutil.copytree(source, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns("__pycache__"))
    else:
        shutil.copy(source, target)


def libraries(programs: Iterable[Path]) -> set[Path]:
    """The shared libraries that these need, and the loader."""
    done = subprocess.run(["ldd", *programs], capture_output=True, text=True, check=False)
    return {Path(path) for path in re.findall(r"(/\S+) \(0x", done.stdout)}


def distributions(name: str, found: dict[str, Any] | None = None) -> dict[str, Any]:
    """That distribution and all that it needs here."""
    found = {} if found is None else found
    found[name] = distribution(name)
    for line in requirements_of(name) or ():
        needed = re.split(r"[^A-Za-z0-9_.-]", line, maxsplit=1)[0]
        if "extra ==" not in line and needed not in found:
            try:
                distributions(needed, found)
            except ModuleNotFoundError:
                found.pop(needed, None)
    return found


def manifest_of(image: Image) -> dict[str, Any]:
    assert image.manifest is not None
    found: dict[str, Any] = json.loads(image.manifest.read_bytes())
    return found


def host_modules(image: Image, scratch: Path) -> dict[str, bytes]:
    """What the image's own kernel loads to be a host; kept in `build`, for its package has 70 MB."""
    versions = manifest_of(image)["packages"]
    packages = {
        name: version
        for name, version in versions.items()
        if name.startswith("linux-image-") or name == "busybox-static"
    }
    kept = ROOT / "build/kernel-vsock" / hashlib.sha256(repr(packages).encode()).hexdigest()[:16]
    if not kept.exists():
        build.download(ARCHITECTURES["x86_64"], packages, scratch)
        tree = scratch / "tree"
        for deb in scratch.glob("*.deb"):
            subprocess.run(["dpkg", "-x", deb, tree], check=True)
        release = build.kernel_release(tree)
        build.run("depmod", "-b", tree, release)
        modules = build.Modules(tree / "lib/modules" / release).in_load_order(MODULES)
        fresh = scratch / "kept"
        fresh.mkdir()
        for number, (name, content) in enumerate(modules.items()):
            (fresh / f"{number:02}-{name}").write_bytes(content)
        shutil.copy(tree / "bin/busybox", fresh / "busybox")
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(fresh, kept)
    return {path.name: path.read_bytes() for path in sorted(kept.iterdir())}


def make_disk(image: Image, scratch: Path, run: str, *, machines: bool, scripts: Iterable[Path] = ()) -> Path:
    """A root disk whose init carries out `run`, shell; with QEMU and the image on it if `machines`. The
    scripts are in /lib/kenaz-host."""
    root = scratch / "root"
    for name in ("dev", "proc", "sys", "run", "tmp", "root", "mnt", "usr/bin", "usr/sbin", "usr/lib64"):
        (root / name).mkdir(parents=True)
    (root / LIBRARIES).mkdir(parents=True)
    for name in ("bin", "sbin", "lib", "lib64"):
        (root / name).symlink_to(f"usr/{name}")
    ours = root / "lib/kenaz-host"
    ours.mkdir()
    (scratch / "debs").mkdir()
    modules = host_modules(image, scratch / "debs")
    (root / "usr/bin/busybox").write_bytes(modules.pop("busybox"))
    (root / "usr/bin/busybox").chmod(0o755)
    (root / "usr/bin/sh").symlink_to("busybox")
    for name, content in modules.items():
        (ours / f"{name}.ko").write_bytes(content)
    (ours / "order").write_text("".join(f"{name}\n" for name in modules))
    (ours / "run").write_text(run)
    copy(HERE / "init.sh", root, Path("usr/sbin/init"))
    (root / "usr/sbin/init").chmod(0o755)
    for script in (HERE / "checks.py", HERE / "intruder.py", AGENT, *scripts):
        copy(script, root, Path("lib/kenaz-host", script.name))
    programs = [PYTHON, *Path("/usr/lib/python3.11/lib-dynload").glob("*.so")]
    for source in (PYTHON, Path("/usr/lib/python3.11")):
        copy(source, root)
    packages = Path("usr/lib/python3/dist-packages")
    for one in distributions("kenaz-launcher").values():
        for file in one.files or ():
            if file.suffix in {".py", ".so", ".json", ".txt", ""} and ".." not in file.parts:
                copy(Path(str(one.locate_file(file))), root, packages / file)
            programs += [Path(str(one.locate_file(file)))] if file.suffix == ".so" else []
    for source in ("engine/kenaz_engine", "drivers/kenaz_drivers", "specs/kenaz_specs"):
        copy(ROOT / source, root, packages / Path(source).name)
    if machines:
        binary = Path(shutil.which("qemu-system-x86_64") or "")
        tcg = Path("/") / LIBRARIES / "qemu/accel-tcg-x86_64.so"
        for program in (binary, tcg):
            copy(program, root)
            programs.append(program)
        for name in FIRMWARE:
            found = [Path(folder, name) for folder in ("/usr/share/seabios", "/usr/share/qemu")]
            copy(next(path for path in found if path.exists()), root, Path("usr/share/qemu", name))
        (ours / "qemu").write_text(WITHOUT_MAX)
        (ours / "qemu").chmod(0o755)
        inside = Path("lib/kenaz-host/image")
        manifest = manifest_of(image)
        for name, part in manifest["parts"].items():
            copy(image.parts[name].path, root, inside / part["file"])
        # Each instruction that the kernel patches costs two emulators all that they have translated.
        manifest["cmdline"] += " noreplace-smp"
        (root / inside / "image.json").write_text(json.dumps(manifest))
        copy(ROOT / "specs/sessions/hello.yaml", root, Path("lib/kenaz-host/hello.yaml"))
    for library in libraries(programs):
        copy(library, root)
    # Under emulation, compiling takes longer than all that is compiled.
    done = ["-q", "-j0", "--invalidation-mode", "unchecked-hash", "-s", root, "-p", "/", root / "usr/lib"]
    subprocess.run([PYTHON, "-I", "-m", "compileall", *done], check=True)
    disk = scratch / "root.ext4"
    used = sum(path.lstat().st_size + 4096 for path in root.rglob("*"))
    options = ["-q", "-F", "-t", "ext4", "-O", "^has_journal", "-E", "root_owner=0:0", "-d", root]
    build.run("mke2fs", *map(str, options), str(disk), str(used // 1024 + (256 << 10)) + "k")
    shutil.rmtree(root)
    return disk


def boot(image: Image, disk: Path, memory: int, seconds: float) -> list[str]:
    """What the guest that plays the host printed, line by line, once it has powered itself off."""
    console = disk.with_name("console")
    drive = f"if=none,id=root,format=raw,snapshot=on,file={disk}"
    # fmt: off
    command = [
        "qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-M", "q35", "-accel", "tcg", "-cpu", "max", "-smp", "2", "-m", str(memory),
        "-kernel", str(image.kernel), "-initrd", str(image.initrd), "-append", image.cmdline,
        "-drive", drive, "-device", "virtio-blk-pci,drive=root,serial=KENAZROOT",
        "-serial", f"file:{console}",
    ]
    # fmt: on
    started = time.monotonic()
    try:
        subprocess.run(command, stdin=subprocess.DEVNULL, timeout=seconds, check=True)
    finally:
        print(f"{console.read_text(errors='replace')}\n{time.monotonic() - started:.1f} s")
    return console.read_text(errors="replace").splitlines()
