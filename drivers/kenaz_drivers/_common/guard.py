"""Ties a child to its parent, then becomes the child's program.

Run as a file, `python -I -S -E guard.py --parent PID [options] -- ARGV...`, between fork and exec of a child,
because nothing of this can be done safely in a forked trio process. It imports nothing but the standard
library and starts in about 15 ms. Where the platform has no parent-death signal, the child is not tied.

Exit codes of its own: 125 the parent is gone or a step failed, 127 the program could not be started.
"""

from __future__ import annotations

import argparse
import os
import sys

PR_SET_PDEATHSIG = 1
PR_SET_NO_NEW_PRIVS = 38

FAILED = 125
NOT_STARTED = 127


def _pair(text: str) -> tuple[int, int]:
    source, _, target = text.partition(":")
    return int(source), int(target)


def _limit(text: str) -> tuple[str, int]:
    name, _, value = text.partition(":")
    return name, int(value)


def parse(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The guard's own options, and the argv of the program."""
    parser = argparse.ArgumentParser(prog="guard", allow_abbrev=False)
    parser.add_argument("--parent", type=int, required=True, help="exit when the parent is not this one")
    parser.add_argument("--dup", type=_pair, action="append", default=[], metavar="FROM:TO")
    parser.add_argument("--limit", type=_limit, action="append", default=[], metavar="NAME:VALUE")
    parser.add_argument("--no-new-privileges", action="store_true")
    split = arguments.index("--")
    return parser.parse_args(arguments[:split]), arguments[split + 1 :]


def die_with_parent(parent: int, *, no_new_privileges: bool) -> None:
    """Has the kernel kill this process when the *thread* that made it ends. Raises OSError."""
    if sys.platform == "linux":
        import ctypes
        import signal

        libc = ctypes.CDLL(None, use_errno=True)
        wanted = [(PR_SET_PDEATHSIG, int(signal.SIGKILL))]
        if no_new_privileges:
            wanted.append((PR_SET_NO_NEW_PRIVS, 1))
        for option, value in wanted:
            if libc.prctl(option, *(ctypes.c_ulong(n) for n in (value, 0, 0, 0))) != 0:
                raise OSError(ctypes.get_errno(), f"prctl({option})")
    # The parent may have died before the signal was asked for; then somebody else has adopted us.
    if os.getppid() != parent:
        raise ProcessLookupError("the launcher is gone")


def renumber(pairs: list[tuple[int, int]]) -> None:
    """Gives each descriptor its number. A source may be another one's target, hence the detour."""
    if sys.platform != "win32":
        import fcntl

        above = max((number for pair in pairs for number in pair), default=0) + 1
        moved = [(fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, above), target) for source, target in pairs]
        for source, _ in pairs:
            os.set_inheritable(source, False)
        for source, target in moved:
            os.dup2(source, target, inheritable=True)


def limit(limits: list[tuple[str, int]]) -> None:
    """Sets soft and hard limits by the lower-case name of the resource (`core`, `data`)."""
    if sys.platform != "win32":
        import resource

        for name, value in limits:
            resource.setrlimit(getattr(resource, f"RLIMIT_{name.upper()}"), (value, value))


def main(arguments: list[str]) -> int:
    """Does what the options say and becomes the program; returns only when it cannot."""
    options, argv = parse(arguments)
    try:
        die_with_parent(options.parent, no_new_privileges=options.no_new_privileges)
        renumber(options.dup)
        limit(options.limit)
    except (OSError, ValueError) as error:
        print(f"guard: {error}", file=sys.stderr)
        return FAILED
    if sys.platform != "win32":
        import signal

        # Python ignores these two, and what is ignored stays so across exec.
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(argv[0], argv)  # noqa: S606  # becoming the program is the point; there is no shell
    except OSError as error:
        print(f"cannot start {argv[0]}: {error.strerror}", file=sys.stderr)
        return NOT_STARTED


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
