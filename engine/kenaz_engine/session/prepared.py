"""A session about which everything is known that can be before anything is made."""

from __future__ import annotations

from dataclasses import dataclass

from kenaz_drivers.contract import Capabilities, Driver
from kenaz_engine.images.builds import Offered
from kenaz_engine.images.errors import ImageError
from kenaz_engine.images.manifest import Image
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.spec.resolve import ResolvedSession

Considered = tuple[tuple[str, Capabilities], ...]
"""The drivers that were looked at, in order, and what each can do here."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A session, ready to be made.

    `lifecycle` is the one that will be run, with the deadlines that it has here; `considered` are the drivers
    that were looked at, in order; `transport_reason` says why it is that transport; `notes` are for the user.
    `image` is None where the driver boots none, where the session `fetches` it first, and where it is
    `missing`, of which only `survey` tells. `offline`: nothing may be fetched. `build` is
    what the catalogs have under the name of the workbench's build.
    """

    resolved: ResolvedSession
    arch: str
    lifecycle: Lifecycle
    driver: Driver
    capabilities: Capabilities
    considered: Considered
    transport: str
    transport_reason: str
    notes: tuple[str, ...]
    image: Image | None
    missing: ImageError | None
    fetches: bool = False
    offline: bool = False
    build: Offered | None = None
