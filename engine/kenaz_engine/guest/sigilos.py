"""Builds the image `sigilos`: Debian with systemd, greetd, sway, and the workbench as a user's service.

mmdebstrap installs the packages, as root or in a user namespace; what it packs becomes an ext4 disk with the
same bytes for the same packages. Kernel and initrd are made as the demo's. Why so is in
docs/decisions/0018-sigilos-image.md.
"""

from __future__ import annotations

import json
import os
import shutil
import tarfile
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kenaz_engine.guest import build as builder
from kenaz_engine.guest.build import BuildError, Kind, Modules, Report
from kenaz_engine.guest.ext4 import Owners
from kenaz_engine.guest.recipe import AGENT, ARCHITECTURES, FILES, HOST_PACKAGES, MODULES, Architecture

NAME = "sigilos"
HERE = Path(__file__).parent / "sigilos"

PACKAGES = (
    "busybox-static",
    "dbus-user-session",
    "fonts-dejavu-core",
    "greetd",
    "kmod",
    "libpam-systemd",
    "libpython3.11-stdlib",
    "passwd",
    "python3.11-minimal",
    "sway",
    "systemd-sysv",
    "udev",
)
"""What is installed, with what it needs and nothing that it only recommends."""

LEFT_OUT = (
    "/usr/share/doc/*",
    "/usr/share/icons/*",
    "/usr/share/info/*",
    "/usr/share/locale/*",
    "/usr/share/man/*",
    "/usr/share/zoneinfo/*",
    "/usr/lib/*/libLLVM*",
    "/usr/lib/*/dri/*",
)
"""What is not unpacked; the last two draw in three dimensions, and sway draws with pixman here."""

GROUPS: Mapping[str, tuple[str, ...]] = {
    **MODULES,
    "root": ("crc32c_generic", "ext4", "button", "evdev", "virtio_input"),
    "gpu": ("virtio-gpu",),
}
"""As `MODULES`, with what only the cloud kernel has built in; and the screen."""

LATE_MODULES = ("erofs", "squashfs")
"""Modules on the root disk: what a build of a workbench is packed as."""

MASKED = (
    "dev-hugepages.mount",
    "dev-mqueue.mount",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty-static.service",
    "getty.target",
    "ldconfig.service",
    "modprobe@configfs.service",
    "modprobe@dm_mod.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "modprobe@fuse.service",
    "modprobe@loop.service",
    "proc-sys-fs-binfmt_misc.automount",
    "sys-fs-fuse-connections.mount",
    "sys-kernel-config.mount",
    "sys-kernel-debug.mount",
    "sys-kernel-tracing.mount",
    "systemd-binfmt.service",
    "systemd-hwdb-update.service",
    "systemd-journal-catalog-update.service",
    "systemd-journal-flush.service",
    "systemd-machine-id-commit.service",
    "systemd-pcrphase-sysinit.service",
    "systemd-pcrphase.service",
    "systemd-pstore.service",
    "systemd-random-seed.service",
    "systemd-remount-fs.service",
    "systemd-sysctl.service",
    "systemd-sysusers.service",
    "systemd-tmpfiles-clean.timer",
    "systemd-tmpfiles-setup-dev.service",
    "systemd-tmpfiles-setup.service",
    "systemd-update-done.service",
    "systemd-update-utmp.service",
    "systemd-update-utmp-runlevel.service",
)
"""Units that a machine of one session has no use for: each costs an emulated boot some tenths of a second."""

CMDLINE = ("selinux=0", "vt.global_cursor_default=0", "apparmor=0", "audit=0", "systemd.show_status=no")

ROOT_SLACK = 64 << 20

# Run in a shell by mmdebstrap, with the root as $1.
_HOOKS = (
    'cp -a --no-preserve=ownership "$KENAZ_ROOT/." "$1/"',
    'chroot "$1" useradd --create-home --uid 1000 --gid operator --shell /bin/sh operator',
    'chroot "$1" passwd --lock root >/dev/null',
    'chroot "$1" systemctl --quiet enable kenaz-meta.service greetd.service',
    'chroot "$1" systemctl --quiet set-default graphical.target',
    f'chroot "$1" systemctl --quiet mask {" ".join(MASKED)}',
    'echo sigilos >"$1/etc/hostname"; : >"$1/etc/machine-id"; : >"$1/etc/fstab"',
    'rm -rf "$1"/var/cache/apt "$1"/var/lib/apt "$1"/var/log/* "$1"/etc/.pwd.lock "$1"/usr/share/perl*',
    # What udev looks at for devices that such a machine does not have costs an emulated boot seconds.
    'cd "$1"/usr/lib/udev && rm -f hwdb.bin && cd rules.d && for rule in *; do case $rule in '
    "50-udev-default* | 60-drm* | 60-input-id* | 70-power-switch* | 71-seat* | 73-seat-late*) ;; "
    '99-systemd*) ;; *) rm "$rule" ;; esac; done',
)


def sigilos() -> Kind:
    """The image."""
    own = [Path(__file__).with_name(name) for name in ("build.py", "cpio.py", "ext4.py", "recipe.py")]
    files = sorted(path for path in HERE.rglob("*") if path.is_file())
    return Kind(
        NAME,
        {"x86_64": replace(ARCHITECTURES["x86_64"], kernel="linux-image-amd64")},
        ("apt-get", "apt-cache", "dpkg", "mke2fs", "debugfs", "depmod", "mmdebstrap"),
        (*HOST_PACKAGES, "mmdebstrap"),
        (AGENT, Path(__file__), *files, *sorted(FILES.iterdir()), *own),
        lambda target: builder.resolve(target, PACKAGES),
        _make,
    )


