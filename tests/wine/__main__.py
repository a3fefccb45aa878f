"""`python -m tests.wine`: prepares what is not prepared yet, where this host can; says so where not."""

import shutil
import subprocess
import sys

from tests.wine import is_ready, prepare

if not is_ready():
    if missing := [program for program in ("wine", "mvn") if shutil.which(program) is None]:
        sys.exit(f"kenaz: no {' and no '.join(missing)}: the tests of Windows are left out")
    print("kenaz: getting Python and QEMU for Windows (half a minute, once)", file=sys.stderr)
    try:
        prepare()
    except (OSError, subprocess.SubprocessError) as error:
        sys.exit(f"kenaz: the tests of Windows are left out: {error}")
