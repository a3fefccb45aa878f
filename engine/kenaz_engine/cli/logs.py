"""`kenaz-launcher logs`: the journal of a session as lines for people, or what its guest printed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from kenaz_engine.cli.failures import SUCCESS, USAGE, CommandError
from kenaz_engine.cli.output import Paint, columns, cut, plain
from kenaz_engine.cli.sessions import find_directory
from kenaz_engine.journal.records import Damaged, Decoder
from kenaz_engine.session.console import printable
from kenaz_engine.session.directory import is_alive

_POLL = 0.1
_CHUNK = 1 << 16
_COMMON = frozenset({"seq", "t", "wall", "kind", "prev", "about"})
_STYLES = {"entered": "bold", "note": "yellow", "intent": "dim", "acquired": "dim", "released": "dim"}


def configure(parser: argparse.ArgumentParser) -> None:
    """Which session, what of it, and whether to stay."""
    parser.add_argument("id", metavar="ID", help="the session's id, or the beginning of it")
    parser.add_argument(
        "--console", action="store_true", help="what the guest printed, instead of the journal"
    )
    parser.add_argument("--follow", "-f", action="store_true", help="go on until the session ends")
    parser.add_argument("--json", action="store_true", help="the journal's own lines of JSON, as they are")


def run(arguments: argparse.Namespace) -> int:
    """Prints what there is, and with `--follow` what comes."""
    if arguments.console and arguments.json:
        raise CommandError("--console has no --json form", "leave one of them out", USAGE)
    directory = find_directory(arguments.id)
    name = "console.log" if arguments.console else "journal.jsonl"
    lines = _lines(directory, directory / name, follow=arguments.follow)
    if arguments.console:
        _show_console(lines)
    elif arguments.json:
        for line in lines:
            _raw(line)
    else:
        _show_journal(directory / name, lines)
    return SUCCESS


def _lines(directory: Path, path: Path, *, follow: bool) -> Iterator[bytes]:
    """The lines of a file, each with its newline; the last may have none. Stays while the session lives."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        raise CommandError(f"session {directory.name} has no {path.name}") from None
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from None
    rest = b""
    with file:
        while True:
            # Asked first: what was written before the session ended is then surely read.
            alive = follow and is_alive(directory)
            while chunk := file.read(_CHUNK):
                *whole, rest = (rest + chunk).split(b"\n")
                yield from (line + b"\n" for line in whole)
            if not alive:
                break
            sys.stdout.flush()
            time.sleep(_POLL)
    if rest:
        yield rest


def _raw(line: bytes) -> None:
    sys.stdout.buffer.write(line)


def _show_console(lines: Iterator[bytes]) -> None:
    """A terminal gets no control characters of the guest's; a file or pipe gets every byte."""
    show: Callable[[bytes], None] = _raw
    if sys.stdout.isatty():

        def show(line: bytes) -> None:
            print(plain(printable(line)))

    for line in lines:
        show(line)


def _show_journal(path: Path, lines: Iterator[bytes]) -> None:
    """A half-written last line is left out."""
    decoder, paint, width = Decoder(), Paint(sys.stdout), columns()
    for line in lines:
        if not line.endswith(b"\n"):
            break
        try:
            record = decoder.decode(line[:-1])
        except Damaged as damage:
            sys.stdout.flush()
            message = f"{path}:{damage.line}: {damage.message}"
            raise CommandError(message, "what comes after it is not shown") from None
        style = _style(record)
        shown = cut(line_of(record), width)
        print(paint(shown, style) if style else shown)


def _style(record: Mapping[str, Any]) -> str:
    if record["kind"] == "end":
        return "green" if record.get("success") else "red"
    return _STYLES.get(record["kind"], "")


def line_of(record: Mapping[str, Any]) -> str:
    """A record for people: its time of day, the seconds since the session's start, and what happened."""
    wall, passed = record.get("wall"), record.get("t")
    clock = "--:--:--.---"
    if isinstance(wall, int | float) and 0 <= wall < 1 << 33:
        clock = f"{time.strftime('%H:%M:%S', time.localtime(wall))}.{int(wall * 1000) % 1000:03}"
    since = f"{passed:10.3f}" if isinstance(passed, int | float) else " " * 10
    return f"{clock} {since}  {plain(_words(record))}"


def _words(record: Mapping[str, Any]) -> str:
    get = record.get
    match record["kind"]:
        case "header":
            accelerator = f" ({get('accelerator')})" if get("accelerator") not in (None, "none") else ""
            return f"session {get('session')}: {get('driver')}{accelerator}, kenaz-launcher {get('launcher')}"
        case "event":
            return f"event {get('type')}{_pairs(get('data'))}"
        case "decision":
            return _decision(record)
        case "entered":
            timeout = "no deadline" if get("timeout") is None else f"at most {get('timeout'):g} s"
            return f"entered {get('state')}: {get('activity')}, {timeout}"
        case "backoff":
            return f"attempt {get('attempt')} in {get('seconds')} s"
        case "activity":
            return f"{get('activity')} {get('ended')}{_pairs({'error': get('error')})}"
        case "intent":
            return f"makes the {get('resource')}{_pairs(_short(get('intent')))}"
        case "acquired":
            return f"holds the {get('resource')}{_pairs(_short(get('handle')))}"
        case "released":
            return f"gave back the {get('resource')}"
        case "end":
            return _end(record)
        case kind:
            fields = {name: value for name, value in record.items() if name not in _COMMON}
            return f"{kind}{' ' + str(get('about')) if get('about') else ''}{_pairs(fields)}"


def _decision(record: Mapping[str, Any]) -> str:
    get = record.get
    if reason := get("reason"):
        return f"  nothing follows: {reason}"
    verdict = f", failed: {get('verdict')}" if get("verdict") else ""
    return f"  leads to {get('state')}{verdict}"


def _end(record: Mapping[str, Any]) -> str:
    get = record.get
    result = "success" if get("success") else f"failure: {get('verdict') or get('internal') or 'see above'}"
    left = [str(item.get("resource")) for item in get("left", ()) if isinstance(item, Mapping)]
    return f"ended in {get('state')}, {result}" + (f"; left behind: {', '.join(left)}" if left else "")


def _short(fields: Any) -> dict[str, Any]:
    """Of an intent or a handle what a person looks for: the path where it has one, and nothing long."""
    if not isinstance(fields, Mapping):
        return {}
    if "path" in fields:
        return {"path": fields["path"]}
    return {name: value for name, value in fields.items() if isinstance(value, str | int)}


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _pairs(fields: Any) -> str:
    if not isinstance(fields, Mapping):
        return ""
    pairs = [f"{key}={_value(value)}" for key, value in fields.items() if value not in (None, "", [], {})]
    return f" ({', '.join(pairs)})" if pairs else ""
