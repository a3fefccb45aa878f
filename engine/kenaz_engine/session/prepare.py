"""From a resolved spec to everything that must be known before anything is made.

Faults end here: nothing has been created yet.
"""

from __future__ import annotations

import platform
import time
from pathlib import Path

from kenaz_drivers.contract import Capabilities, Driver, DriverError, LaunchPlan, Reason
from kenaz_drivers.registry import choose, load
from kenaz_engine.channel.transports.vsock import FIRST_CID
from kenaz_engine.images.builds import Offered, find_build, offline_without
from kenaz_engine.images.catalog import Located, default_cache, locate
from kenaz_engine.images.errors import ImageError, ImageMissing
from kenaz_engine.images.manifest import Image, Part
from kenaz_engine.images.policy import Step
from kenaz_engine.lifecycle.deadlines import with_deadlines
from kenaz_engine.session.check import checked
from kenaz_engine.session.directory import DirectoryError, socket_directory, state_home
from kenaz_engine.session.guest import Layout, launch_request
from kenaz_engine.session.prepared import Considered, Prepared
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.resolve import ResolvedSession

_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


class CannotRun(Exception):
    """This host cannot run the session. `hint` is what the user can do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


def native_arch() -> str:
    """This host's architecture, as QEMU names it."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


async def prepare(resolved: ResolvedSession, *, offline: bool = False) -> Prepared:
    """Looks at the lifecycle, the drivers and this host. What it returns can be run here, as far as can be
    known before anything is made. Raises InvalidFile and CannotRun."""
    prepared = await survey(resolved, offline=offline)
    if prepared.missing is not None:
        raise CannotRun(str(prepared.missing), prepared.missing.hint)
    try:
        plan_launch(prepared, layout_of(prepared))
    except (DirectoryError, DriverError) as exc:
        raise CannotRun(str(exc), exc.hint) from exc
    return prepared


def layout_of(prepared: Prepared) -> Layout:
    """Where the things of the session will be. Raises DirectoryError."""
    directory = state_home() / "sessions" / prepared.resolved.id
    return Layout(directory, socket_directory(directory), prepared.resolved.id)


def plan_launch(prepared: Prepared, layout: Layout) -> LaunchPlan:
    """What the driver would do, with the image at hand, or one like that which is to be fetched. Raises
    DriverError for what it cannot do."""
    image = _STAND_IN if prepared.fetches else prepared.image
    build = prepared.build.planned if prepared.build else None
    # The CID is claimed when the session runs; until then the first one stands for it.
    cid = FIRST_CID if prepared.transport == "vsock" else None
    return prepared.driver.plan(launch_request(prepared, layout, image, build, cid=cid))


async def survey(resolved: ResolvedSession, *, offline: bool = False) -> Prepared:
    """As `prepare`, also where the image is missing, or the driver cannot do what is asked of it: for those
    who show what there is. Raises InvalidFile and CannotRun."""
    lifecycle = checked(resolved)
    arch = native_arch() if resolved.machine.arch == "native" else resolved.machine.arch
    driver, capabilities, considered = await _driver(resolved, arch, offline)
    transport, reason = _transport(resolved, driver, capabilities)
    scale = capabilities.deadline_scale
    image, missing, fetches = (None, None, False)
    if capabilities.boots_image:
        image, missing, fetches = _image(resolved, arch, offline)
    build, no_build = _build(resolved, arch, offline and capabilities.boots_image)
    return Prepared(
        resolved=resolved,
        arch=arch,
        lifecycle=with_deadlines(lifecycle, VOCABULARY, resolved.timeouts, scale),
        driver=driver,
        capabilities=capabilities,
        considered=considered,
        transport=transport,
        transport_reason=reason,
        notes=tuple(_notes(driver, capabilities, considered, build, transport)),
        image=image,
        missing=missing or no_build,
        fetches=fetches,
        offline=offline,
        build=build,
    )


_STAND_IN = Image(
    name="",
    tag="",
    arch="",
    digest="",
    parts={name: Part(Path("/to-be-fetched") / name, 0, "") for name in ("kernel", "root")},
    root_format="raw",
    cmdline="",
    console_device="",
    console_patterns=(),
    manifest=None,
)


