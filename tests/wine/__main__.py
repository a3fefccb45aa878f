"""`python -m tests.wine`: prepares what is not prepared yet. Where this host has not what it takes, says so;
where it has, and that fails, so does this: nothing would test Windows, and nobody would know."""

import shutil
import subprocess
import sys

from tests.wine import is_ready, prepare

if not is_ready():
    if missing := [program for program in ("wine", "mvn") if shutil.which(program) is None]:
        print(f"kenaz: no {' and no '.join(missing)}: the tests of Windows are left out", file=sys.stderr)
        sys.exit()
    print("kenaz: getting Python and QEMU for Windows (half a minute, once)", file=sys.stderr)
    try:
        prepare()
    except (OSError, subprocess.SubprocessError) as error:
        said = getattr(error, "stdout", None) or b""
        sys.exit(f"kenaz: {error}\n{said.decode(errors='replace')}")
