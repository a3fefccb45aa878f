"""`kenaz-launcher explain`: what an event would lead to in a state, and why."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import Any

from kenaz_engine.cli.failures import SUCCESS, USAGE, CommandError
from kenaz_engine.cli.lifecycles import open_lifecycle
from kenaz_engine.cli.output import print_json
from kenaz_engine.lifecycle.model import Arm, Lifecycle
from kenaz_engine.replay.explain import explain
from kenaz_engine.spec.schema import suggestion
from kenaz_engine.spec.yamlfile import parse


def configure(parser: argparse.ArgumentParser) -> None:
    """Where, what happens, and what is known by then."""
    parser.add_argument("lifecycle", metavar="LIFECYCLE", help="a shipped lifecycle's name, or a file")
    parser.add_argument("state", metavar="STATE", help="the state that the session is in")
    parser.add_argument("event", metavar="EVENT", help="the event that comes")
    parser.add_argument(
        "--data", action="append", default=[], metavar="NAME=VALUE", help="what the event carries"
    )
    parser.add_argument("--failed", action="store_true", help="something has failed before")
    parser.add_argument(
        "--counter", action="append", default=[], metavar="NAME=N", help="how often that was counted before"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--format", choices=("text", "json"), default="text", help="form of the answer")
    form.add_argument(
        "--json", action="store_const", const="json", dest="format", help="same as --format json"
    )


def run(arguments: argparse.Namespace) -> int:
    """Explains; an event that leads to nothing is an answer too."""
    lifecycle = open_lifecycle(arguments.lifecycle)
    state = arguments.state
    if state not in lifecycle.states:
        hint = suggestion(state, lifecycle.states) or f"its states are {', '.join(lifecycle.states)}"
        raise CommandError(f"the lifecycle {lifecycle.name!r} has no state {state!r}", hint, USAGE)
    found = explain(
        lifecycle,
        state,
        arguments.event,
        data={name: _scalar(name, text) for name, text in _pairs("--data", arguments.data)},
        failed=arguments.failed,
        counters=dict(_counters(lifecycle, arguments.counter)),
    )
    if arguments.format == "json":
        print_json(found.as_data())
    else:
        print(found)
    return SUCCESS


def _pairs(option: str, words: list[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, equals, text = word.partition("=")
        if not (name and equals):
            raise CommandError(f"{option} {word!r} is not NAME=VALUE", f"write {option} clean=true", USAGE)
        yield name, text


def _scalar(name: str, text: str) -> Any:
    """As a lifecycle's file would have it: `true` is a boolean, `"true"` a text. Raises InvalidFile."""
    return parse(text, f"--data {name}").data if text else ""


def _counters(lifecycle: Lifecycle, words: list[str]) -> Iterator[tuple[str, int]]:
    known = {arm.count for arm in _arms(lifecycle)} | {
        arm.when.key for arm in _arms(lifecycle) if arm.when and arm.when.kind == "below"
    }
    for name, text in _pairs("--counter", words):
        if name not in known - {""}:
            hint = suggestion(name, known - {""}) or "it counts nothing"
            raise CommandError(f"the lifecycle {lifecycle.name!r} has no counter {name!r}", hint, USAGE)
        if not (text.isdecimal() and text.isascii()):
            raise CommandError(f"--counter {name}={text}: {text!r} is not a number", "0 or more", USAGE)
        yield name, int(text)


def _arms(lifecycle: Lifecycle) -> Iterator[Arm]:
    for table in [lifecycle.any, *(state.on for state in lifecycle.states.values())]:
        for arms in table.values():
            yield from arms
