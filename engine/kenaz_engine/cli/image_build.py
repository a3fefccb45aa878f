"""`image build`: the demo image, made on this host."""

from __future__ import annotations

import argparse
from pathlib import Path

from kenaz_engine.cli.failures import ENVIRONMENT, SUCCESS, USAGE, CommandError
from kenaz_engine.guest.build import BuildError, build
from kenaz_engine.guest.recipe import ARCHITECTURES


def make(arguments: argparse.Namespace) -> int:
    """Builds it, unless it is there and current; says how far that is."""
    if arguments.arch not in ARCHITECTURES:
        raise CommandError(
            f"there is no demo image for {arguments.arch}", f"--arch {' or '.join(ARCHITECTURES)}", USAGE
        )
    output = Path(arguments.output).absolute() if arguments.output else None
    try:
        build(arguments.arch, output, force=arguments.force, report=lambda text: print(text, flush=True))
    except BuildError as error:
        raise CommandError(str(error), error.hint, ENVIRONMENT) from error
    except OSError as error:
        raise CommandError(f"{error.filename or 'the system'}: {error.strerror}", code=ENVIRONMENT) from error
    return SUCCESS
