"""The far side of the relay: a harness that listens on this host, or the built-in one of the demo."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol

import trio

from kenaz_drivers.host import dial_loopback
from kenaz_engine.channel import strict_json
from kenaz_engine.channel.connection import Connection
from kenaz_engine.channel.framing import FramingError, LengthPrefixed
from kenaz_engine.channel.protocol import VERSION, Limits
from kenaz_engine.channel.resume import Inbox, NotKept, read_ack

LAST_WORD = 1.0
"""Seconds that writing `session.close` may take."""

HARNESSES = (
    {"loopback": "loopback:FILE"}
    if sys.platform == "win32"
    else {
        "unix": "unix:PATH",
        "loopback": "loopback:FILE",
    }
)
"""How a harness is named on this host: by a UNIX socket, or by the file that
kenaz_drivers/_common/loopback.py describes."""

RETRY = 0.1
"""Seconds between two attempts to reach a harness that is not there."""

_FORGOT = "a harness that says `resume` must keep what the protocol says, also over its own restart"

QUIET = 1.0
"""Seconds without a message after which the demo harness ends the session."""


class HarnessError(Exception):
    """The harness cannot be reached. `hint` is what the user can do about it."""

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class HarnessLink(Protocol):
    """A harness, for one session. It outlives the activities that use it: `run` is a task of the session."""

    @property
    def has_room(self) -> bool:
        """Whether `put` may be called."""
        ...

    @property
    def resumable(self) -> bool:
        """Whether the harness acknowledges: then it is read also while there is no room for what it says."""
        ...

    async def run(self) -> None:
        """Writes what was sent. Returns when the harness takes no more; raises nothing for what it does."""
        ...

    def open(self, session: str, build: str, capabilities: Sequence[str]) -> None:
        """Tells the harness which session this is. The first call, and the only one of its kind."""
        ...

    def put(self, payload: bytes) -> None:
        """Takes a payload, which `push` writes; drops it if the harness is gone."""
        ...

    def push(self) -> None:
        """Sees to it that what was put is written."""
        ...

    async def send(self, payload: bytes) -> None:
        """Takes a payload, when there is room; drops it if the harness is gone. If cancelled, it took
        nothing."""
        ...

    async def receive(self) -> bytes | None:
        """The next payload; None when no more will come. If cancelled, none is lost.

        An empty one says that the connection broke: another one is made when this is called again and all
        that came before is taken. Until then there is an empty one each time, since whoever was to take it
        may have been cancelled: what is given and not taken would be said again. Raises FramingError when the
        harness sends no frames, HarnessError when it went away and did not come back.
        """
        ...

    def took(self, size: int) -> None:
        """A payload of that size, which `receive` gave, is in good hands."""
        ...

    async def aclose(self, outcome: str) -> None:
        """Tells the harness how the session ended, and closes. Bounded, also where the harness reads
        nothing."""
        ...


Dial = Callable[[], Awaitable[trio.abc.Stream]]
"""Connects to the harness once. Raises OSError."""


class ListeningHarness:
    """A harness that listens on this host; the launcher dials it, and again where it can resume [Z7].

    `dial` is None where it can be dialled only once.
    """

    def __init__(self, stream: trio.abc.Stream, limits: Limits, dial: Dial | None = None) -> None:
        self._limits = limits
        self._dial = dial
        self._connection = self._connect(stream)
        self._connections = 1
        self._heard = False
        self._given = 0  # payloads that nobody has taken for good yet
        self._ungranted = False  # it said `resume`, too late to be granted it
        self._closing = False
        self._introduction: dict[str, Any] = {}
        self._lost: HarnessError | None = None
        self._changed = trio.lowlevel.ParkingLot()
        self._dialling = trio.CancelScope()
        self._read_out: Connection | None = None  # all that came over it is taken

    @property
    def has_room(self) -> bool:
        """Whether `put` may be called."""
        return self._connection.has_room

    @property
    def resumable(self) -> bool:
        """Whether the harness acknowledges."""
        return self._connection.inbox is not None

    async def run(self) -> None:
        """Writes what was sent. Returns when the harness takes no more."""
        while True:
            await self._connection.run()
            while self.resumable and self._read_out is not self._connection and not self._closing:
                await self._changed.park()
            if self._closing or not self.resumable:
                return
            try:
                with trio.CancelScope() as self._dialling:
                    self._connection = await self._again()
            except HarnessError as exc:
                self._lost = exc
            self._changed.unpark_all()
            if self._closing or self._lost:
                return

    def open(self, session: str, build: str, capabilities: Sequence[str]) -> None:
        """Queues `session.open`."""
        self._introduction = {
            "kind": "session.open",
            "session": session,
            "build": build,
            "capabilities": list(capabilities),
            "protocol": VERSION,
        }
        self._connection.put(self._opening(0))
        if self._dial is not None:
            self._connection.outbox.keep(trial=True)
        self._connection.push()

    def put(self, payload: bytes) -> None:
        """Takes a payload, which `push` writes; drops it if the harness is gone."""
        if self._lost is None:
            self._connection.put(payload)

    def push(self) -> None:
        """Sees to it that what was put is written."""
        self._connection.push()

    async def send(self, payload: bytes) -> None:
        """Takes a payload, when there is room; drops it if the harness is gone. If cancelled, it took
        nothing."""
        while self._lost is None:
            connection = self._connection
            await connection.room(or_failure=True)
            if connection.has_room:
                break
            await self._another(connection)
        self.put(payload)
        self.push()

    async def receive(self) -> bytes | None:
        """The next payload; None when no more will come. If cancelled, none is lost. Raises FramingError,
        HarnessError."""
        while True:
            connection = self._connection
            try:
                payload = await connection.receive()
            except FramingError as exc:
                if not self.resumable or exc.code != "frame_cut":
                    raise
                payload = None
            if payload is None and self.resumable and not self._closing:
                if not connection.broken:
                    connection.broken = True
                    connection.fail("the harness closed the connection")
                    return b""
                if self._given:
                    return b""
                self._read_out = connection
                self._changed.unpark_all()
                await self._another(connection)
            elif payload is None or self._heard or not self._joins(payload):
                self._heard = True
                if payload is None or not self._ungranted or read_ack(payload) is None:
                    self._given += payload is not None
                    return payload

    def took(self, size: int) -> None:
        """A payload of that size, which `receive` gave, is in good hands."""
        self._given -= 1
        self._connection.took(size)

    async def aclose(self, outcome: str) -> None:
        """Writes `session.close` and closes; within LAST_WORD seconds."""
        self._closing = True
        self._dialling.cancel()
        self._connection.put(strict_json.dumps({"kind": "session.close", "outcome": outcome}))
        with trio.CancelScope(shield=True):
            with trio.move_on_after(LAST_WORD):
                await self._connection.flush()
            await self._connection.aclose()
        self._changed.unpark_all()
        await trio.lowlevel.checkpoint()

    def _connect(self, stream: trio.abc.Stream) -> Connection:
        limits = self._limits
        return Connection(stream, LengthPrefixed(limits.frame), queue=limits.queue, write=limits.write)

    def _opening(self, received: int) -> bytes:
        if self._dial is None:
            return strict_json.dumps(self._introduction)
        limits = self._limits
        resume = {
            "connection": self._connections,
            "received": received,
            "window": limits.queue,
            "grace": limits.grace,
        }
        return strict_json.dumps({**self._introduction, "resume": resume})

    def _joins(self, payload: bytes) -> bool:
        """Whether this first message of the harness says that it numbers its messages."""
        self._heard = True
        received = _resume(payload)
        if received is None:
            self._connection.outbox.stop()
            return False
        if received == 0 and self._connection.outbox.confirm():
            self._connection.grant(Inbox(self._limits.queue))
            self._connection.push()
        else:
            self._ungranted = True
        return True

    async def _another(self, than: Connection) -> None:
        """Returns when there is another connection. Raises HarnessError when there will be none."""
        while self._connection is than and self._lost is None and not self._closing:
            await self._changed.park()
        if self._lost is not None:
            raise self._lost

    async def _again(self) -> Connection:
        """Another connection that goes on where the one before it broke. Raises HarnessError."""
        assert self._dial is not None
        grace = self._limits.grace
        before = self._connection
        await before.aclose()
        with trio.move_on_after(grace):
            while True:
                try:
                    return await self._resume_over(await self._dial(), before)
                except OSError:
                    await trio.sleep(RETRY)
        raise HarnessError(
            f"the harness went away and did not come back within {grace:g} s ({before.failure})",
            hint="let it listen again sooner, or raise spec.channel.grace",
        )

    async def _resume_over(self, stream: trio.abc.Stream, before: Connection) -> Connection:
        """Raises HarnessError where the harness cannot go on, OSError where its stream broke again."""
        self._connections += 1
        assert before.inbox is not None
        connection = self._connect(stream)
        try:
            connection.put(self._opening(before.inbox.received))
            await connection.flush()
            payload = await connection.receive()
            if payload is None:
                raise ConnectionResetError
            received = _resume(payload)
            if received is None:
                raise HarnessError("the harness came back without `resume`", hint=_FORGOT)
            before.outbox.rewind(received)
        except FramingError as exc:
            await connection.aclose()
            if exc.code == "frame_cut":
                raise ConnectionResetError from None
            raise HarnessError(f"the harness came back and sent no frames ({exc.code})") from None
        except NotKept:
            await connection.aclose()
            raise HarnessError("the harness came back and has lost what it was sent", hint=_FORGOT) from None
        except BaseException:
            await connection.aclose()
            raise
        connection.number(before.outbox, before.inbox)
        return connection


def _resume(payload: bytes) -> int | None:
    """How many messages the harness has taken, where this is its `resume`."""
    try:
        message = strict_json.loads(payload)
    except strict_json.JsonRefused:
        return None
    received = message.get("received")
    return received if message.get("kind") == "resume" and type(received) is int else None


async def connect_harness(address: str, limits: Limits) -> ListeningHarness:
    """Dials the harness at `unix:PATH` or `loopback:FILE`, for as long as `limits.grace` gives it to come.
    Raises HarnessError."""
    scheme, _, path = address.partition(":")
    if scheme not in HARNESSES or not path:
        raise HarnessError(
            f"{address!r} is not the address of a harness", hint=f"write {' or '.join(HARNESSES.values())}"
        )

    async def dial() -> trio.abc.Stream:
        if scheme == "loopback":
            return await dial_loopback(path)
        return await trio.open_unix_socket(path)

    failure: OSError | None = None
    with trio.move_on_after(limits.grace):
        while True:
            try:
                return ListeningHarness(await dial(), limits, dial if limits.grace else None)
            except (FileNotFoundError, ConnectionRefusedError) as exc:
                failure = exc
                await trio.sleep(RETRY)
            except OSError as exc:
                failure = exc
                break
    if failure is None or isinstance(failure, FileNotFoundError):
        raise HarnessError(f"no harness listens at {path}", hint="start it before the session")
    raise HarnessError(
        f"the harness at {path} cannot be reached: {failure.strerror or failure}",
        hint="see that it listens there and that you may write to the socket",
    ) from None


class DemoHarness:
    """Answers a guest where there is no harness, and tells what it sees.

    It ends the session when it has answered the guest's second prompt, or when for QUIET seconds no message
    has come, times `scale`: how much slower than on hardware the guest is. `say` gets one line of printable
    text at a time.
    """

    PROMPTS = 2

    def __init__(self, say: Callable[[str], None], scale: float = 1.0) -> None:
        self._say = say
        self._quiet = QUIET * scale
        self._answers: deque[bytes] = deque()
        self._news = trio.Event()
        self._prompts = 0

    @property
    def has_room(self) -> bool:
        """It answers at once."""
        return True

    @property
    def resumable(self) -> bool:
        """It cannot be lost."""
        return False

    async def run(self) -> None:
        """Nothing of it outlives a call."""
        await trio.lowlevel.checkpoint()

    def open(self, session: str, build: str, capabilities: Sequence[str]) -> None:
        """Says who is there."""
        can = f", capable of {', '.join(capabilities)}" if capabilities else ""
        self._say(_line(f"guest connected: build {build or 'unnamed'}{can}"))

    async def send(self, payload: bytes) -> None:
        """As `put`."""
        self.put(payload)

    def took(self, size: int) -> None:
        """Nothing is kept."""

    def push(self) -> None:
        """Nothing waits."""

    def put(self, payload: bytes) -> None:
        """Answers at once; the answer waits for `receive`."""
        message = json.loads(payload)  # the protocol has looked at it
        answer = self._answer(message)
        if answer is not None:
            self._answers.append(strict_json.dumps(answer))
        self._news.set()

    async def receive(self) -> bytes | None:
        """The next answer; None after the last, or where no message came for so long."""
        while not self._answers:
            if self._prompts >= self.PROMPTS:
                return None
            self._news = trio.Event()
            with trio.move_on_after(self._quiet) as scope:
                await self._news.wait()
            if scope.cancelled_caught:
                self._say("nothing more to do")
                return None
        return self._answers.popleft()

    async def aclose(self, outcome: str) -> None:
        """Nothing is held."""
        await trio.lowlevel.checkpoint()

    def _answer(self, message: Mapping[str, Any]) -> dict[str, Any] | None:
        match message["kind"]:
            case "tool.invoke":
                self._say(_line(f"guest invokes {message['tool']}"))
                return {"kind": "tool.result", "id": message["id"], "result": _canned(message["tool"])}
            case "prompt":
                self._prompts += 1
                self._say(_line(f"guest says: {message['text']}"))
                text = "Hello from the harness. All is well on this side."
                return {"kind": "prompt.result", "id": message["id"], "text": text}
            case "task.approval_requested":
                self._say("guest asks for an approval: denied")
                ids = {name: message.get(name) for name in ("task_id", "approval_id")}
                return {"kind": "task.approval_decision", **ids, "decision": "deny"}
            case "guest.lost":
                self._say("the guest's channel is lost")
                return None
            case "guest.back":
                self._say("the guest is back")
                return None
            case kind:
                self._say(_line(f"guest sends {kind}"))
                return None


def _canned(tool: str) -> Any:
    """A small result such as tools of that name give."""
    if tool.startswith("fs."):
        return {"text": "the contents of a file that does not exist\n"}
    if tool.startswith("web."):
        return {"hits": [{"title": "Kenaz", "url": "https://example.org/kenaz"}]}
    return {"ok": True}


def _line(text: str) -> str:
    """At most 200 characters that no terminal takes for commands: the guest wrote them."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text[:200])
