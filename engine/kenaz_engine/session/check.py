"""What is wrong with a session beyond its schema: what lifecycles and drivers know of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.session.lifecycles import examine, executes
from kenaz_engine.spec.faults import Fault, InvalidFile
from kenaz_engine.spec.resolve import InvalidSession, ResolvedSession
from kenaz_engine.spec.schema import suggestion
from kenaz_engine.spec.yamlfile import in_order


@contextmanager
def telling_all() -> Iterator[None]:
    """For loading a session: the InvalidFile that comes of it tells these faults too."""
    try:
        yield
    except InvalidSession as invalid:
        raise InvalidFile(in_order([*invalid.faults, *_further(invalid)])) from None


def check(resolved: ResolvedSession) -> tuple[Lifecycle | None, list[Fault]]:
    """The spec's lifecycle with the spec's own deadlines, None where it cannot be read; and every fault of
    lifecycle and drivers, warnings too."""
    faults = _driver_faults(resolved)
    try:
        lifecycle, found = examine(resolved)
    except InvalidFile as invalid:
        return None, in_order([*faults, *invalid.faults])
    if executes(lifecycle) and resolved.channel.dial == "host":
        message = "a guest that is dialled runs no commands"
        faults.append(resolved.fault(("spec", "lifecycle"), message, "take another lifecycle, like standard"))
    return lifecycle, in_order([*faults, *found])


def checked(resolved: ResolvedSession) -> Lifecycle:
    """The spec's lifecycle with the spec's own deadlines. Raises InvalidFile for what `check` finds, unless
    it is warnings alone."""
    lifecycle, faults = check(resolved)
    if lifecycle is None or any(fault.level == "error" for fault in faults):
        raise InvalidFile(faults)
    return lifecycle


def _further(invalid: InvalidSession) -> list[Fault]:
    """Faults of the sound rest of a session. Where a value is unsound, nothing is made of its default."""
    if invalid.rest is None:
        return []
    told = {fault.path for fault in invalid.faults}
    if "spec.lifecycle" in told:
        return _driver_faults(invalid.rest)
    return [
        fault
        for fault in check(invalid.rest)[1]
        if not any(path.startswith(fault.path) for path in told if fault.path)
    ]


def _driver_faults(resolved: ResolvedSession) -> list[Fault]:
    """The drivers are looked at when a session says something about them."""
    named: dict[str, tuple[str, ...]] = (
        {} if resolved.driver == "auto" else {resolved.driver: ("spec", "driver")}
    )
    named |= {name: ("spec", "driverOptions", name) for name in resolved.driver_options if name not in named}
    if not named:
        return []
    from kenaz_drivers.contract import DriverError
    from kenaz_drivers.registry import driver_names, load

    faults = []
    for name, path in named.items():
        if name not in driver_names():
            hint = suggestion(name, driver_names()) or f"installed are {', '.join(driver_names())}"
            faults.append(resolved.fault(path, f"there is no driver `{name}`", hint))
        elif name in resolved.driver_options:
            try:
                faults += resolved.check_driver_options(name, load(name).options_schema)
            except DriverError as error:
                faults.append(resolved.fault(path, str(error), error.hint))
    return faults
