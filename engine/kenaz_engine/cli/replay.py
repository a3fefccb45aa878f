"""`kenaz-launcher replay`: does the lifecycle still do what journals say it did?"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from typing import Any

from kenaz_engine.cli.failures import FAILED, SUCCESS, USAGE, CommandError, complain
from kenaz_engine.cli.journals import damaged, open_journal
from kenaz_engine.cli.lifecycles import open_lifecycle
from kenaz_engine.cli.output import Paint, columns, cut, plain, print_json
from kenaz_engine.journal.reader import Recording
from kenaz_engine.journal.records import Damaged
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.replay.replayer import Divergence, Replayer, ReplayResult, record_line, replay


def configure(parser: argparse.ArgumentParser) -> None:
    """Which journals, decided by what, and how much is shown."""
    parser.add_argument(
        "journals", nargs="+", metavar="JOURNAL", help="the file of a journal, or a session's id"
    )
    parser.add_argument(
        "--lifecycle",
        metavar="LIFECYCLE",
        help="decide with this one (a shipped name or a file) instead of the recorded one",
    )
    parser.add_argument("--until", type=int, metavar="SEQ", help="go no further than this record")
    parser.add_argument(
        "--step", action="store_true", help="show every record and where the session stands (Enter goes on)"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--format", choices=("text", "json"), default="text", help="form of the report")
    form.add_argument(
        "--json", action="store_const", const="json", dest="format", help="same as --format json"
    )


def run(arguments: argparse.Namespace) -> int:
    """Replays every journal, also after one that is damaged."""
    if arguments.step and (len(arguments.journals) > 1 or arguments.format == "json"):
        raise CommandError("--step is for one journal, as text", "leave the rest out", USAGE)
    lifecycle = open_lifecycle(arguments.lifecycle) if arguments.lifecycle else None
    if arguments.step:
        return _step(open_journal(arguments.journals[0]), lifecycle, arguments.until)
    if len(arguments.journals) == 1 and arguments.format == "text":
        result = _replay(arguments.journals[0], lifecycle, arguments.until)
        print(plain_lines(str(result)))
        return SUCCESS if result.ok else FAILED
    return _replay_all(arguments.journals, lifecycle, arguments.until, json=arguments.format == "json")


def _replay(word: str, lifecycle: Lifecycle | None, until: int | None) -> ReplayResult:
    recording = open_journal(word)
    try:
        return replay(recording, lifecycle, until=until)
    except Damaged as damage:
        raise damaged(recording.path, damage) from None


def _replay_all(words: list[str], lifecycle: Lifecycle | None, until: int | None, *, json: bool) -> int:
    results: list[dict[str, Any]] = []
    unreadable = diverged = 0
    for word in words:
        try:
            result = _replay(word, lifecycle, until)
        except CommandError as fault:
            unreadable += 1
            results.append({"journal": word, "ok": False, "fault": str(fault)})
            complain(str(fault), fault.hint)
            continue
        diverged += not result.ok
        results.append(result.as_data())
        if not json:
            _line(result)
    if json:
        print_json({"ok": not (unreadable or diverged), "journals": results})
    else:
        counts = [(len(words) - unreadable - diverged, "replay"), (diverged, "diverge")]
        counts += [(unreadable, "cannot be read")] if unreadable else []
        print(f"{len(words)} journals: {', '.join(f'{count} {what}' for count, what in counts)}")
    return USAGE if unreadable else FAILED if diverged else SUCCESS


def _line(result: ReplayResult) -> None:
    paint = Paint(sys.stdout)
    mark = paint("ok      ", "green") if result.ok else paint("diverges", "red")
    words = f"  {result.path}: {result.summary}"
    if result.warnings:
        words += f"; {len(result.warnings)} warning{'s' if len(result.warnings) > 1 else ''}"
    if result.stopped:
        words += f"; {result.stopped}"
    width = columns()
    print(f"{mark}{cut(plain(words), width and width - 8)}", flush=True)


def _step(recording: Recording, lifecycle: Lifecycle | None, until: int | None) -> int:
    """Record by record. Who reads on a terminal is waited for; anybody else gets all of it."""
    try:
        found = None
        asks = sys.stdin.isatty() and sys.stdout.isatty()
        if recording.header is not None:
            replayer = Replayer(recording, lifecycle)
            for record in recording.records if until is None else recording.records[: until + 1]:
                found = replayer.take(record)
                for line in _stepped(replayer, record, found):
                    print(plain(line))
                if found is not None or (asks and not _goes_on()):
                    break
            result = replayer.result(found)
        else:
            result = replay(recording, lifecycle)
    except Damaged as damage:
        raise damaged(recording.path, damage) from None
    print(plain_lines(str(result)))
    return SUCCESS if result.ok else FAILED


def _stepped(replayer: Replayer, record: dict[str, Any], found: Divergence | None) -> Iterator[str]:
    yield record_line(record, columns() or 160)
    if record["kind"] == "decision" and found is None:
        at = replayer.snapshot
        held = ", ".join(entry.resource for entry in replayer.held.values()) or "nothing"
        verdict = f", failed: {at.verdict}" if at.verdict else ""
        yield f"{' ' * 18}= {at.state}, entry {at.entry}{verdict}; holds {held}"


def _goes_on() -> bool:
    try:
        return input().strip() not in ("q", "quit")
    except EOFError:
        return False


def plain_lines(text: str) -> str:
    """Several lines, each without what could steer a terminal."""
    return "\n".join(plain(line) for line in text.split("\n"))
