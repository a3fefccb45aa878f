"""What is wrong with a file, where, and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, order=True)
class Place:
    """A position in a text file; `line` and `column` count from 1. Line 0 means the file as a whole."""

    file: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}" if self.line else self.file


@dataclass(frozen=True, slots=True, order=True)
class Fault:
    """One thing wrong with a file. `path` is dotted (`spec.machine.cpus`), `code` is stable (`KL012`).

    `level` is `error` or `warning`; a warning alone does not refuse the file.
    """

    place: Place
    path: str
    message: str
    hint: str = ""
    code: str = ""
    level: str = "error"

    def __str__(self) -> str:
        parts = [str(self.place), *([self.path] if self.path else [])]
        text = ": ".join([*parts, self.message])
        if self.hint:
            text += f" ({self.hint})"
        return f"{text} [{self.code}]" if self.code else text


class InvalidFile(Exception):
    """A file was refused. Carries every fault that could be found, in the file's order."""

    def __init__(self, faults: list[Fault]) -> None:
        super().__init__("\n".join(str(fault) for fault in faults))
        self.faults = faults
