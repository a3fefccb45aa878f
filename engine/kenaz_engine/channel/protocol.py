"""The launcher's half of the conversation with a guest, without IO.

Theory of operation. One `GuestProtocol` sees every payload of a connection, from either side, and answers
with values that say what to do; it never waits and never fails. `_NEXT` has all transitions: what is not in
it cannot happen. Payloads that only pass through are checked and then handed on as they came, byte for byte.
Of each request it remembers the id until its one terminal message has passed; the asker chose the id, so
each side has ids of its own. A guest that breaks a rule costs one `Violation` and is not listened to any
more.

Wire: docs/reference/vsock-protocol.md; the letters in brackets below are its rules.
"""

from __future__ import annotations

import enum
import hmac
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from kenaz_engine.channel import strict_json
from kenaz_engine.channel.framing import DEFAULT_LIMIT
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.resume import Kept

VERSION = 1

RESUME = "resume"
"""The capability of a guest that numbers its messages [Z]."""

Side = Literal["guest", "harness"]
_OTHER: Mapping[Side, Side] = {"guest": "harness", "harness": "guest"}
_FROM: Mapping[Side, str] = {"guest": "from-guest", "harness": "from-harness"}


@dataclass(frozen=True, slots=True)
class Limits:
    """What a peer may take.

    `frame`: bytes of a payload. `depth`: of nested objects and arrays. `invocations`: open requests of each
    side. `handshake`: seconds from the guest's first byte to its whole hello. `queue`: bytes that may wait
    for a slow reader before its sender waits too; also those that a peer has not acknowledged [Z]. `write`:
    seconds after which a peer that reads, or acknowledges, nothing counts as lost. `tool`: seconds that an
    invocation may take [R6]. `grace`: seconds that a harness may be away [Z7].
    """

    frame: int = DEFAULT_LIMIT
    depth: int = strict_json.DEPTH
    invocations: int = 64
    handshake: float = 10.0
    queue: int = 1024 * 1024
    write: float = 30.0
    tool: float = 1800.0
    grace: float = 10.0


@dataclass(frozen=True, slots=True)
class Expected:
    """What the guest must prove, and what it is granted. `one_stream` says that its stream outlives its
    agent, as a virtio-serial port does: an agent that begins anew says so on it [H8]."""

    session: str
    token: str = field(repr=False)
    tools: ToolPolicy
    limits: Limits = Limits()
    capabilities: frozenset[str] = frozenset()
    one_stream: bool = False


@dataclass(frozen=True, slots=True)
class Hello:
    """What the guest said of itself. `capabilities` are those granted, sorted. `clock` holds seconds on the
    guest's CLOCK_BOOTTIME: when its `init`, its `login`, its `agent` and this `hello` began; empty where it
    did not say."""

    agent: str
    build: str
    capabilities: tuple[str, ...]
    clock: Mapping[str, float]


class ToGuest(NamedTuple):
    """This payload is for the guest."""

    payload: bytes


class ToHarness(NamedTuple):
    """This payload is for the harness."""

    payload: bytes


class Report(NamedTuple):
    """One message as the journal may know it: no text, no arguments, no results, no token.

    `direction` is `from-guest`, `to-guest`, `from-harness` or `to-harness`; the last two `to-` only for
    messages that the launcher made itself. `name` is the tool's. `size` is the payload's, in bytes.
    `outcome`: `relayed`, `sent`, `taken` (meant for the launcher), `late` (dropped, its request is over),
    `resumed` (a hello that goes on with a conversation),
    `restarted` (the guest's agent has begun anew), or the code of the refusal or violation.
    """

    direction: str
    kind: str
    id: str
    name: str
    size: int
    outcome: str


@dataclass(frozen=True, slots=True)
class Opened:
    """The guest has proved itself. `resumed` says how many messages it has taken of the conversation that it
    goes on with; None where it begins one."""

    hello: Hello
    resumed: int | None


