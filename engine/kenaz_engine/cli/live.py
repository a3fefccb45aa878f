"""How a running session is shown: to a person as lines, to a program as JSON lines."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import trio

from kenaz_engine.cli.output import Paint, columns, cut, plain
from kenaz_engine.images.transfer import Notice, Progress
from kenaz_engine.session.launch import Result
from kenaz_engine.session.prepared import Prepared
from kenaz_engine.session.reap import Reaped, reaped_data
from kenaz_engine.session.summary import phases

if TYPE_CHECKING:
    from kenaz_engine.cli.transfers import Pace

Record = Mapping[str, Any]

_TICK = 0.1

SHOWN = 256 * 1024
"""Characters of a command's output that are shown at most."""

GUEST_LINES = 200
"""Lines about what the guest says and asks for that are shown at most: a guest may repeat itself for ever."""


class Output(Protocol):
    """What a view writes to."""

    def isatty(self) -> bool:
        """Whether it is a terminal."""
        ...

    def write(self, text: str, /) -> object:
        """Writes what will be seen at the next flush."""
        ...

    def flush(self) -> None:
        """Shows what was written."""
        ...


class View(Protocol):
    """Who watches a session."""

    def reaped(self, results: Sequence[Reaped]) -> None:
        """Dead sessions were found, and this came of them."""
        ...

    def begin(self, prepared: Prepared) -> None:
        """The session is prepared and will start now."""
        ...

    def record(self, record: Record) -> None:
        """A record was written to the journal."""
        ...

    def say(self, text: str) -> None:
        """The demo harness has seen something."""
        ...

    def output(self, stream: str, text: str) -> None:
        """The guest's command wrote to its `stdout` or `stderr`."""
        ...

    def progress(self, seen: Progress | Notice) -> None:
        """The image is being fetched."""
        ...

    def finish(self, result: Result, exit_code: int, left: Sequence[str]) -> None:
        """The session has ended; `left` says in words what is still there of it."""
        ...

    async def tick(self) -> None:
        """Runs beside the session and is cancelled at its end."""
        ...


class _CommandOutput:
    """A command's output as lines that no terminal takes for commands, SHOWN characters of it."""

    def __init__(self, line: Callable[[str], None]) -> None:
        self._line = line
        self._parts = {"stdout": "", "stderr": ""}
        self._room = SHOWN

    def feed(self, stream: str, text: str) -> None:
        """Shows the lines that `text` completes."""
        if self._room <= 0:
            return
        kept, self._room = text[: self._room], self._room - len(text)
        *lines, self._parts[stream] = (self._parts[stream] + kept).split("\n")
        for line in lines:
            self._line(plain(line))
        if self._room <= 0:
            self.close()
            self._line(f"(only the first {SHOWN} characters of the output are shown)")

    def close(self) -> None:
        """Shows lines that were not ended."""
        for stream, part in self._parts.items():
            if part:
                self._line(plain(part))
            self._parts[stream] = ""


class JsonLines:
    """Every record of the journal as a line, and a `result` at the end; see docs/reference/run-json.md."""

    def __init__(self, out: Output, beside: Output) -> None:
        self._out = out
        self._beside = beside
        self._command = _CommandOutput(self._aside)
        self._pace: Pace | None = None

    def reaped(self, results: Sequence[Reaped]) -> None:
        """One line."""
        self._write({"kind": "reaped", "sessions": [reaped_data(result) for result in results]})

    def begin(self, prepared: Prepared) -> None:
        """The header record says it all."""

    def record(self, record: Record) -> None:
        """One line."""
        self._write(record)

    def say(self, text: str) -> None:
        """Content is not for the stream of events."""

    def output(self, stream: str, text: str) -> None:
        """Goes to standard error."""
        self._command.feed(stream, text)

    def progress(self, seen: Progress | Notice) -> None:
        """A line twice a second; what is to be noticed is in the journal already."""
        from kenaz_engine.cli.transfers import as_data, events

        self._pace = self._pace or events()
        if isinstance(seen, Progress) and self._pace.due(seen, time.monotonic()):
            self._write(as_data(seen))

    def finish(self, result: Result, exit_code: int, left: Sequence[str]) -> None:
        """The last line."""
        self._command.close()
        outcome = result.outcome
        self._write(
            {
                "kind": "result",
                "success": outcome.success and not left,
                "exit": exit_code,
                "exit_code": result.exit_code,
                "verdict": outcome.verdict or outcome.internal,
                "seconds": round(outcome.seconds, 3),
                "journal": str(result.journal),
                "console": list(result.console) if not outcome.success else [],
                "left": list(left),
            }
        )

    async def tick(self) -> None:
        """Nothing moves between lines."""

    def _aside(self, line: str) -> None:
        self._beside.write(line + "\n")
        self._beside.flush()

    def _write(self, value: Record) -> None:
        self._out.write(json.dumps(value) + "\n")
        self._out.flush()


