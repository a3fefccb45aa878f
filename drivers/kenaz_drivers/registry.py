"""Which drivers there are, and which one `driver: auto` means on this host."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points

from kenaz_drivers.contract import Capabilities, Driver, DriverError, JsonObject, Reason

GROUP = "kenaz.drivers"

PREFERENCE = ("vfkit", "hyperv", "qemu", "libvirt")
"""What `auto` tries first; drivers that are not named here come next, by name."""

LAST_RESORT = "process"
"""Tried only when nothing that isolates the guest is usable."""

NEVER_CHOSEN = frozenset({"simulated"})


def _entries() -> dict[str, EntryPoint]:
    """The entry points by name. Our own win over others of the same name, whatever the order of paths."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=GROUP):
        if entry.name not in found or entry.value.startswith("kenaz_drivers."):
            found[entry.name] = entry
    return found


def driver_names() -> tuple[str, ...]:
    """The names of all installed drivers, sorted. Loads none of them."""
    return tuple(sorted(_entries()))


def load(name: str) -> Driver:
    """The driver of that name. Raises DriverError when there is none, or when it is broken."""
    return _load(name, _entries())


def _load(name: str, entries: Mapping[str, EntryPoint]) -> Driver:
    if name not in entries:
        close = difflib.get_close_matches(name, entries, n=1)
        guess = f"did you mean {close[0]}? " if close else ""
        raise DriverError(
            f"there is no driver {name!r}", hint=f"{guess}installed: {', '.join(sorted(entries))}"
        )
    entry = entries[name]
    try:
        driver: Driver = entry.load()()
        if driver.name != name:
            raise TypeError(f"it calls itself {driver.name!r}")
    except Exception as error:  # a third party's module may raise anything when it is imported
        owner = entry.dist.name if entry.dist else entry.value
        raise DriverError(
            f"driver {name} of {owner} cannot be loaded: {error}", hint=f"update or remove {owner}"
        ) from error
    return driver


def auto_order(names: tuple[str, ...]) -> tuple[str, ...]:
    """The order in which `auto` looks at drivers."""
    preferred = [name for name in PREFERENCE if name in names]
    others = [name for name in names if name not in {*PREFERENCE, *NEVER_CHOSEN, LAST_RESORT}]
    return (*preferred, *others, *(name for name in names if name == LAST_RESORT))


def pick(found: Mapping[str, Capabilities]) -> str:
    """The name of the driver that `auto` means, of those that were looked at: the first usable one that does
    not emulate, else the first usable one; the last resort only where nothing else is usable. Empty where
    nothing is."""
    usable = [name for name in auto_order(tuple(found)) if found[name].usable]
    isolating = [name for name in usable if name != LAST_RESORT]
    direct = [name for name in isolating if found[name].accelerator != "tcg"]
    return next(iter((*direct, *isolating, *usable)), "")


async def choose(
    arch: str,
    options: Mapping[str, JsonObject],
    unfit: Callable[[Capabilities], Reason | None] = lambda capabilities: None,
) -> tuple[Driver, Capabilities, tuple[tuple[str, Capabilities], ...]]:
    """The driver that `auto` means (`pick`), looking no further than it needs to.

    `options` are the `driverOptions` by driver name; `unfit` says why a driver that is usable is of no use
    for this session. Also returns all that was looked at, in order, so that the choice can be explained.
    Raises DriverError, with all the mends, when nothing is usable.
    """
    considered: list[tuple[str, Capabilities]] = []
    usable: dict[str, tuple[Driver, Capabilities]] = {}
    entries = _entries()
    for name in auto_order(tuple(sorted(entries))):
        if name == LAST_RESORT and usable:
            break
        try:
            driver = _load(name, entries)
            capabilities = await driver.probe(arch, options.get(name, {}))
        except DriverError as error:
            broken = (Reason(False, str(error), error.hint),)
            considered.append((name, Capabilities(usable=False, reasons=broken, arch=arch)))
            continue
        if capabilities.usable and (reason := unfit(capabilities)):
            capabilities = replace(capabilities, usable=False, reasons=(*capabilities.reasons, reason))
        considered.append((name, capabilities))
        if capabilities.usable:
            usable[name] = driver, capabilities
            if capabilities.accelerator != "tcg":
                break
    if not usable:
        mends = [
            f"{name}: {reason.mend}"
            for name, capabilities in considered
            for reason in capabilities.reasons
            if reason.mend and not reason.ok and not reason.transport
        ]
        raise DriverError(f"nothing here can run a guest for {arch}", hint="; ".join(mends))
    return *usable[pick({name: seen for name, (_, seen) in usable.items()})], tuple(considered)