@dataclass(frozen=True, slots=True)
class Refused:
    """The guest has not; the channel is closed."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class Bye:
    """The guest has taken its leave; the channel is closed."""

    reason: str


@dataclass(frozen=True, slots=True)
class Restarted:
    """The guest's agent has begun anew on its stream with this payload, its mark or its hello: the first one
    of the next channel. This one is closed."""

    payload: bytes


@dataclass(frozen=True, slots=True)
class Output:
    """The command wrote to its `stdout` or `stderr`."""

    stream: str
    text: str


@dataclass(frozen=True, slots=True)
class Executed:
    """The command has ended, with that exit code."""

    code: int


@dataclass(frozen=True, slots=True)
class NotExecuted:
    """The command was not run, or was ended because the launcher or its time asked for it."""

    code: str
    message: str


@dataclass(frozen=True, slots=True)
class HarnessEnded:
    """The harness wants the session to end."""


@dataclass(frozen=True, slots=True)
class Violation:
    """`side` broke the protocol. A guest that did so is not listened to any more."""

    side: Side
    code: str
    message: str


Action = (
    ToGuest
    | ToHarness
    | Report
    | Opened
    | Refused
    | Bye
    | Restarted
    | Output
    | Executed
    | NotExecuted
    | HarnessEnded
    | Violation
)


class State(enum.Enum):
    """Where the conversation stands."""

    HELLO = "hello"
    OPEN = "open"
    DRAINING = "draining"
    AWAY = "away"
    CLOSED = "closed"


# On the way of every frame, where to look up an enum's member costs as much as the rest.
_GREETING, _DEAF = State.HELLO, (State.CLOSED, State.AWAY)

_NEXT: Mapping[State, Mapping[str, State]] = {
    State.HELLO: {"hello accepted": State.OPEN, "refused": State.CLOSED, "lost": State.CLOSED},
    State.OPEN: {
        "drain": State.DRAINING,
        "cut": State.AWAY,
        "bye": State.CLOSED,
        "violation": State.CLOSED,
        "lost": State.CLOSED,
    },
    State.AWAY: {"resumed": State.OPEN, "lost": State.CLOSED},
    State.DRAINING: {"bye": State.CLOSED, "violation": State.CLOSED, "lost": State.CLOSED},
    State.CLOSED: {},
}


def diagram() -> str:
    """The states as Mermaid text; the reference carries it."""
    lines = ["stateDiagram-v2", f"    [*] --> {State.HELLO.value}"]
    for state, arms in _NEXT.items():
        lines += [f"    {state.value} --> {target.value}: {event}" for event, target in arms.items()]
    return "\n".join([*lines, f"    {State.CLOSED.value} --> [*]"])


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a member must be."""

    text: str
    fits: Callable[[Any], bool]


def _match(pattern: str) -> Callable[[Any], bool]:
    full = re.compile(pattern).fullmatch
    return lambda value: type(value) is str and full(value) is not None


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and not isinstance(value, bool)
        and 0 <= value <= 2**53
        and math.isfinite(value)
    )


_CAPABILITY = _match(r"[a-z0-9][a-z0-9._-]{0,63}")

_KIND = _match(r"[a-z0-9][a-z0-9._-]{0,63}")
_ID = _Shape("1 to 128 letters, digits, . _ : -", _match(r"[A-Za-z0-9._:-]{1,128}"))
_TOOL = _Shape("1 to 128 letters, digits, . _ : / -", _match(r"[A-Za-z0-9._:/-]{1,128}"))
_CODE = _Shape("a word of 1 to 64 of a-z 0-9 . _ -", _match(r"[a-z0-9][a-z0-9._-]{0,63}"))
_LABEL = _Shape("at most 128 printable ASCII characters", _match(r"[ -~]{0,128}"))
_STREAM = _Shape("stdout or stderr", lambda value: value in ("stdout", "stderr"))
_EXIT = _Shape("an integer from 0 to 255", lambda value: type(value) is int and 0 <= value <= 255)
_TEXT = _Shape("a string", lambda value: isinstance(value, str))
_OBJECT = _Shape("an object", lambda value: isinstance(value, dict))
_ANY = _Shape("any value", lambda value: True)
_CAPABILITIES = _Shape(
    "a list of at most 64 words of 1 to 64 of a-z 0-9 . _ -",
    lambda value: isinstance(value, list) and len(value) <= 64 and all(map(_CAPABILITY, value)),
)
_RESUME = _Shape(
    "an object of integers: conversation, received",
    lambda value: (
        isinstance(value, dict) and all(type(value.get(k)) is int for k in ("conversation", "received"))
    ),
)
_CLOCK_MEMBERS = ("init", "login", "agent", "hello")
_CLOCK = _Shape(
    "an object of seconds: init, login, agent, hello",
    lambda value: isinstance(value, dict) and all(_is_number(value.get(k, 0)) for k in _CLOCK_MEMBERS),
)

