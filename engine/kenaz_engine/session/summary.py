"""What a session came to, from its journal alone: pure, the same for a live one and one read from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Phase:
    """A part of the way from the start to the open channel, in seconds."""

    name: str
    seconds: float


def phases(records: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """How the time until the channel opened was spent; what the guest did not tell is left out.

    The guest's clock starts with its kernel: what passed between the machine's start and the hello beyond
    what that clock shows went to the hypervisor and the firmware.
    """
    made = next((r for r in records if r["kind"] == "acquired" and r["resource"] == "vm"), None)
    hello = next((r for r in records if r["kind"] == "note" and r.get("about") == "hello"), None)
    opened = next((r for r in records if r["kind"] == "acquired" and r["resource"] == "channel"), None)
    if made is None or hello is None or opened is None:
        return []
    found = [Phase("host set-up", made["t"])]
    boot = hello["t"] - made["t"]
    clock = hello.get("clock") or {}
    if "hello" in clock and "init" in clock:
        found += [Phase("hypervisor", max(0.0, boot - clock["hello"])), Phase("kernel", clock["init"])]
        if "login" in clock and "agent" in clock:
            found += [
                Phase("user land", clock["login"] - clock["init"]),
                Phase("desktop", clock["agent"] - clock["login"]),
                Phase("workbench", clock["hello"] - clock["agent"]),
            ]
        else:
            found.append(Phase("user land", clock["hello"] - clock["init"]))
    else:
        found.append(Phase("guest", boot))
    return [*found, Phase("handshake", opened["t"] - hello["t"])]


def states(records: Sequence[Mapping[str, Any]]) -> list[Phase]:
    """The states in the order of their entry, each with the seconds until the next (or the end)."""
    entered = [(r["state"], r["t"]) for r in records if r["kind"] == "entered"]
    end = next((r["t"] for r in records if r["kind"] == "end"), None)
    times = [t for _, t in entered] + ([end] if end is not None else [])
    return [Phase(name, after - at) for (name, at), after in zip(entered, times[1:], strict=False)]