def _image(
    resolved: ResolvedSession, arch: str, offline: bool
) -> tuple[Image | None, ImageError | None, bool]:
    """The image that is here; why there is none; whether the session fetches one."""
    base = resolved.beside("")
    try:
        located = locate(resolved.image, arch, default_cache(), now=time.time(), base=base, offline=offline)
    except ImageError as error:
        return None, error, False
    if located.step is Step.FETCH:
        return None, None, True
    if located.step is Step.UNREACHABLE:
        return None, ImageMissing(f"offline, and {located.missing}", _hint(located)), False
    return located.image, located.missing, False


def _build(resolved: ResolvedSession, arch: str, offline: bool) -> tuple[Offered | None, ImageError | None]:
    """What the catalogs have under the name of the build; why it cannot be had."""
    if not resolved.workbench.build:
        return None, None
    try:
        offered = find_build(resolved.workbench.build, arch, default_cache())
    except ImageError as error:
        return None, error
    if offered is not None and offered.here is None and offline and offered.is_remote:
        return None, offline_without(offered)
    return offered, None


def _hint(located: Located) -> str:
    return located.missing.hint if located.missing else ""


async def _driver(
    resolved: ResolvedSession, arch: str, offline: bool
) -> tuple[Driver, Capabilities, Considered]:
    def unfit(capabilities: Capabilities) -> Reason | None:
        if capabilities.boots_kernels or not capabilities.boots_image:
            return None
        image, _, _ = _image(resolved, arch, offline)  # of one that is to be fetched nobody knows yet
        if image is None or image.kernel is None:
            return None
        text = f"the image {resolved.image} has a kernel of its own, and only disks with a boot loader boot"
        return Reason(False, text, "spec.image: a disk that UEFI boots")

    if resolved.driver == "auto":
        try:
            return await choose(arch, resolved.driver_options, unfit)
        except DriverError as exc:
            raise CannotRun(str(exc), exc.hint) from exc
    try:
        driver = load(resolved.driver)
    except DriverError as exc:
        raise CannotRun(str(exc), exc.hint) from exc
    capabilities = await driver.probe(arch, resolved.driver_options.get(driver.name, {}))
    if not capabilities.usable:
        wrong = [r for r in capabilities.reasons if not r.ok and not r.transport]
        raise CannotRun(
            f"the driver {driver.name} cannot run {arch} guests here: {'; '.join(r.text for r in wrong)}",
            "; ".join(r.mend for r in wrong if r.mend),
        )
    return driver, capabilities, ((driver.name, capabilities),)


def _transport(resolved: ResolvedSession, driver: Driver, capabilities: Capabilities) -> tuple[str, str]:
    wanted, offered = resolved.channel.transport, capabilities.transports
    if wanted == "auto":
        return offered[0], f"first of what {driver.name} offers here: {', '.join(offered)}"
    if wanted not in offered:
        lacks = [r for r in capabilities.reasons if r.transport == wanted and not r.ok]
        why = "".join(f": {reason.text}" for reason in lacks)
        mend = "".join(f"{reason.mend}; or " for reason in lacks)
        raise CannotRun(
            f"the driver {driver.name} has no transport {wanted} here{why}",
            f"{mend}it has {', '.join(offered)}; or leave spec.channel.transport at auto",
        )
    return wanted, "asked for by the spec"


def _notes(
    driver: Driver,
    capabilities: Capabilities,
    considered: Considered,
    build: Offered | None,
    transport: str,
) -> list[str]:
    notes = []
    for name, other in considered:
        if name == driver.name:
            break  # those behind it were looked at in case they are better
        # Of a driver for another system there is nothing to be done: `plan` and `doctor` tell of it.
        faults = [reason for reason in other.reasons if not reason.ok and not reason.transport]
        if any(reason.mend for reason in faults):
            notes.append(f"{name} is not used: {'; '.join(reason.text for reason in faults)}")
    notes += [reason.text for reason in capabilities.reasons if not reason.ok and not reason.transport]
    if capabilities.deadline_scale != 1.0:
        scale = f"x{capabilities.deadline_scale:g} under {capabilities.accelerator}"
        notes.append(f"deadlines that wait for the guest are {scale}")
    if build is not None and not capabilities.boots_image:
        notes.append(
            f"the driver {driver.name} attaches no build: the guest is told its name and digest only"
        )
    if not capabilities.isolates:
        notes.append(f"the driver {driver.name} isolates nothing: the guest is a process of yours")
    if transport == "tcp":
        notes.append(
            "transport tcp: every user of this host can reach the guest's port on 127.0.0.1; "
            "only the session's token keeps them out"
        )
    return notes