_HELLO: Mapping[str, _Shape] = {
    "session": _TEXT,
    "token": _TEXT,
    "agent": _LABEL,
    "build": _LABEL,
    "capabilities": _CAPABILITIES,
}

_OPTIONAL: Mapping[str, _Shape] = {"clock": _CLOCK, "resume": _RESUME}
"""What a hello may say besides."""

_PASSING: Mapping[str, Mapping[str, _Shape]] = {
    "tool.invoke": {"id": _ID, "tool": _TOOL, "arguments": _OBJECT},
    "tool.cancel": {"id": _ID},
    "tool.result": {"id": _ID, "result": _ANY},
    "tool.error": {"id": _ID, "code": _CODE, "message": _TEXT},
    "prompt": {"id": _ID, "text": _TEXT},
    "prompt.delta": {"id": _ID, "text": _TEXT},
    "prompt.result": {"id": _ID, "text": _TEXT},
    "prompt.error": {"id": _ID, "code": _CODE, "message": _TEXT},
}
"""Kinds that go from one side to the other [M]."""

_HOP: Mapping[str, Mapping[str, _Shape]] = {"ping": {"nonce": _ID}, "pong": {"nonce": _ID}}
"""Kinds that end at the launcher, from both sides."""

_EXEC: Mapping[str, Mapping[str, _Shape]] = {
    "exec.output": {"id": _ID, "stream": _STREAM, "text": _TEXT},
    "exec.result": {"id": _ID, "code": _EXIT},
    "exec.error": {"id": _ID, "code": _CODE, "message": _TEXT},
}
"""What a guest says of the command that the launcher had it run [X]."""

_KINDS: Mapping[Side, Mapping[str, Mapping[str, _Shape]]] = {
    "guest": {
        **_PASSING,
        **_HOP,
        **_EXEC,
        "bye": {"reason": _CODE},
        "error": {"code": _CODE, "message": _TEXT},
    },
    "harness": {**_PASSING, **_HOP, "end": {}},
}

_REQUESTS = ("tool.invoke", "prompt")
_TERMINAL = ("tool.result", "tool.error", "prompt.result", "prompt.error")

_REFUSALS = {
    "denied": "this session may not use that tool",
    "busy": "too many requests are open",
    "draining": "the session is ending",
    "unavailable": "the harness is gone",
    "gone": "the guest is gone",
    "id_in_use": "an earlier request of that id may still be answered",
    "malformed": "the request lacks a member, or one is not what it must be",
    "timeout": "the answer took too long",
}
"""Codes with which the launcher itself answers a request [R]."""


@dataclass(frozen=True, slots=True)
class _Request:
    """An open request; `since` is when it came."""

    family: str
    since: float


