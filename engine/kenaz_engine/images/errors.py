"""What can be wrong with images."""

from __future__ import annotations


class ImageError(Exception):
    """An image or a disk of one cannot be used. `hint` is what the user can do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


class ImageMissing(ImageError):
    """There is no such image, or not for this architecture, or not on this machine yet."""
