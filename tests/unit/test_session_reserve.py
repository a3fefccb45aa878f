"""What a session keeps back for its way down, and what its user is told when the host has no more."""

from __future__ import annotations

import errno
import os

import pytest

from kenaz_engine.session.reserve import SIZE, Reserve
from kenaz_engine.shortage import what_to_do


def test_the_reserve_is_given_up_once_and_only_for_want_of_descriptors() -> None:
    before = len(os.listdir("/dev/fd"))
    reserve = Reserve()
    assert len(os.listdir("/dev/fd")) == before + SIZE
    assert not reserve.helps(OSError(errno.ENOSPC, "full"))
    assert reserve.helps(OSError(errno.EMFILE, "none"))
    assert not reserve.helps(OSError(errno.EMFILE, "none"))
    reserve.close()
    assert len(os.listdir("/dev/fd")) == before


def test_half_a_reserve_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(os.listdir("/dev/fd"))
    really, opened = os.open, []

    def scarce(path: str, flags: int) -> int:
        if len(opened) == SIZE - 1:
            raise OSError(errno.EMFILE, "Too many open files")
        opened.append(really(path, flags))
        return opened[-1]

    with monkeypatch.context() as patched:
        patched.setattr("os.open", scarce)
        with pytest.raises(OSError, match="Too many"):
            Reserve()
    assert len(os.listdir("/dev/fd")) == before


@pytest.mark.parametrize(
    ("exc", "mend"),
    [
        (OSError(errno.EMFILE, ""), "raise the limit of open files: ulimit -n"),
        (OSError(errno.ENOSPC, ""), "make room there, or go away"),
        (OSError(errno.ENOENT, ""), "go away"),
        (ValueError(), "go away"),
        (None, "go away"),
    ],
)
def test_a_mend_follows_from_what_the_kernel_said(exc: BaseException | None, mend: str) -> None:
    assert what_to_do(exc, "go away") == mend
    assert what_to_do(exc) == mend.removesuffix("go away").removesuffix(", or ")
