"""The launcher's half of the conversation with today's harness-vm, without IO.

Theory of operation. That program is a server: it proves nothing, and does what the first client asks that
knows its token. So the launcher says `auth`, and takes `auth.ok` for the guest's readiness and its
capabilities. From then on the harness is the one who asks (tasks, reads), and the guest answers. What passes
is checked and handed on as it came, byte for byte. The launcher remembers what is open: the one task, the
reads by their ids, the approvals that wait for a decision. It keeps from the guest what would end the
connection without a word, or hit what it was not meant for, and answers the harness in the guest's own words.

Wire: docs/reference/vsock-protocol.md, rules G.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from kenaz_engine.channel import strict_json
from kenaz_engine.channel.framing import LINE_OUT
from kenaz_engine.channel.protocol import (
    Action,
    Bye,
    Expected,
    HarnessEnded,
    Hello,
    Opened,
    Refused,
    Report,
    Side,
    State,
    ToGuest,
    ToHarness,
    Violation,
)

APPROVAL = "approval"
"""The only capability that there is today: the guest may ask for decisions."""

READS = frozenset(
    {
        "sessions.list",
        "sessions.get",
        "sessions.list_messages",
        "tools.list",
        "memory.list_chunks",
        "providers.list",
        "workflows.list",
        "units.list",
        "artifacts.list",
    }
)
"""Kinds that are answered by `KIND.ok` or `KIND.error` with their `req_id`."""

OURS = frozenset(
    {
        *("auth", "auth.ok", "auth.error", "ping", "pong", "end", "error", "resume", "ack"),
        *("session.open", "session.close", "guest.lost", "guest.back"),
    }
)
"""Kinds that only the launcher and one peer say to each other; none passes from one peer to the other."""

_ENDS = frozenset({"task.complete", "task.cancelled", "task.error"})

_MESSAGES = {
    "bad_request": "the launcher cannot pass this on: it is no message of this dialect",
    "line_too_long": f"the message has more than {LINE_OUT - 1} bytes; the guest would end the connection",
    "line_break": "the message has a line break in it, which the guest would take for its end",
    "task_conflict": "a task already runs on this connection",
    "busy": "too many requests are open",
    "draining": "the session is ending",
    "gone": "the guest is gone",
}
"""What the launcher itself answers for the guest, by code [G8]."""

_kind = re.compile(r"[a-z0-9][a-z0-9._-]{0,63}").fullmatch
_id = re.compile(r"[A-Za-z0-9._:-]{1,128}").fullmatch


class _Refusal(Exception):
    """What the harness is answered instead of its message's being passed on; empty: nothing."""

    def __init__(self, code: str, outcome: str = "") -> None:
        super().__init__(code)
        self.code = code
        self.outcome = outcome or code


