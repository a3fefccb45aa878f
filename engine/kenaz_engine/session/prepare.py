"""From a resolved spec to everything that must be known before anything is made.

Faults end here: nothing has been created yet.
"""

from __future__ import annotations

import platform
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from kenaz_drivers.contract import Capabilities, Disk, Driver, DriverError, LaunchRequest
from kenaz_drivers.registry import choose, driver_names, load
from kenaz_engine.images.catalog import Image
from kenaz_engine.lifecycle.analysis import analyse
from kenaz_engine.lifecycle.deadlines import with_deadlines
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.faults import Fault, InvalidFile
from kenaz_engine.spec.files import read_file
from kenaz_engine.spec.resolve import ResolvedSession

_ARCHITECTURES = {"amd64": "x86_64", "arm64": "aarch64"}


class CannotRun(Exception):
    """This host cannot run the session. `hint` is what the user can do."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@dataclass(frozen=True, slots=True)
class Prepared:
    """A session, ready to be made. `lifecycle` is the one that will be run, with its deadlines as they are
    here; `considered` are the drivers that were looked at, in order; `notes` are for the user."""

    resolved: ResolvedSession
    arch: str
    lifecycle: Lifecycle
    driver: Driver
    capabilities: Capabilities
    considered: tuple[tuple[str, Capabilities], ...]
    transport: str
    notes: tuple[str, ...]


def native_arch() -> str:
    """This host's architecture, as QEMU names it."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def find_lifecycle(resolved: ResolvedSession) -> Lifecycle:
    """The lifecycle that the spec names: a shipped one, or a file beside the spec. Raises InvalidFile."""
    name = resolved.lifecycle
    if "/" in name or name.endswith((".yaml", ".yml")):
        path = Path(resolved.file).parent / name
        return load_lifecycle(read_file(str(path)), str(path))
    shipped = resources.files("kenaz_specs") / "lifecycles"
    source = shipped / f"{name}.yaml"
    if not source.is_file():
        known = sorted(item.name.removesuffix(".yaml") for item in shipped.iterdir())
        raise InvalidFile(
            [
                Fault(
                    resolved.place("spec.lifecycle"),
                    "spec.lifecycle",
                    f"there is no shipped lifecycle {name!r}",
                    f"known are {', '.join(known)}; a file of your own needs its path, such as ./{name}.yaml",
                )
            ]
        )
    return load_lifecycle(source.read_text("utf-8"), f"kenaz_specs/lifecycles/{name}.yaml")


def check_lifecycle(resolved: ResolvedSession) -> Lifecycle:
    """The spec's lifecycle, analysed, with the spec's own deadlines. Raises InvalidFile."""
    lifecycle = find_lifecycle(resolved)
    faults = [finding.fault(lifecycle.file) for finding in analyse(lifecycle, VOCABULARY)]
    faults += [
        Fault(
            resolved.place(f"spec.timeouts.{state}"),
            f"spec.timeouts.{state}",
            f"the lifecycle {lifecycle.name!r} has no state {state!r} with an activity",
            f"its states are {', '.join(s.name for s in lifecycle.states.values() if not s.final)}",
        )
        for state in resolved.timeouts
        if state not in lifecycle.states or lifecycle.states[state].final
    ]
    if any(fault.level == "error" for fault in faults):
        raise InvalidFile(faults)
    return with_deadlines(lifecycle, VOCABULARY, resolved.timeouts, 1.0)


async def prepare(resolved: ResolvedSession) -> Prepared:
    """Looks at the lifecycle, the driver and this host. Raises InvalidFile and CannotRun."""
    lifecycle = check_lifecycle(resolved)
    arch = native_arch() if resolved.machine.arch == "native" else resolved.machine.arch
    if resolved.driver == "auto":
        driver, capabilities, considered = await _choose(resolved, arch)
    else:
        driver = _named(resolved)
        options = check_options(resolved, driver)
        capabilities = await driver.probe(arch, options)
        considered = [(driver.name, capabilities)]
    if not capabilities.usable:
        raise CannotRun(
            f"the driver {driver.name!r} cannot run {arch} guests here: {_why(capabilities)}",
            _mend(capabilities),
        )
    transport, notes = _transport(resolved, driver, capabilities)
    scale = capabilities.deadline_scale
    if scale != 1.0:
        notes.append(f"deadlines that wait for the guest are x{scale:g} under {capabilities.accelerator}")
    if not capabilities.isolates:
        notes.append(
            f"the driver {driver.name!r} isolates nothing: the guest is an ordinary process of yours"
        )
    return Prepared(
        resolved=resolved,
        arch=arch,
        lifecycle=with_deadlines(lifecycle, VOCABULARY, resolved.timeouts, scale),
        driver=driver,
        capabilities=capabilities,
        considered=tuple(considered),
        transport=transport,
        notes=tuple(notes),
    )


async def _choose(
    resolved: ResolvedSession, arch: str
) -> tuple[Driver, Capabilities, list[tuple[str, Capabilities]]]:
    for name in resolved.driver_options:
        check_options(resolved, _load(resolved, name, f"spec.driverOptions.{name}"))
    try:
        return await choose(arch, resolved.driver_options)
    except DriverError as exc:
        raise CannotRun(str(exc), exc.hint) from exc


def _named(resolved: ResolvedSession) -> Driver:
    return _load(resolved, resolved.driver, "spec.driver")


def _load(resolved: ResolvedSession, name: str, path: str) -> Driver:
    if name not in driver_names():
        hint = f"known are {', '.join(driver_names())}"
        raise InvalidFile([Fault(resolved.place(path), path, f"there is no driver {name!r}", hint)])
    try:
        return load(name)
    except DriverError as exc:
        raise CannotRun(str(exc), exc.hint) from exc


def _why(capabilities: Capabilities) -> str:
    return "; ".join(reason.text for reason in capabilities.reasons if not reason.ok)


def _mend(capabilities: Capabilities) -> str:
    return "; ".join(reason.mend for reason in capabilities.reasons if not reason.ok and reason.mend)


def _transport(
    resolved: ResolvedSession, driver: Driver, capabilities: Capabilities
) -> tuple[str, list[str]]:
    wanted = resolved.channel.transport
    if wanted == "auto":
        return capabilities.transports[0], []
    if wanted not in capabilities.transports:
        raise CannotRun(
            f"the driver {driver.name!r} has no transport {wanted!r} here",
            f"it has {', '.join(capabilities.transports)}; or set spec.channel.transport to auto",
        )
    return wanted, []
