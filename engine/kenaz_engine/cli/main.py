"""The command `kenaz-launcher`: finds the subcommand, imports nothing else, turns failures into one line."""

from __future__ import annotations

import argparse
import gc
import io
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from kenaz_engine import __version__
from kenaz_engine.cli.failures import (
    ENVIRONMENT,
    FAILED,
    INTERRUPTED,
    SUCCESS,
    USAGE,
    CommandError,
    complain,
)

COMMANDS = {
    "run": "run a session to its end",
    "validate": "check files and say everything that is wrong with them",
    "schema": "print the JSON Schema of a kind of file",
    "plan": "show what a session would be made of, and make nothing",
    "graph": "draw a lifecycle",
    "explain": "say what an event would lead to in a state, and why",
    "simulate": "run scenarios on virtual time and compare with what they expect",
    "explore": "play a lifecycle through every fault at every point",
    "replay": "decide the events of journals again and compare",
    "ps": "list sessions",
    "screenshot": "save what a guest's screen shows",
    "logs": "show what happened in a session, or what its guest printed",
    "end": "ask sessions to end",
    "kill": "end sessions now, also ones that hang",
    "reap": "give back what dead sessions left, and remove old records",
    "image": "list, fetch and look after images",
    "doctor": "say what this host can run, and what is missing",
    "version": "print the version",
}
"""Each is a module of this package with `configure(parser)` and `run(arguments) -> int`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        return _dispatch(list(sys.argv[1:] if argv is None else argv))
    except KeyboardInterrupt:  # also one that comes while modules are imported
        return INTERRUPTED


def _dispatch(words: list[str]) -> int:
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Names of files may be no text in the terminal's encoding; stderr has this already.
        sys.stdout.reconfigure(errors="backslashreplace")
    if not words or words[0] in ("-h", "--help", "help"):
        print(_overview())
        return SUCCESS if words else USAGE
    if words[0] in ("-V", "--version"):
        words[0] = "version"
    name = words[0]
    if name not in COMMANDS:
        complain(f"there is no command {name!r}", _did_you_mean(name))
        return USAGE
    gc.disable()  # nothing that is imported is garbage: looking for some costs a tenth of the start
    module = import_module(f"kenaz_engine.cli.{name}")
    gc.freeze()
    gc.enable()
    parser = argparse.ArgumentParser(
        prog=f"kenaz-launcher {name}",
        description=f"{COMMANDS[name][:1].upper()}{COMMANDS[name][1:]}.",
        allow_abbrev=False,
    )
    module.configure(parser)
    parser.add_argument("--debug", action="store_true", help="show tracebacks of internal errors")
    try:
        arguments = parser.parse_args(words[1:])
    except SystemExit as exc:
        return exc.code if isinstance(exc.code, int) else USAGE
    return _guarded(module.run, arguments)


def _guarded(run: object, arguments: argparse.Namespace) -> int:
    assert callable(run)
    try:
        code = run(arguments)
        sys.stdout.flush()
    except CommandError as exc:
        complain(str(exc), exc.hint)
        return exc.code
    except BrokenPipeError:
        # The reader (`| head`) has gone. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return SUCCESS
    except Exception as exc:
        return _failed(exc, debug=arguments.debug)
    assert isinstance(code, int)
    return code


def _failed(exc: Exception, *, debug: bool) -> int:
    """The failures that any command may meet, told apart by what the user can do."""
    if debug:
        import traceback

        traceback.print_exception(exc)
    faults = getattr(exc, "faults", None)
    if faults is not None:
        from kenaz_engine.cli.output import plain

        for fault in faults:
            print(plain(str(fault)), file=sys.stderr)
        return USAGE
    hint = getattr(exc, "hint", None)
    if hint is not None:
        complain(str(exc), hint)
        return ENVIRONMENT
    first = exc
    while isinstance(first, ExceptionGroup):
        first = first.exceptions[0]
    if isinstance(first, OSError):
        from kenaz_engine.shortage import what_to_do

        if mend := what_to_do(first):
            complain(f"{first.filename or 'the system'}: {first.strerror}", mend)
            return ENVIRONMENT
    complain(
        f"internal error: {type(exc).__name__}: {exc}",
        "" if debug else "this is a defect of kenaz-launcher; --debug shows where",
    )
    return FAILED


def _overview() -> str:
    width = max(map(len, COMMANDS)) + 2
    commands = "\n".join(f"  {name:{width}}{text}" for name, text in COMMANDS.items())
    return (
        f"kenaz-launcher {__version__}: throw-away virtual machines along declared lifecycles\n\n"
        f"usage: kenaz-launcher COMMAND ...\n\n{commands}\n\n"
        "`kenaz-launcher COMMAND --help` explains a command."
    )


def _did_you_mean(name: str) -> str:
    import difflib

    near = difflib.get_close_matches(name, COMMANDS, 1)
    return f"did you mean {near[0]!r}?" if near else f"known are {', '.join(COMMANDS)}"


if __name__ == "__main__":
    sys.exit(main())
