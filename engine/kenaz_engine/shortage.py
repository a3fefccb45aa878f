"""What a user can do about a host that lacks something, told by what the kernel said."""

from __future__ import annotations

import errno

_OF_THE_PROCESS = {
    errno.EMFILE: "raise the limit of open files: ulimit -n",
    errno.ENFILE: "the whole system has too many open files: end other programs",
    errno.EFBIG: "raise the limit of the size of files: ulimit -f",
    errno.ENOMEM: "free some memory",
}
_OF_THE_PLACE = {
    errno.ENOSPC: "make room there",
    getattr(errno, "EDQUOT", errno.ENOSPC): "make room there, or have your quota raised",
    errno.EROFS: "have it mounted writable",
    errno.EACCES: "give yourself access to it",
    errno.EPERM: "give yourself access to it",
    errno.ENOLCK: "have it mounted with locks",
    errno.ENOSYS: "have it mounted with locks",
    errno.EOPNOTSUPP: "have it mounted with locks",
    errno.EIO: "look into the system's log for the fault of its disk",
}


def what_to_do(exc: BaseException | None, elsewhere: str = "") -> str:
    """The mend for an OSError that is the host's and not ours, else an empty string.

    `elsewhere` says how to choose another place. It is added where that would help, and is the whole answer
    where nothing else is known.
    """
    number = exc.errno if isinstance(exc, OSError) else None
    if number in _OF_THE_PROCESS:
        return _OF_THE_PROCESS[number]
    mends = [_OF_THE_PLACE[number]] if number in _OF_THE_PLACE else []
    return ", or ".join([*mends, *([elsewhere] if elsewhere else [])])
