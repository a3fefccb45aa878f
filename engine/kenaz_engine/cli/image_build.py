"""`image build`: an image made on this host."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from kenaz_engine.cli.failures import ENVIRONMENT, SUCCESS, USAGE, CommandError
from kenaz_engine.guest.build import BuildError, build, demo
from kenaz_engine.guest.sigilos import sigilos

KINDS = {"demo": demo, "sigilos": sigilos}
"""The images that can be built, by name."""


def make(arguments: argparse.Namespace) -> int:
    """Builds it, unless it is there and current; says how far that is."""
    if arguments.name not in KINDS:
        raise CommandError(f"{arguments.name} cannot be built here", f"{' or '.join(KINDS)} can", USAGE)
    kind = KINDS[arguments.name]()
    if arguments.arch not in kind.architectures:
        known = f"--arch {' or '.join(kind.architectures)}"
        raise CommandError(f"there is no {kind.name} image for {arguments.arch}", known, USAGE)
    output = Path(arguments.output).absolute() if arguments.output else None
    try:
        report = partial(print, flush=True)
        build(arguments.arch, output, force=arguments.force, report=report, kind=kind)
    except BuildError as error:
        raise CommandError(str(error), error.hint, ENVIRONMENT) from error
    except OSError as error:
        raise CommandError(f"{error.filename or 'the system'}: {error.strerror}", code=ENVIRONMENT) from error
    return SUCCESS
