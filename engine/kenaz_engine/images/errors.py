"""What can be wrong with images."""

from __future__ import annotations


class ImageError(Exception):
    """An image or a disk of one cannot be used. `hint` is what the user can do about it; `transient` says
    that the same may work a little later."""

    def __init__(self, message: str, hint: str = "", *, transient: bool = False) -> None:
        super().__init__(message)
        self.hint = hint
        self.transient = transient


class ImageMissing(ImageError):
    """There is no such image, or not for this architecture, or not on this machine yet."""


class Untrusted(ImageError):
    """What came is not what was promised: another length, digest or signature. Never worked around."""