class Live:
    """A line per state. On a terminal the line of the current state shows its time as it passes."""

    def __init__(self, out: Output) -> None:
        self._out = out
        # A dumb terminal can go back on no line.
        self._terminal = out.isatty() and os.environ.get("TERM") != "dumb"
        self._paint = Paint(out)
        self._records: list[Record] = []
        self._state = ""
        self._entered: float | None = None
        self._incomplete = False
        self._since = time.monotonic()
        self._said: set[str] = set()
        self._command = _CommandOutput(lambda line: self._line(f"    | {line}"))
        self._hint = self._hint_of_event = ""
        self._pace: Pace | None = None
        self._fetching = ""
        self._guest_lines = GUEST_LINES

    def reaped(self, results: Sequence[Reaped]) -> None:
        """One line."""
        clean = [result.id for result in results if result.status == "reaped"]
        other = [result.id for result in results if result.status != "reaped"]
        said = [f"gave back what dead sessions held: {_listed(clean)}"] if clean else []
        said += (
            [f"dead, but not to be reaped: {_listed(other)} (`kenaz-launcher reap` says why)"]
            if other
            else []
        )
        self._line(self._paint("; ".join(said), "yellow" if other else "dim"))

    def begin(self, prepared: Prepared) -> None:
        """What will be run, and every fall-back."""
        resolved, capabilities = prepared.resolved, prepared.capabilities
        accelerator = f" ({capabilities.accelerator})" if capabilities.accelerator != "none" else ""
        image = f", image {resolved.image}" if capabilities.boots_image else ""
        self._line(f"session {resolved.id}: {prepared.driver.name}{accelerator}, {prepared.transport}{image}")
        for note in prepared.notes:
            self._line(self._paint(f"  note: {note}", "dim"))

    def record(self, record: Record) -> None:
        """Shows what a person wants to see of it."""
        # What came after a journal could not be written has neither number nor time.
        self._incomplete = self._incomplete or "t" not in record
        if record["kind"] != "channel" and "t" in record:
            self._records.append(record)
        match record["kind"]:
            case "entered":
                self._leave(record.get("t"))
                self._state, self._entered, self._since = record["state"], record.get("t"), time.monotonic()
                self._draw()
            case "decision":
                if (verdict := record.get("verdict")) and verdict not in self._said:
                    self._hint = self._hint_of_event
                self._complain([record.get("verdict", ""), *record.get("also", [])], "red")
                self._complain(record.get("warnings", []), "yellow")
            case "event":
                data = record.get("data", {})
                self._hint_of_event = data.get("hint", "")
                if data.get("by") == "signal":
                    more = "; once more to abort" if record["type"] == "end" else ""
                    self._line(f"    interrupted: {record['type']}{more}")
            case "note" if record.get("about") == "image":
                self._line(self._paint(f"    note: {plain(record['text'])}", "yellow"))
            case "backoff":
                self._line(f"    trying again in {record['seconds']:.1f} s")
            case "channel" if record.get("outcome") == "denied":
                self._of_guest(f"    tool {record.get('name', '')}: denied by the session's policy")
            case "note" if record.get("about") == "port":
                wanted, taken = record["wanted"], record["taken"]
                self._line(f"    vsock port {wanted} is taken by another process: the guest dials {taken}")
            case "end":
                self._leave(record.get("t"))

    def say(self, text: str) -> None:
        """A line of the demo harness."""
        self._of_guest(f"    {plain(text)}")

    def output(self, stream: str, text: str) -> None:
        """Line by line, in the order in which it came."""
        self._command.feed(stream, text)

    def progress(self, seen: Progress | Notice) -> None:
        """On the line of the current state; elsewhere a line now and then."""
        from kenaz_engine.cli.transfers import in_words, lines

        if isinstance(seen, Notice):
            return  # it is in the journal, and so was shown
        self._pace = self._pace or lines()
        if self._terminal:
            self._fetching = "" if seen.done >= seen.total else in_words(seen)
        elif self._pace.due(seen, time.monotonic()):
            self._line(f"    {in_words(seen)}")

    def finish(self, result: Result, exit_code: int, left: Sequence[str]) -> None:
        """The summary."""
        self._command.close()
        outcome = result.outcome
        if not outcome.success and result.console:
            self._line("  the guest's last words:")
            for line in result.console:
                self._line(self._paint(f"    | {plain(line)}", "dim"))
        if outcome.success and not left:
            word = self._paint("succeeded", "green")
        else:
            why = outcome.verdict or outcome.internal or "something was left behind"
            word = self._paint(f"failed: {plain(why)}", "red")
        self._line(f"{word}, {outcome.seconds:.2f} s in all")
        if self._hint:
            self._line(f"  what to do: {plain(self._hint)}")
        if outcome.verdict and outcome.internal not in outcome.verdict:
            self._line(self._paint(f"  {plain(outcome.internal)}", "red"))
        if self._incomplete:
            self._line(self._paint("  its record is incomplete: the end of the journal is missing", "red"))
        if parts := phases(self._records):
            self._line("  " + ", ".join(f"{phase.name} {phase.seconds:.2f} s" for phase in parts))
        self._line(f"  journal {result.journal}")
        for item in left:
            self._line(self._paint(f"  left behind: {plain(item)}", "red"))
        if not left:
            self._line("  nothing left behind")

    async def tick(self) -> None:
        """Keeps the current state's time moving, on a terminal."""
        while self._terminal:
            await trio.sleep(_TICK)
            self._draw()

    def _of_guest(self, line: str) -> None:
        if self._guest_lines > 0:
            self._guest_lines -= 1
            self._line(line if self._guest_lines else "    (what more the guest does is in the journal only)")

    def _complain(self, texts: Sequence[str], style: str) -> None:
        """What went wrong, once each."""
        for text in texts:
            if text and text not in self._said:
                self._said.add(text)
                self._line(self._paint(f"    ! {plain(text)}", style))

    def _leave(self, t: float | None) -> None:
        if self._state:
            if t is None or self._entered is None:
                seconds = time.monotonic() - self._since
            else:
                seconds = t - self._entered
            # Left first, or its line would be drawn once more.
            left, self._state, self._fetching = self._state, "", ""
            self._line(f"  {left:<12} {seconds:7.2f} s")

    def _draw(self) -> None:
        if self._terminal and self._state:
            passed = math.floor((time.monotonic() - self._since) * 10) / 10
            text = f"  {self._state:<12} {passed:7.1f}  s ... {self._fetching}".rstrip()
            self._out.write(f"\r\x1b[K{cut(text, columns())}")
            self._out.flush()

    def _line(self, text: str) -> None:
        self._out.write(("\r\x1b[K" if self._terminal else "") + text + "\n")
        self._draw()
        self._out.flush()


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return shown if len(names) <= 4 else f"{shown} and {len(names) - 4} more"
