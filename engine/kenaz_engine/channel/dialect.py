"""The two dialects of the channel: how messages are cut, who dials, and what is said. Each is one value.

| | `KENAZ` | `HARNESS_VM` |
| --- | --- | --- |
| framing | length-prefixed | ndjson |
| dials | the guest | the host |
| first word | the guest's `hello` | the launcher's `auth` |
| messages | protocol.py | harness_vm.py |
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from kenaz_engine.channel.framing import Framing, LengthPrefixed, Lines, Marked
from kenaz_engine.channel.harness_vm import HarnessVmProtocol
from kenaz_engine.channel.protocol import Action, Expected, GuestProtocol, Side, State
from kenaz_engine.channel.resume import Kept


class Talk(Protocol):
    """One conversation with a guest, without IO: what a relay asks of it. What returns actions returns them
    in order; nothing waits or fails."""

    @property
    def state(self) -> State:
        """Where the conversation stands."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether the guest may go on on another stream."""
        ...

    @property
    def conversation(self) -> int:
        """The conversation's number."""
        ...

    @property
    def void(self) -> Mapping[str, str]:
        """Requests of guests that are gone, which the harness may still answer."""
        ...

    def begin(self) -> list[Action]:
        """The stream is there: what the launcher says before the guest has said anything."""
        ...

    def from_guest(self, payload: bytes, now: float = 0.0) -> list[Action]:
        """A payload came from the guest."""
        ...

    def from_harness(self, payload: bytes, now: float = 0.0) -> list[Action]:
        """A payload came from the harness."""
        ...

    def fault(self, code: str, message: str, *, side: Side = "guest") -> list[Action]:
        """The bytes of that side were not frames."""
        ...

    def next_deadline(self, now: float) -> float:
        """When to call `expire` next, or earlier."""
        ...

    def expire(self, now: float) -> list[Action]:
        """Ends what has taken too long."""
        ...

    def resumed(self) -> list[Action]:
        """The guest that was away goes on, on another stream."""
        ...

    def give_up(self) -> list[Action]:
        """The guest that is away, if it is, does not come back."""
        ...

    def lost(self) -> list[Action]:
        """The guest's stream has ended."""
        ...

    def harness_gone(self) -> list[Action]:
        """Nothing more comes from the harness."""
        ...

    def drain(self, seconds: float) -> list[Action]:
        """The guest is to finish within that time."""
        ...

    def bye(self, reason: str) -> list[Action]:
        """Takes leave of the guest."""
        ...

    def execute(self, argv: Sequence[str]) -> list[Action]:
        """Has the guest run a command."""
        ...

    def cancel_command(self) -> list[Action]:
        """Has the guest end the command that runs, if one does."""
        ...


@dataclass(frozen=True, slots=True)
class Dialect:
    """How guest and launcher talk. `dialled` says that the launcher dials: then whatever goes wrong before
    the guest has proved itself is tried again. `talk` also gets the requests of a lost guest that the harness
    may still answer, and what is kept of the conversation with it."""

    name: str
    dialled: bool
    framing: Callable[[Expected], Framing]
    talk: Callable[[Expected, Mapping[str, str], Kept | None], Talk]


def _frames(expected: Expected) -> Framing:
    limit = expected.limits.frame
    return Marked(limit) if expected.one_stream else LengthPrefixed(limit)


KENAZ = Dialect("kenaz", dialled=False, framing=_frames, talk=GuestProtocol)
"""That of this project's own guests."""

HARNESS_VM = Dialect(
    "harness-vm",
    dialled=True,
    framing=lambda expected: Lines(expected.limits.frame),
    talk=lambda expected, void, kept: HarnessVmProtocol(expected),
)
"""That of today's harness-vm, which listens in its guest."""


def dialect_of(framing: str, dial: str) -> Dialect:
    """The dialect that a session's spec names. Raises KeyError for a pair that is none; the spec's own check
    has looked before."""
    return {("length-prefixed", "guest"): KENAZ, ("ndjson", "host"): HARNESS_VM}[framing, dial]
