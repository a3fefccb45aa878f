"""Open files kept back for the way down: removing a directory needs some, also when there are no more."""

from __future__ import annotations

import errno
import os

from kenaz_engine.openflags import PLAIN

SIZE = 4
"""As many as `shutil.rmtree` of a directory of the session's takes at once: one a level, and one more."""


class Reserve:
    """Holds SIZE descriptors until they are needed. Close it."""

    def __init__(self) -> None:
        """Raises OSError when there are not as many."""
        self._files: list[int] = []
        try:
            for _ in range(SIZE):
                self._files.append(os.open(os.devnull, os.O_RDONLY | PLAIN))
        except OSError:
            self.close()
            raise

    def helps(self, exc: OSError) -> bool:
        """Gives them up where `exc` says that there are no more; true when another try may work."""
        if exc.errno not in (errno.EMFILE, errno.ENFILE) or not self._files:
            return False
        self.close()
        return True

    def close(self) -> None:
        """Idempotent."""
        while self._files:
            os.close(self._files.pop())