def _make(
    target: Architecture, packages: Mapping[str, str], inputs: str, scratch: Path, report: Report
) -> Path:
    """Builds in `scratch` and returns the directory that is to become the image."""
    epoch = int(os.environ.get("SOURCE_DATE_EPOCH", "1700000000"))
    tree, root, overlay = scratch / "tree", scratch / "root", scratch / "overlay"
    debs, result = scratch / "debs", scratch / "image"
    for path in (tree, root, debs, result):
        path.mkdir()
    started = time.monotonic()

    def step(text: str) -> None:
        report(f"  {time.monotonic() - started:5.1f} s  {text}")

    kernel = {name: version for name, version in packages.items() if name.startswith("linux-image-")}
    step("fetching the kernel")
    builder.download(target, kernel, debs)
    for deb in debs.glob("*.deb"):
        builder.run("dpkg", "-x", deb, tree)
    release = builder.kernel_release(tree)
    builder.run("depmod", "-b", tree, release)
    modules = Modules(tree / "lib/modules" / release)
    step(f"kernel {release}")
    (result / "kernel").write_bytes(builder.unpack_kernel(target, tree / f"boot/vmlinuz-{release}", step))
    shutil.copytree(HERE / "root", overlay)
    _copy_modules(modules, tree, overlay, release)
    shutil.copy2(AGENT, overlay / "usr/lib/kenaz/agent.py")
    step("installing packages with mmdebstrap")
    archive = scratch / "root.tar"
    _install(target, overlay, archive, epoch)
    step("unpacking")
    owners = _unpack(archive, root)
    step("initrd")
    groups = {group: _known(names, modules) for group, names in GROUPS.items()}
    (result / "initrd").write_bytes(builder.make_initrd(root, modules, groups))
    step("root file system")
    builder.make_ext4(root, result / "root.ext4", epoch, owners)
    target = replace(target, cmdline=(*target.cmdline, *CMDLINE))
    manifest = builder.make_manifest(NAME, target, _installed(root), inputs, release, result)
    (result / "image.json").write_text(json.dumps(manifest, indent=2) + "\n")
    step("done")
    return result


def _known(names: tuple[str, ...], modules: Modules) -> tuple[str, ...]:
    """Those that this kernel has as modules; the others it has built in."""
    return tuple(name for name in names if name in modules)


def _copy_modules(modules: Modules, tree: Path, overlay: Path, release: str) -> None:
    """What udev may load, with what is needed for it, under the names that the kernel asks by."""
    wanted = modules.in_load_order(_known((*LATE_MODULES, *sum(GROUPS.values(), ())), modules))
    place = overlay / "usr/lib/modules" / release
    place.mkdir(parents=True)
    for name, content in wanted.items():
        (place / f"{name}.ko").write_bytes(content)
    for name in ("modules.builtin", "modules.order"):
        shutil.copy2(tree / "lib/modules" / release / name, place / name)
    builder.run("depmod", "-b", overlay / "usr", release)


def _install(target: Architecture, overlay: Path, archive: Path, epoch: int) -> None:
    """Has mmdebstrap install the packages from where this host has its own."""
    sources = [path for path in (Path("/etc/apt/sources.list"), *_source_lists()) if path.exists()]
    options = [f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT]
    options += ["--dpkgopt=force-unsafe-io", '--aptopt=APT::Install-Recommends "false"']
    options += [f"--customize-hook={hook}" for hook in _HOOKS]
    words = ["--quiet", "--variant=essential", f"--architectures={target.debian}"]
    words += [f"--include={','.join(PACKAGES)}", *options, _suite(), str(archive), *map(str, sources)]
    added = {"SOURCE_DATE_EPOCH": str(epoch), "KENAZ_ROOT": str(overlay), "TMPDIR": str(archive.parent)}
    builder.run("mmdebstrap", *words, added=added)


def _source_lists() -> list[Path]:
    places = Path("/etc/apt/sources.list.d")
    return sorted([*places.glob("debian*.sources"), *places.glob("debian*.list")])


def _suite() -> str:
    """The name of this host's Debian. Raises BuildError where it is none."""
    lines = Path("/etc/os-release").read_text().splitlines()
    facts = dict(line.split("=", 1) for line in lines if "=" in line)
    if facts.get("ID") != "debian" or "VERSION_CODENAME" not in facts:
        raise BuildError("the image sigilos is built from a Debian host's packages", "build it on Debian")
    return facts["VERSION_CODENAME"].strip('"')


def _unpack(archive: Path, root: Path) -> Owners:
    """Unpacks what was installed, but for device nodes, and says whose it is and who may do what with it."""
    owners: dict[str, tuple[int, int, int]] = {}
    with tarfile.open(archive) as packed:
        for member in packed:
            name = member.name.removeprefix("./").rstrip("/")
            if name in ("", ".") or member.isdev():
                continue
            owners[name] = (member.uid, member.gid, member.mode & 0o7777)
            member.uid, member.gid = os.geteuid(), os.getegid()
            member.mode = 0o755 if member.isdir() else 0o644
            packed.extract(member, root, filter="fully_trusted")
    archive.unlink()
    return owners


def _installed(root: Path) -> dict[str, str]:
    """Version by name of all that was installed."""
    found, name = {}, ""
    for line in (root / "var/lib/dpkg/status").read_text().splitlines():
        key, _, value = line.partition(": ")
        if key == "Package":
            name = value
        elif key == "Version":
            found[name] = value
    return found
