"""`kenaz-launcher reap`: gives back what dead sessions left."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import trio

from kenaz_engine.cli.failures import FAILED, SUCCESS, USAGE, CommandError
from kenaz_engine.cli.output import plain, print_json
from kenaz_engine.cli.sessions import find_directory
from kenaz_engine.session.reap import BOUND, Reaped, Swept, look, reap, reaped_data, survey, sweep
from kenaz_engine.spec.units import parse_duration


def configure(parser: argparse.ArgumentParser) -> None:
    """Which sessions, and whether to do it."""
    parser.add_argument(
        "id", metavar="ID", nargs="*", help="only these (an id, or the beginning of one); else all dead ones"
    )
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object instead of text")
    parser.add_argument(
        "--older-than",
        type=_duration,
        metavar="DURATION",
        help="only sessions of which nothing was written for so long, such as 2h",
    )


def run(arguments: argparse.Namespace) -> int:
    """Reaps, and says what came of each session."""
    if arguments.id and arguments.older_than is not None:
        raise CommandError("--older-than is for all sessions, not for named ones", "leave one out", USAGE)
    paths = list(dict.fromkeys(find_directory(word) for word in arguments.id))
    swept = _swept(paths, arguments.older_than or 0.0, dry=arguments.dry_run)
    failed = failures(swept.sessions)
    if arguments.json:
        print_json(_data(swept, dry=arguments.dry_run, ok=not failed))
    else:
        for result in swept.sessions:
            for line in lines(result):
                print(plain(line))
        if swept.removed:
            word = "would remove" if arguments.dry_run else "removed"
            print(f"{word} {_count(len(swept.removed), 'old record')}")
        if not swept.sessions and not swept.removed:
            print("nothing to reap")
    return FAILED if failed else SUCCESS


def _swept(paths: list[Path], older_than: float, *, dry: bool) -> Swept:
    if paths:
        return Swept(tuple(look(path) if dry else trio.run(_reap, path) for path in paths), ())
    if dry:
        return survey(older_than=older_than)
    return trio.run(_sweep, older_than)


async def _sweep(older_than: float) -> Swept:
    return await sweep(older_than=older_than)


async def _reap(path: Path) -> Reaped:
    return await reap(path, trio.current_time() + BOUND)


def failures(results: Iterable[Reaped]) -> list[Reaped]:
    """Those that are not as the user wants them."""
    return [result for result in results if result.status in ("left", "refused", "running")]


def lines(result: Reaped) -> Iterator[str]:
    """What came of a session, for people."""
    released = ", ".join(entry.resource for entry in result.released)
    match result.status:
        case "reaped" | "left":
            what = f"gave back {released}" if released else "it held nothing"
            yield (
                f"{result.id}: reaped: {result.message or what}"
                if result.status == "reaped"
                else (f"{result.id}: reaped in part: {what if released else 'gave back nothing'}")
            )
            for item in result.left:
                yield f"{result.id}: left behind: the {item.resource} {item.error}"
            if result.status == "left" and result.message:
                yield f"{result.id}: left behind: {result.message}"
        case "dead":
            held = f"would give back {released}" if released else "would find that it held nothing"
            yield f"{result.id}: dead: {result.message or held}"
        case "refused":
            yield f"{result.id}: left alone: {result.message}"
        case "running":
            yield f"{result.id}: runs; `kenaz-launcher end {result.id}` ends it"
        case "ended":
            yield f"{result.id}: has ended and left nothing"


def _data(swept: Swept, *, dry: bool, ok: bool) -> dict[str, Any]:
    return {
        "ok": ok,
        "dryRun": dry,
        "sessions": [reaped_data(result) for result in swept.sessions],
        "removed": list(swept.removed),
    }


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _duration(text: str) -> float:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no duration: {error}") from None