class HarnessVmProtocol:
    """The conversation over one connection. All methods return what to do, in order."""

    def __init__(self, expected: Expected) -> None:
        self._expected = expected
        self._state = State.HELLO
        self._granted: frozenset[str] = frozenset()
        self._task = ""
        self._cancelled = False
        self._reads: dict[str, str] = {}  # req_id -> kind
        self._approvals: set[str] = set()

    @property
    def state(self) -> State:
        """Where the conversation stands."""
        return self._state

    @property
    def resumable(self) -> bool:
        """Never: this guest does not count its messages."""
        return False

    @property
    def conversation(self) -> int:
        """Without a number."""
        return 0

    @property
    def void(self) -> Mapping[str, str]:
        """Nothing: this guest asks the harness for approvals alone, and those end with their connection."""
        return {}

    def begin(self) -> list[Action]:
        """The auth line: first, and once."""
        auth: dict[str, Any] = {"kind": "auth", "token": self._expected.token}
        if self._expected.capabilities:
            auth["capabilities"] = sorted(self._expected.capabilities)
        return self._send("guest", auth)

    def from_guest(self, payload: bytes, now: float = 0.0) -> list[Action]:
        """A line came from the guest. After the end of the conversation it is dropped."""
        if self._state is State.CLOSED:
            return []
        try:
            message = strict_json.loads(payload, self._expected.limits.depth)
        except strict_json.JsonRefused as exc:
            return self._bad_guest(exc.code, str(exc), payload, "")
        kind = _kind_of(message)
        if not kind:
            return self._bad_guest("bad_kind", "a message without a kind", payload, "")
        if self._state is State.HELLO:
            return self._authenticated(message, kind, payload)
        if kind in OURS:
            return self._bad_guest("bad_kind", "a kind that is not the guest's to say", payload, kind)
        identifier = _recorded(message)
        if kind in ("task.approval_requested", "task.approval_resolved"):
            if APPROVAL not in self._granted:
                return self._bad_guest("not_granted", "an approval that was not granted", payload, kind)
            if not self._note_approval(message, kind):
                return self._bad_guest("bad_member", f"{kind}: `approval_id` is none", payload, kind)
        if not self._is_due(message, kind):
            return [Report("from-guest", kind, identifier, "", len(payload), "late")]
        actions: list[Action] = [
            Report("from-guest", kind, identifier, "", len(payload), "relayed"),
            ToHarness(payload),
        ]
        return [*actions, *self._drained()] if self._state is State.DRAINING else actions

    def from_harness(self, payload: bytes, now: float = 0.0) -> list[Action]:
        """A message came from the harness: it is passed on, or answered here."""
        kind = identifier = ""
        message: dict[str, Any] = {}
        try:
            message = self._read(payload)
            kind, identifier = _kind_of(message), _recorded(message)
            if kind in ("ping", "pong", "end"):
                report = Report("from-harness", kind, "", "", len(payload), "taken")
                return [report, *self._hop(kind, message)]
            self._pass(kind, message, payload)
        except _Refusal as refusal:
            report = Report("from-harness", kind, identifier, "", len(payload), refusal.outcome)
            return [report, *(self._answer(kind, message, refusal.code) if refusal.code else [])]
        return [Report("from-harness", kind, identifier, "", len(payload), "relayed"), ToGuest(payload)]

    def fault(self, code: str, message: str, *, side: Side = "guest") -> list[Action]:
        """The bytes of that side were no lines, or no frames."""
        if side == "harness":
            report = Report("from-harness", "", "", "", 0, code)
            error = {"kind": "error", "code": code, "message": message}
            return [report, *self._send("harness", error), Violation(side, code, message)]
        return self._bad_guest(code, message, b"", "")

    def next_deadline(self, now: float) -> float:
        """Never: today's guest has no deadline for its tasks, nor is one set here."""
        return math.inf

    def expire(self, now: float) -> list[Action]:
        """Nothing takes too long."""
        return []

    def resumed(self) -> list[Action]:
        """This guest numbers nothing."""
        return []

    def give_up(self) -> list[Action]:
        """Nor is it ever away."""
        return []

    def lost(self) -> list[Action]:
        """The connection is gone, and with it what was open on it [G11]."""
        return self._close(missed=self._state is not State.HELLO) if self._state is not State.CLOSED else []

    def harness_gone(self) -> list[Action]:
        """The guest waits for nobody but where it asked for an approval, and of that it has a timer."""
        return []

    def drain(self, seconds: float) -> list[Action]:
        """Cancels the task that runs, if one does; the conversation has ended when that has."""
        if self._state is not State.OPEN:
            return []
        self._state = State.DRAINING
        return [*self._cancel_task(), *self._drained()]

    def bye(self, reason: str) -> list[Action]:
        """This guest knows no leave-taking."""
        return self._close(missed=False) if self._state in (State.OPEN, State.DRAINING) else []

    def execute(self, argv: Sequence[str]) -> list[Action]:
        """This guest runs no commands; the session's check has said so."""
        return []

    def cancel_command(self) -> list[Action]:
        """There is none."""
        return []

    # The guest

    def _authenticated(self, message: dict[str, Any], kind: str, payload: bytes) -> list[Action]:
        report = Report("from-guest", kind, "", "", len(payload), "taken")
        if kind == "auth.ok":
            given = message.get("capabilities")
            granted = {word for word in given if isinstance(word, str)} if isinstance(given, list) else set()
            # Never what was asked for: a guest that does not know a capability says nothing of it.
            self._granted = self._expected.capabilities & granted
            self._state = State.OPEN
            return [report, Opened(Hello("", "", tuple(sorted(self._granted)), {}), None)]
        self._state = State.CLOSED
        if kind == "auth.error":
            return [report, Refused("auth_refused", "the guest does not take the session's token")]
        return [report, Refused("bad_hello", "the guest answers an auth line by something else")]

    def _bad_guest(self, code: str, text: str, payload: bytes, kind: str) -> list[Action]:
        report = Report("from-guest", kind, "", "", len(payload), code)
        if self._state is State.HELLO:
            self._state = State.CLOSED
            return [report, Refused("bad_hello", text)]
        return [report, *self._close(missed=False), Violation("guest", code, text)]

    def _note_approval(self, message: Mapping[str, Any], kind: str) -> bool:
        """Remembers who waits for a decision. False where the message names none, or too many wait."""
        approval = message.get("approval_id")
        if not isinstance(approval, str):
            return False
        if kind == "task.approval_resolved":
            self._approvals.discard(approval)
            return True
        self._approvals.add(approval)
        return len(self._approvals) <= self._expected.limits.invocations

    def _is_due(self, message: Mapping[str, Any], kind: str) -> bool:
        """Whether what this answers is open; notes where it ends that."""
        family, _, end = kind.rpartition(".")
        if family in READS and end in ("ok", "error"):
            request = message.get("req_id")
            return isinstance(request, str) and self._reads.pop(request, "") == family
        if kind == "task.running" or kind in _ENDS:
            task = message.get("task_id")
            if kind == "task.error" and not task:
                return True  # about something that the guest could not read
            if not self._task or task != self._task:
                return False
            if kind in _ENDS:
                self._task = ""
        return True

    # The harness

    def _read(self, payload: bytes) -> dict[str, Any]:
        """The message, fit for a line. Raises _Refusal."""
        try:
            message = strict_json.loads(payload, self._expected.limits.depth)
        except strict_json.JsonRefused:
            raise _Refusal("bad_request") from None
        if not _kind_of(message):
            raise _Refusal("bad_request")
        return message

    def _pass(self, kind: str, message: Mapping[str, Any], payload: bytes) -> None:
        """Notes what opens. Raises _Refusal for what must not reach the guest."""
        if kind in OURS:
            raise _Refusal("bad_request")
        if len(payload) >= LINE_OUT:
            raise _Refusal("line_too_long")
        if b"\n" in payload:
            raise _Refusal("line_break")
        if self._state is State.CLOSED:
            raise _Refusal("gone")
        if self._state is State.DRAINING and (kind == "task.start" or kind in READS):
            raise _Refusal("draining")
        if kind == "task.start":
            self._start(message)
        elif kind == "task.cancel":
            # Today's guest ignores the id: what comes late would end the next task.
            if not self._task or self._cancelled or message.get("task_id") != self._task:
                raise _Refusal("", "late")
            self._cancelled = True
        elif kind == "task.approval_decision":
            self._decide(message)
        elif kind in READS:
            request = message.get("req_id")
            if not isinstance(request, str) or not request or request in self._reads:
                raise _Refusal("bad_request")
            if len(self._reads) >= self._expected.limits.invocations:
                raise _Refusal("busy")
            self._reads[request] = kind

    def _start(self, message: Mapping[str, Any]) -> None:
        task = message.get("task_id")
        if not isinstance(task, str) or not task:
            raise _Refusal("bad_request")
        if self._task:
            raise _Refusal("task_conflict")
        self._task, self._cancelled = task, False

    def _decide(self, message: Mapping[str, Any]) -> None:
        fits = all(isinstance(message.get(name), str) for name in ("task_id", "approval_id", "decision"))
        known = message.get("decision") in ("allow_once", "allow_always", "deny")
        if APPROVAL not in self._granted or not fits or not known:
            raise _Refusal("bad_request")
        if message.get("source", "host") not in ("host", "remote"):
            raise _Refusal("bad_request")
        if message["approval_id"] not in self._approvals:
            raise _Refusal("", "late")
        self._approvals.discard(message["approval_id"])

    def _hop(self, kind: str, message: Mapping[str, Any]) -> list[Action]:
        """A message that is meant for the launcher itself."""
        if kind == "end":
            return [HarnessEnded()]
        nonce = message.get("nonce")
        if kind == "pong" or not isinstance(nonce, str) or not _id(nonce):
            return []
        return self._send("harness", {"kind": "pong", "nonce": nonce})

    def _answer(self, kind: str, message: Mapping[str, Any], code: str) -> list[Action]:
        """In the guest's own words: a read has an error of its own, all else is a task's."""
        text = {"code": code, "message_truncated": _MESSAGES[code]}
        if kind in READS:
            answer = {"kind": f"{kind}.error", "req_id": message.get("req_id"), **text}
        else:
            task = message.get("task_id")
            answer = {"kind": "task.error", **({"task_id": task} if isinstance(task, str) else {}), **text}
        return self._send("harness", answer)

    # The end

    def _cancel_task(self) -> list[Action]:
        if not self._task or self._cancelled:
            return []
        self._cancelled = True
        return self._send("guest", {"kind": "task.cancel", "task_id": self._task})

    def _drained(self) -> list[Action]:
        open_still = self._task or self._reads
        return [] if open_still else [*self._close(missed=False), Bye("drained")]

    def _close(self, *, missed: bool) -> list[Action]:
        """What the harness still waits for ends here; approvals that wait are void."""
        self._state = State.CLOSED
        actions: list[Action] = []
        if self._task:
            actions += self._answer("task.start", {"task_id": self._task}, "gone")
        for request, kind in self._reads.items():
            actions += self._answer(kind, {"req_id": request}, "gone")
        self._task = ""
        self._reads.clear()
        self._approvals.clear()
        return [*actions, *self._send("harness", {"kind": "guest.lost"})] if missed else actions

    def _send(self, side: Side, message: dict[str, Any]) -> list[Action]:
        payload = strict_json.dumps(message)
        report = Report(f"to-{side}", message["kind"], _recorded(message), "", len(payload), "sent")
        return [report, ToGuest(payload) if side == "guest" else ToHarness(payload)]


def _kind_of(message: Mapping[str, Any]) -> str:
    """Empty where it has none."""
    kind = message.get("kind")
    return kind if isinstance(kind, str) and _kind(kind) else ""


def _recorded(message: Mapping[str, Any]) -> str:
    """The id that the journal may have: one that looks like an id."""
    for member in ("approval_id", "req_id", "task_id"):
        value = message.get(member)
        if isinstance(value, str) and value:
            return value if _id(value) else ""
    return ""