class _Breach(Exception):
    """A rule broken. The text names members and rules, and quotes nothing."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class GuestProtocol:
    """The conversation with one start of the guest's agent. All methods return what to do, in order.

    `void` are the requests of a lost guest, as its conversation left them, that the harness may still answer;
    `kept` is what the launcher has of the conversation with it. Times are seconds on any one clock.
    """

    def __init__(
        self, expected: Expected, void: Mapping[str, str] | None = None, kept: Kept | None = None
    ) -> None:
        self._expected = expected
        self._kept = kept
        self.conversation = 1 if kept is None else kept.conversation + 1
        self._resumable = False
        self._state = State.HELLO
        self._marked = False
        self._harness_gone = False
        self._commands = 0
        self._command = ""
        self._void = dict(void or {})
        # By who asked, in order of time: requests that are open, and such as took too long and may yet be
        # answered (id -> `tool`).
        self._open: Mapping[Side, dict[str, _Request]] = {"guest": {}, "harness": {}}
        self._overdue: Mapping[Side, dict[str, str]] = {"guest": {}, "harness": {}}

    @property
    def state(self) -> State:
        """Where the conversation stands."""
        return self._state

    @property
    def open_requests(self) -> Mapping[Side, int]:
        """How many requests of each side wait for their terminal message."""
        return {side: len(ids) for side, ids in self._open.items()}

    @property
    def void(self) -> Mapping[str, str]:
        """Requests of guests that are gone, or away, not yet answered by the harness: id -> `tool` or
        `prompt`."""
        return {**self._void, **self._overdue["guest"], **_families(self._open["guest"])}

    @property
    def resumable(self) -> bool:
        """Whether both sides number their messages, so that the guest may go on on another stream."""
        return self._resumable

    def begin(self) -> list[Action]:
        """The launcher says nothing before the guest's hello [H1]."""
        return []

    def from_guest(self, payload: bytes, now: float = 0.0) -> list[Action]:
        """A payload came from the guest, or (empty) a mark. After the end of the conversation, and while the
        guest is away, it is dropped."""
        if self._state in _DEAF:
            return []
        if not payload:
            return self._mark()
        if self._state is _GREETING:
            return self._hello(payload)
        return self._message("guest", payload, now)

    def from_harness(self, payload: bytes, now: float = 0.0) -> list[Action]:
        """A payload came from the harness; the guest has said hello. After the end, requests are answered
        with `gone` and answers are dropped."""
        return self._message("harness", payload, now)

    def next_deadline(self, now: float) -> float:
        """When to call `expire` next, or earlier."""
        began = [r.since for asked in self._open.values() for r in asked.values() if r.family == "tool"]
        return min(began, default=now) + self._expected.limits.tool

    def expire(self, now: float) -> list[Action]:
        """Ends the invocations that have taken too long: the asker is told, who was asked need not go on
        [R6]."""
        actions: list[Action] = []
        latest = now - self._expected.limits.tool
        for side, asked in self._open.items():
            late = [i for i, r in asked.items() if r.family == "tool" and r.since <= latest]
            for identifier in late:
                del asked[identifier]
                self._overdue[side][identifier] = "tool"
                actions += self._answer(side, "tool", identifier, "timeout")
                actions += self._send(_OTHER[side], {"kind": "tool.cancel", "id": identifier})
        return actions

    def fault(self, code: str, message: str, *, side: Side = "guest") -> list[Action]:
        """The bytes of that side were not frames."""
        report = Report(f"from-{side}", "", "", "", 0, code)
        if side == "guest" and self._state is State.HELLO:
            return self._refuse("bad_hello", message, report)
        return self._violated(side, code, message, report)

    def lost(self) -> list[Action]:
        """The guest's stream has ended. Where it may go on, nothing of the conversation has."""
        if self._state is State.OPEN and self._resumable:
            self._go("cut")
            return []
        return self._close("lost") if self._state not in (State.CLOSED, State.AWAY) else []

    def resumed(self) -> list[Action]:
        """The guest that was away goes on, on another stream [Z4]."""
        self._go("resumed")
        return []

    def give_up(self) -> list[Action]:
        """The guest that is away, if it is, does not come back."""
        return self._close("lost") if self._state is State.AWAY else []

    def harness_gone(self) -> list[Action]:
        """Nothing more comes from the harness: what the guest still waits for is answered here [R4]."""
        self._harness_gone = True
        return self._answer_all("guest", "unavailable")

    def drain(self, seconds: float) -> list[Action]:
        """Asks the guest to finish within that time. Once; later calls and a closed channel need nothing."""
        if self._state is not State.OPEN:
            return []
        self._go("drain")
        return self._send("guest", {"kind": "drain", "deadline": round(seconds, 3)})

    def bye(self, reason: str) -> list[Action]:
        """Takes leave of the guest."""
        if self._state not in (State.OPEN, State.DRAINING):
            return []
        return [*self._send("guest", {"kind": "bye", "reason": reason}), *self._close("bye")]

    def execute(self, argv: Sequence[str]) -> list[Action]:
        """Has the guest run a command; the one before it, if any, has ended [X]."""
        if self._state is not State.OPEN:
            return []
        self._commands += 1
        self._command = f"x{self._commands}"
        return self._send("guest", {"kind": "exec", "id": self._command, "argv": list(argv)})

    def cancel_command(self) -> list[Action]:
        """Asks the guest to end the command that runs, if one does [X3]."""
        if not self._command or self._state is State.CLOSED:
            return []
        return self._send("guest", {"kind": "exec.cancel", "id": self._command})

    # The handshake [H]

    def _mark(self) -> list[Action]:
        if self._state is State.HELLO:
            self._marked = True
            return []
        return self._restarted(b"", Report("from-guest", "", "", "", 0, "restarted"))

    def _restarted(self, payload: bytes, report: Report) -> list[Action]:
        return [report, *self.lost(), Restarted(payload)]

    def _answer_hello(self, message: dict[str, Any]) -> list[Action]:
        """A mark is answered by a mark: what stood before it was for an agent that is gone [F6]."""
        answer = self._send("guest", message)
        return [ToGuest(b""), *answer] if self._marked else answer

    def _hello(self, payload: bytes) -> list[Action]:
        expected = self._expected
        kind = ""
        try:
            message = strict_json.loads(payload, self._expected.limits.depth)
            if message.get("kind") != "hello":
                raise _Breach("bad_hello", "the first message must be a hello")
            kind = "hello"
            hello = _read_hello(message, expected)
        except strict_json.JsonRefused as exc:
            report = Report("from-guest", kind, "", "", len(payload), exc.code)
            return self._refuse("bad_hello", str(exc), report)
        except _Breach as exc:
            report = Report("from-guest", kind, "", "", len(payload), exc.code)
            return self._refuse(exc.code, str(exc), report)
        self._go("hello accepted")
        self._resumable = RESUME in hello.capabilities
        resumed = self._claim(message) if self._resumable else None
        welcome: dict[str, Any] = {
            "kind": "welcome",
            "protocol": VERSION,
            "session": expected.session,
            "capabilities": list(hello.capabilities),
            "limits": {"frame": expected.limits.frame, "invocations": expected.limits.invocations},
            "tools": {"allow": list(expected.tools.allow), "deny": list(expected.tools.deny)},
        }
        if self._resumable:
            kept = self._kept if resumed is not None else None
            welcome["resume"] = {
                "conversation": self.conversation if kept is None else kept.conversation,
                "received": 0 if kept is None else kept.received,
                "window": expected.limits.queue,
            }
        return [
            Report("from-guest", kind, "", "", len(payload), "taken" if resumed is None else "resumed"),
            *self._answer_hello(welcome),
            Opened(hello, resumed),
        ]

    def _claim(self, message: Mapping[str, Any]) -> int | None:
        """How far the guest has got in the conversation that it wants to go on with; None where that cannot
        be: then it begins anew."""
        claim, kept = message.get("resume"), self._kept
        if claim is None or kept is None or claim["conversation"] != kept.conversation:
            return None
        received: int = claim["received"]
        return received if kept.lowest <= received <= kept.highest else None

    def _refuse(self, code: str, message: str, report: Report) -> list[Action]:
        self._go("refused")
        return [
            report,
            *self._answer_hello({"kind": "refused", "code": code, "message": message}),
            Refused(code, message),
        ]

    # Messages of an open channel [M, R]

    def _message(self, side: Side, payload: bytes, now: float) -> list[Action]:
        kind = identifier = name = ""
        limits = self._expected.limits

        def report(outcome: str) -> Report:
            return Report(_FROM[side], kind, identifier, name, len(payload), outcome)

        try:
            if len(payload) > limits.frame:
                raise _Breach("frame_too_large", "a frame beyond the limit of this session")
            message = strict_json.loads(payload, limits.depth)
            kind = _kind(message)
            if kind.startswith("x-"):
                return [report("relayed"), _to(_OTHER[side], payload)]
            if kind == "hello" and side == "guest":
                if self._expected.one_stream:
                    return self._restarted(payload, report("restarted"))
                raise _Breach("second_hello", "the guest's agent began anew on an open channel")
            shapes = _KINDS[side].get(kind)
            if shapes is None:
                raise _Breach("bad_kind", "a kind that is not allowed here")
            if kind in _PASSING:
                _check(message, {"id": _ID})
                identifier = message["id"]
                code = self._pass(side, kind, identifier, message, now)
                name = message["tool"] if kind == "tool.invoke" and code != "malformed" else ""
                if code in _REFUSALS:
                    family = kind.partition(".")[0]
                    return [report(code), *self._answer(side, family, identifier, code)]
                if code == "late":
                    return [report(code)]
                return [report(code), _to(_OTHER[side], payload)]
            _check(message, shapes)
            if kind in _EXEC:
                identifier = message["id"]
                if identifier != self._command:
                    raise _Breach("unknown_id", f"{kind}: no command with this id runs")
        except (strict_json.JsonRefused, _Breach) as exc:
            return self._violated(side, exc.code, str(exc), report(exc.code))
        return [report("taken"), *self._hop(side, kind, message)]

    def _hop(self, side: Side, kind: str, message: Mapping[str, Any]) -> list[Action]:
        """A message that is meant for the launcher itself."""
        match kind:
            case "ping":
                return self._send(side, {"kind": "pong", "nonce": message["nonce"]})
            case "bye":
                return [*self._close("bye"), Bye(message["reason"])]
            case "error":
                text = f"the guest reports a violation by us: {message['code']}"
                return [*self._close("violation"), Violation("guest", "reported", text)]
            case "end":
                return [HarnessEnded()]
            case "exec.output":
                return [Output(message["stream"], message["text"])]
            case "exec.result":
                self._command = ""
                return [Executed(message["code"])]
            case "exec.error":
                self._command = ""
                return [NotExecuted(message["code"], message["message"])]
        return []  # a pong that nobody waits for [M8]

    def _pass(self, side: Side, kind: str, identifier: str, message: Mapping[str, Any], now: float) -> str:
        """`relayed`, `late`, or the code of a refusal. Raises _Breach."""
        family = kind.partition(".")[0]
        if kind in _REQUESTS:
            return self._ask(side, kind, identifier, message, now)
        _check(message, _PASSING[kind])
        theirs = self._open[_OTHER[side]]
        overdue = self._overdue[_OTHER[side]]
        if kind == "tool.cancel":
            # It may have crossed with the answer on its way.
            return "relayed" if _family(self._open[side], identifier) == family else "late"
        if overdue.get(identifier) == family:
            if kind in _TERMINAL:
                del overdue[identifier]
            return "late"
        if side == "harness" and self._void.get(identifier) == family:
            if kind in _TERMINAL:
                del self._void[identifier]
            return "late"
        if self._state is State.CLOSED:
            return "late"
        if _family(theirs, identifier) != family:
            raise _Breach("unknown_id", f"{kind}: no request with this id is open")
        if kind in _TERMINAL:
            del theirs[identifier]
        return "relayed"

    def _ask(self, side: Side, kind: str, identifier: str, message: Mapping[str, Any], now: float) -> str:
        mine, overdue = self._open[side], self._overdue[side]
        if identifier in mine:
            raise _Breach("duplicate_id", f"{kind}: a request with this id is open")
        try:
            _check(message, _PASSING[kind])
        except _Breach:
            return "malformed"
        if self._state not in (State.OPEN, State.AWAY):
            return "gone" if self._state is State.CLOSED else "draining"
        if kind == "tool.invoke" and not self._expected.tools.decide(message["tool"]).allowed:
            return "denied"
        if len(mine) + len(overdue) >= self._expected.limits.invocations:
            return "busy"
        if side == "guest" and self._harness_gone:
            return "unavailable"
        if identifier in overdue or (side == "guest" and identifier in self._void):
            return "id_in_use"
        mine[identifier] = _Request(kind.partition(".")[0], now)
        return "relayed"

    def _answer(self, side: Side, family: str, identifier: str, code: str) -> list[Action]:
        answer = {"kind": f"{family}.error", "id": identifier, "code": code, "message": _REFUSALS[code]}
        return self._send(side, answer)

    def _answer_all(self, side: Side, code: str) -> list[Action]:
        waiting = _families(self._open[side])
        self._open[side].clear()
        return [
            action
            for identifier, family in waiting.items()
            for action in self._answer(side, family, identifier, code)
        ]

    def _send(self, side: Side, message: dict[str, Any]) -> list[Action]:
        payload = strict_json.dumps(message)
        report = Report(f"to-{side}", message["kind"], message.get("id", ""), "", len(payload), "sent")
        return [report, _to(side, payload)]

    # The end

    def _violated(self, side: Side, code: str, message: str, report: Report) -> list[Action]:
        violation = Violation(side, code, message)
        if side == "harness":
            return [report, *self._send("harness", _error(code, message)), violation]
        return [report, *self._send("guest", _error(code, message)), *self._close("violation"), violation]

    def _close(self, event: str) -> list[Action]:
        """Every request of the harness gets its terminal message, also from a guest that is gone [R4]; one
        that may come back is missed [S4]."""
        missed = self._state is not State.HELLO and event == "lost"
        self._go(event)
        self._command = ""
        self._void = dict(self.void)
        self._open["guest"].clear()
        for overdue in self._overdue.values():
            overdue.clear()
        answers = self._answer_all("harness", "gone")
        return [*answers, *self._send("harness", {"kind": "guest.lost"})] if missed else answers

    def _go(self, event: str) -> None:
        self._state = _NEXT[self._state][event]


