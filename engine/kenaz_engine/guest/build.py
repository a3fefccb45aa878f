"""Builds images from Debian packages, without root: `kenaz-launcher image build [NAME]`.

What is here builds the demo image; `sigilos` builds the other by way of this. The result are four files:
`kernel`, `initrd`, `root.ext4` and the manifest `image.json` (see docs/reference/image.md). They appear whole
or not at all, and are built again when their inputs have changed.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from kenaz_engine import __version__
from kenaz_engine.guest import cpio, ext4
from kenaz_engine.guest.recipe import (
    AGENT,
    ARCHITECTURES,
    CONSOLE_PATTERNS,
    FILES,
    GUEST_PACKAGES,
    HOST_PACKAGES,
    LATE_MODULES,
    MODULES,
    OS_RELEASE,
    STDLIB,
    WORKBENCH_MODULES,
    Architecture,
)

NAME = "demo"
MANIFEST_SCHEMA = 1
ROOT_SLACK = 32 << 20
"""Free bytes of the root file system before it grows to the size of the session's disk."""

Report = Callable[[str], None]
Make = Callable[[Architecture, Mapping[str, str], str, Path, Report], Path]


class BuildError(Exception):
    """The image cannot be built. `hint` is what the user can do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Kind:
    """An image that can be built. `resolve` gives version by name of the packages that it is made of, or as
    much as says that it has to be built again; `make` builds in a directory and returns the one that is to
    become the image. `sources` are the files of this project that go into it, `tools` those of the host, and
    `packages` the Debian packages that have these."""

    name: str
    architectures: Mapping[str, Architecture]
    tools: tuple[str, ...]
    packages: tuple[str, ...]
    sources: tuple[Path, ...]
    resolve: Callable[[Architecture], dict[str, str]]
    make: Make


def build(
    arch: str,
    output: Path | None = None,
    *,
    force: bool = False,
    report: Report = print,
    kind: Kind | None = None,
) -> Path:
    """Makes the image for `arch` (the demo, unless another `kind` is given), unless it is there and current:
    in the directory `output`, or else in the store, under its name.

    Returns the path of the manifest. Two builds of one image wait for each other. Raises BuildError when the
    host lacks tools or packages, or when a tool fails, ImageError for the store; what was there is then as it
    was.
    """
    kind = kind or demo()
    target = kind.architectures[arch]
    place = Directory(output) if output else InStore(kind.name, arch)
    _require_tools(kind)
    place.make()
    with _locked(place.lock, report) as lock:
        # Asking apt takes a second: while its lists are those of the last build, the answer is, too.
        stamp = _digest([_sources(kind), _package_lists(target)])
        current = lock.read() == stamp and place.is_current()
        if not current or force:
            packages = kind.resolve(target)
            inputs = _digest([_sources(kind), sorted(packages.items())])
            current = place.is_current(inputs)
        if current and not force:
            _note(lock, stamp)
            report(f"{kind.name} image for {arch} is current: {place}")
            return place.manifest
        report(f"building the {kind.name} image for {arch}")
        with tempfile.TemporaryDirectory(prefix=f"build-{arch}-", dir=place.scratch) as scratch:
            place.put(kind.make(target, packages, inputs, Path(scratch), report))
        _note(lock, stamp)
    report(f"{kind.name} image for {arch} is ready: {place}")
    return place.manifest


def demo() -> Kind:
    """The demo image."""
    here = Path(__file__).parent
    own = [here / name for name in ("build.py", "cpio.py", "ext4.py", "recipe.py")]
    return Kind(
        NAME,
        ARCHITECTURES,
        ("apt-get", "apt-cache", "dpkg", "mke2fs", "debugfs", "depmod", "lz4", "python3.11"),
        HOST_PACKAGES,
        (AGENT, *sorted(FILES.iterdir()), *own),
        resolve,
        _make,
    )


def _require_tools(kind: Kind) -> None:
    missing = [tool for tool in kind.tools if _which(tool) is None]
    if missing:
        raise BuildError(
            f"the {kind.name} image needs tools that this host lacks: {', '.join(missing)}",
            f"apt-get install {' '.join(kind.packages)}",
        )


def _which(tool: str) -> str | None:
    """Where `tool` is; the sbin directories are not on every user's PATH, but need no privilege here."""
    return shutil.which(tool, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def run(
    tool: str,
    *arguments: str | Path,
    cwd: Path | None = None,
    stdin: bytes = b"",
    complaints: bool = False,
    added: Mapping[str, str] | None = None,
) -> str:
    """What the tool prints, or what it complains of where that is asked for. Raises BuildError with its last
    words when it fails."""
    # The C locale, because some of the output is parsed.
    environment = {**os.environ, "LC_ALL": "C", "DEBIAN_FRONTEND": "noninteractive", **(added or {})}
    command = [_which(tool) or tool, *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, input=stdin, capture_output=True, env=environment, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).decode(errors="replace").strip().splitlines()[-3:]
        raise BuildError(f"{tool} {arguments[0]} failed with status {done.returncode}: {' / '.join(last)}")
    return (done.stderr if complaints else done.stdout).decode(errors="replace")


if sys.platform == "win32":

    def _is_root() -> bool:
        return False

    def _try_lock(lock: TextIO, *, wait: bool) -> bool:
        raise BuildError("images are built on Linux, from Debian packages", "fetch one: image pull")

else:
    import fcntl

    def _is_root() -> bool:
        return os.geteuid() == 0

    def _try_lock(lock: TextIO, *, wait: bool) -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
        return True


@contextmanager
def _locked(path: Path, report: Report) -> Iterator[TextIO]:
    """Holds the kernel's lock on `path`, which stays: unlinking a lock file lets two in."""
    with path.open("a+") as lock:
        if not _try_lock(lock, wait=False):
            report("waiting for another build of the same image")
            _try_lock(lock, wait=True)
        lock.seek(0)
        yield lock


def _note(lock: TextIO, stamp: str) -> None:
    """Keeps `stamp` in the lock file, for the next build to compare."""
    lock.truncate(0)
    lock.write(stamp)


# Inputs ---------------------------------------------------------------------------------------------------


def resolve(target: Architecture, guest: Sequence[str] = GUEST_PACKAGES) -> dict[str, str]:
    """Version by package name, as the host's package lists have them; the kernel is the versioned one."""
    native = run("dpkg", "--print-architecture").strip()
    if target.debian not in (native, *run("dpkg", "--print-foreign-architectures").split()):
        raise BuildError(
            f"this host's package lists have no packages for {target.debian}",
            f"dpkg --add-architecture {target.debian} && apt-get update",
        )
    depends = run("apt-cache", "depends", "--important", f"{target.kernel}:{target.debian}")
    kernel = next(
        (name.partition(":")[0] for name in depends.split() if name.startswith("linux-image-6")),
        target.kernel,
    )
    names = [f"{name}:{target.debian}" for name in (kernel, *guest)]
    versions: dict[str, str] = {}
    name = ""
    for line in run("apt-cache", "policy", *names).splitlines():
        if not line.startswith(" "):
            name = line.partition(":")[0]
        elif line.startswith("  Candidate: ") and "(none)" not in line:
            versions[name] = line.split()[1]
    missing = [name for name in (kernel, *guest) if name not in versions]
    if missing:
        raise BuildError(f"the package lists do not have {', '.join(missing)}", "apt-get update")
    return versions


def _sources(kind: Kind) -> list[str]:
    """Digests of what of this project goes into the image or says how it is made."""
    return [__version__, *(hashlib.sha256(path.read_bytes()).hexdigest() for path in kind.sources)]


def _package_lists(target: Architecture) -> list[tuple[str, int, int]]:
    """A cheap sign of change of what apt knows of that architecture."""
    pattern = f"*_binary-{target.debian}_Packages*"
    found = [(path, path.stat()) for path in sorted(Path("/var/lib/apt/lists").glob(pattern))]
    return [(path.name, status.st_size, status.st_mtime_ns) for path, status in found]


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# Where the result goes ------------------------------------------------------------------------------------


class Directory:
    """A directory of its own, which appears whole or not at all."""

    def __init__(self, path: Path) -> None:
        self.scratch = path.parent
        self.lock = path.with_name(f".{path.name}.lock")
        self.manifest = path / "image.json"
        self._path = path

    def __str__(self) -> str:
        return str(self._path)

    def make(self) -> None:
        """Makes what the build needs."""
        self.scratch.mkdir(parents=True, exist_ok=True)

    def is_current(self, inputs: str | None = None) -> bool:
        """Whether the image is there, whole, and made from `inputs`."""
        try:
            data = json.loads(self.manifest.read_bytes())
            sizes = {part["file"]: part["size"] for part in data["parts"].values()}
            whole = all((self._path / name).stat().st_size == size for name, size in sizes.items())
            return whole and inputs in (None, data["inputs"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False

    def put(self, result: Path) -> None:
        """Puts the finished directory in its place. A session that runs on the old files keeps them open."""
        result.chmod(0o755)
        if self._path.exists():
            self._path.rename(result.with_name("old"))
        result.rename(self._path)


class InStore:
    """The store, where sessions find it by its name; older builds stay until they are pruned."""

    def __init__(self, name: str, arch: str) -> None:
        from kenaz_engine.images.store import Store, default_cache

        self._name = name
        self._arch = arch
        self._store = Store.at(default_cache())
        self.scratch = self._store.tmp
        self.lock = self._store.lock_path(f"build-{name}-{arch}")

    def __str__(self) -> str:
        return f"image {self._name} in {self._store.root}"

    def make(self) -> None:
        """Makes the store."""
        self._store.make()

    @property
    def manifest(self) -> Path:
        """The manifest of the image that the name stands for."""
        version = self._store.read_ref(self._name, self._arch).find()
        assert version is not None
        return self._store.blob(version.digest)

    def is_current(self, inputs: str | None = None) -> bool:
        """Whether the name stands for an image that was built here, whole, and made from `inputs`."""
        from kenaz_engine.images.errors import ImageError

        try:
            version = self._store.read_ref(self._name, self._arch).find()
            if version is None or version.how != "built":
                return False
            self._store.load(version)
            return inputs in (None, json.loads(self.manifest.read_bytes())["inputs"])
        except (ImageError, OSError, ValueError, KeyError):
            return False

    def put(self, result: Path) -> None:
        """Takes the parts into the store, and gives them the name."""
        import trio

        from kenaz_engine.images.catalogfile import AtManifest
        from kenaz_engine.images.fetch import Fetcher
        from kenaz_engine.images.transfer import Patience

        manifest = result / "image.json"
        source = AtManifest((manifest.as_uri(),), hashlib.sha256(manifest.read_bytes()).hexdigest())

        async def bring() -> None:
            async with Fetcher(self._store, Patience(), lambda _: None) as fetcher:
                _, held = await fetcher.image(self._name, self._arch, source, how="built")
                held.close()

        trio.run(bring)


# The build ------------------------------------------------------------------------------------------------


def _make(
    target: Architecture, packages: Mapping[str, str], inputs: str, scratch: Path, report: Report
) -> Path:
    """Builds in `scratch` and returns the directory that is to become the image."""
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "1700000000"))
    tree, full, root = scratch / "tree", scratch / "stdlib", scratch / "root"
    debs, result = scratch / "debs", scratch / "image"
    for path in (tree, full, root, debs, result):
        path.mkdir()
    started = time.monotonic()

    def step(text: str) -> None:
        report(f"  {time.monotonic() - started:5.1f} s  {text}")

    step(f"fetching {len(packages)} packages")
    download(target, packages, debs)
    step("unpacking")
    for deb in sorted(debs.glob("*.deb")):
        # The whole standard library is some 30 MB that the guest does not need: it is picked from.
        run("dpkg", "-x", deb, full if deb.name.startswith("libpython3.11-stdlib_") else tree)
    release = kernel_release(tree)
    run("depmod", "-b", tree, release)
    modules = Modules(tree / "lib/modules" / release)
    step(f"kernel {release}")
    (result / "kernel").write_bytes(unpack_kernel(target, tree / f"boot/vmlinuz-{release}", step))
    step("initrd")
    (result / "initrd").write_bytes(make_initrd(tree, modules))
    step("root file system")
    _fill_root(tree, root, modules)
    python = Path("usr/lib/python3.11")
    _copy_stdlib(tree / python, full / python, root / python)
    make_ext4(root, result / "root.ext4", epoch)
    manifest = make_manifest(NAME, target, packages, inputs, release, result)
    (result / "image.json").write_text(json.dumps(manifest, indent=2) + "\n")
    return result


def download(target: Architecture, packages: Mapping[str, str], into: Path) -> None:
    """Downloads each package; apt checks it against the signed package lists."""
    names = [f"{name}:{target.debian}={version}" for name, version in packages.items()]
    # apt would drop to a user of its own that cannot write here.
    sandbox = ["-o", "APT::Sandbox::User=root"] if _is_root() else []
    try:
        run("apt-get", "download", *sandbox, *names, cwd=into)
    except BuildError as error:
        raise BuildError(f"packages could not be fetched: {error}", "apt-get update") from error


def kernel_release(tree: Path) -> str:
    found = sorted(path.name for path in (tree / "lib/modules").iterdir())
    if len(found) != 1:
        raise BuildError(f"the kernel package holds modules for {len(found)} kernels, not one")
    return found[0]


class Modules:
    """The kernel's modules and what each needs loaded before it."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._needs: dict[str, tuple[str, list[str]]] = {}
        for line in (directory / "modules.dep").read_text().splitlines():
            path, _, needs = line.partition(":")
            self._needs[_stem(path)] = (path, needs.split())

    def __contains__(self, name: str) -> bool:
        return name in self._needs

    def in_load_order(self, names: Sequence[str]) -> dict[str, bytes]:
        """Content by module name, for `names` and what they need, each after its needs."""
        ordered: dict[str, bytes] = {}
        for name in names:
            if name not in self:
                raise BuildError(f"the kernel has no module {name}")
            path, needs = self._needs[name]
            # modules.dep lists needs outermost first: the last one has to be loaded first.
            for module in (*reversed(needs), path):
                ordered.setdefault(_stem(module), (self._directory / module).read_bytes())
        return ordered


def _stem(path: str) -> str:
    return path.rpartition("/")[2].removesuffix(".ko")


def unpack_kernel(target: Architecture, packed: Path, step: Report) -> bytes:
    """The kernel to boot: unpacked where the boot protocol allows, which saves the guest the unpacking."""
    image = packed.read_bytes()
    if target.name != "x86_64":
        return image
    # Linux/x86 boot protocol: setup sectors at 0x1f1, payload's offset behind them and its length at 0x248.
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (image[0x1F1] + 1) * 512 + offset
    payload = image[start : start + length]
    if payload.startswith(b"\xfd7zXZ\0"):
        return lzma.LZMADecompressor().decompress(payload)
    if not payload.startswith(b"\x02\x21\x4c\x18"):
        step("the kernel is packed neither with lz4 nor with xz; using it packed, which boots slower")
        return image
    # Four bytes after the archive hold the unpacked size; lz4 takes them for the size of one more block.
    with tempfile.TemporaryDirectory() as scratch:
        source, unpacked = Path(scratch, "payload.lz4"), Path(scratch, "vmlinux")
        source.write_bytes(payload[:-4])
        run("lz4", "-dqf", source, unpacked)
        return unpacked.read_bytes()


def make_initrd(tree: Path, modules: Modules, groups: Mapping[str, Sequence[str]] = MODULES) -> bytes:
    """A cpio archive, not packed: it is small, and the guest has better things to do than to unpack."""
    entries = [cpio.directory(name) for name in ("bin", "dev", "meta", "modules", "proc", "root", "sys")]
    entries.append(cpio.character_device("dev/console", 5, 1))
    entries.append(cpio.file("bin/busybox", (tree / "bin/busybox").read_bytes(), 0o755))
    entries.append(cpio.file("init", (FILES / "initrd-init.sh").read_bytes(), 0o755))
    bus = modules.in_load_order(groups["bus"])
    contents: dict[str, bytes] = {}
    for group, names in groups.items():
        needed = modules.in_load_order(names)
        order = [name for name in needed if group == "bus" or name not in bus]
        entries.append(cpio.file(f"modules/{group}.order", "".join(f"{name}\n" for name in order).encode()))
        contents |= needed
    entries += [cpio.file(f"modules/{name}.ko", content) for name, content in sorted(contents.items())]
    return cpio.archive(entries)


def _fill_root(tree: Path, root: Path, modules: Modules) -> None:
    """Copies what the guest needs from the unpacked packages into `root`."""
    for name in (
        "bin",
        "dev",
        "etc",
        "lib",
        "mnt",
        "proc",
        "root",
        "run",
        "sbin",
        "sys",
        "tmp",
        "usr/bin",
        "var",
    ):
        (root / name).mkdir(parents=True)
    copy(tree / "bin/busybox", root / "bin/busybox")
    copy(tree / "usr/bin/python3.11", root / "usr/bin/python3.11")
    (root / "bin/sh").symlink_to("busybox")
    _copy_libraries(tree, root)
    kenaz = root / "lib/kenaz"
    kenaz.mkdir(parents=True)
    for order, wanted in (("order", LATE_MODULES), ("workbench.order", WORKBENCH_MODULES)):
        needed = modules.in_load_order([name for name in wanted if name in modules])
        (kenaz / order).write_text("".join(f"{name}\n" for name in needed))
        for name, content in needed.items():
            (kenaz / f"{name}.ko").write_bytes(content)
    (root / "etc/os-release").write_text(OS_RELEASE.format(version=__version__))
    (root / "etc/hostname").write_text("sigilos-demo\n")
    (root / "etc/passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    copy(FILES / "init.sh", root / "sbin/init", 0o755)
    (root / "usr/lib/kenaz").mkdir(parents=True)
    copy(AGENT, root / "usr/lib/kenaz/agent.py")


def copy(source: Path, destination: Path, mode: int | None = None) -> None:
    destination.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, destination)
    if mode is not None:
        destination.chmod(mode)


def _copy_libraries(tree: Path, root: Path) -> None:
    """The C library's parts that Python needs, with the dynamic loader where programs look for it."""
    wanted = ("libc.so.6", "libm.so.6", "libz.so.1", "libexpat.so.1", "ld-linux-*.so.*")
    for base in ("lib", "usr/lib"):
        for pattern in wanted:
            for source in sorted((tree / base).glob(f"*-linux-gnu/{pattern}")):
                directory = root / "lib" / source.parent.name
                directory.mkdir(exist_ok=True)
                copy(source.resolve(), directory / source.name)
    for loader in sorted(tree.glob("lib*/ld-linux-*.so.*")):
        link = root / loader.relative_to(tree)
        link.parent.mkdir(exist_ok=True)
        # Debian's link is absolute on some architectures and relative on others; ours must survive moving.
        real = next((root / "lib").glob(f"*-linux-gnu/{loader.name}"))
        link.symlink_to(os.path.relpath(real, link.parent))


def _copy_stdlib(minimal: Path, full: Path, destination: Path) -> None:
    """The minimal standard library and what STDLIB adds, compiled, so that the guest never compiles."""
    chosen = [(minimal, path) for path in minimal.rglob("*.py") if not path.is_symlink()]
    chosen += [(full, path) for pattern in STDLIB for path in full.glob(pattern)]
    for source, path in chosen:
        copy(path, destination / path.relative_to(source))
    arguments = (
        "-q",
        "--invalidation-mode",
        "unchecked-hash",
        "-s",
        destination,
        "-p",
        "/usr/lib/python3.11",
    )
    run("python3.11", "-I", "-m", "compileall", *arguments, destination)


def make_ext4(root: Path, image: Path, epoch: int, owners: ext4.Owners | None = None) -> None:
    """Packs `root` into an ext4 image. debugfs says what it could not do, and ends with 0 all the same."""
    options, blocks = ext4.options(root, ROOT_SLACK)
    # Also where it copies the superblock, which debugfs does not reach.
    run("mke2fs", *options, image, str(blocks), added={"E2FSPROGS_FAKE_TIME": str(epoch)})
    script = "".join(f"{command}\n" for command in ext4.commands(root, epoch, owners))
    said = run("debugfs", "-w", "-f", "-", image, stdin=script.encode(), complaints=True)
    wrong = [line for line in said.splitlines() if not line.startswith("debugfs ")]  # its version
    if wrong:
        raise BuildError(f"debugfs could not fill the root file system: {wrong[0]}")


def make_manifest(
    name: str, target: Architecture, packages: Mapping[str, str], inputs: str, release: str, directory: Path
) -> dict[str, Any]:
    """What `kenaz_engine.images` reads of an image, and what the builder needs to know it again."""
    return {
        "schema": MANIFEST_SCHEMA,
        "name": name,
        "tag": __version__,
        "arch": target.name,
        "kernel": release,
        "cmdline": " ".join(target.cmdline),
        "console": {
            "device": target.console,
            "patterns": [{"event": event, "pattern": pattern} for event, pattern in CONSOLE_PATTERNS],
        },
        "parts": {
            "kernel": _part(directory / "kernel"),
            "initrd": _part(directory / "initrd"),
            "root": {**_part(directory / "root.ext4"), "format": "raw"},
        },
        "inputs": inputs,
        "packages": dict(sorted(packages.items())),
    }


def _part(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return {"file": path.name, "size": path.stat().st_size, "sha256": digest}