def _families(requests: Mapping[str, _Request]) -> dict[str, str]:
    return {identifier: request.family for identifier, request in requests.items()}


def _family(requests: Mapping[str, _Request], identifier: str) -> str:
    request = requests.get(identifier)
    return "" if request is None else request.family


def _to(side: Side, payload: bytes) -> Action:
    return ToGuest(payload) if side == "guest" else ToHarness(payload)


def _error(code: str, message: str) -> dict[str, Any]:
    return {"kind": "error", "code": code, "message": message}


def _kind(message: Mapping[str, Any]) -> str:
    kind = message.get("kind")
    if type(kind) is not str or not _KIND(kind):
        raise _Breach("bad_kind", "`kind` is missing or no word of 1 to 64 of a-z 0-9 . _ -")
    return kind


def _check(message: Mapping[str, Any], shapes: Mapping[str, _Shape]) -> None:
    for member, shape in shapes.items():
        if member not in message or not shape.fits(message[member]):
            raise _Breach("bad_member", f"{message['kind']}: `{member}` must be {shape.text}")


def _read_hello(message: Mapping[str, Any], expected: Expected) -> Hello:
    """What the guest says, if it says all and proves itself. Raises _Breach with a code of rule H4."""
    protocol = message.get("protocol")
    if type(protocol) is not int or protocol != VERSION:
        raise _Breach("bad_protocol", f"this launcher speaks protocol {VERSION}")
    try:
        _check(message, _HELLO)
        for member, shape in _OPTIONAL.items():
            if member in message:
                _check(message, {member: shape})
    except _Breach as exc:
        raise _Breach("bad_hello", str(exc)) from None
    if not _equal(message["session"], expected.session):
        raise _Breach("bad_session", "this channel is of another session")
    if not _equal(message["token"], expected.token):
        raise _Breach("bad_token", "the token is not this session's")
    clock = message.get("clock", {})
    return Hello(
        agent=message["agent"],
        build=message["build"],
        capabilities=tuple(sorted(expected.capabilities.intersection(message["capabilities"]))),
        clock={name: float(clock[name]) for name in _CLOCK_MEMBERS if name in clock},
    )


def _equal(given: str, expected: str) -> bool:
    """Takes as long whether the first character differs or the last."""
    return hmac.compare_digest(given.encode(), expected.encode())
