"""What analysis can find wrong with a lifecycle: the codes, and a finding with the path that shows it.

docs/reference/findings.md explains each code with an example and its mend.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from kenaz_engine.lifecycle.model import Guard
from kenaz_engine.spec.faults import Fault, Place

Level = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class Code:
    """A kind of finding. `code` is stable: it never changes its meaning and is never used again."""

    code: str
    title: str
    level: Level = "error"


CODES: Mapping[str, Code] = {
    code.code: code
    for code in (
        Code("KL010", "unreachable state", "warning"),
        Code("KL011", "no way to a final state"),
        Code("KL012", "missing outcome"),
        Code("KL013", "unknown activity"),
        Code("KL014", "unknown event"),
        Code("KL015", "event that cannot arise", "warning"),
        Code("KL016", "event neither handled nor ignored"),
        Code("KL017", "event ignored while a goal can be reached"),
        Code("KL018", "needed resource not surely held"),
        Code("KL019", "resource still held at the end"),
        Code("KL020", "failed release that does not end in failure"),
        Code("KL021", "release that can be aborted"),
        Code("KL022", "cycle without a bound"),
        Code("KL023", "transition that can never be taken"),
        Code("KL024", "guard that is never true", "warning"),
        Code("KL025", "list that does not end unconditionally"),
        Code("KL026", "failure that is neither told nor warned of"),
        Code("KL027", "no goal"),
        Code("KL028", "success without a goal"),
        Code("KL029", "final state that contradicts the verdict"),
        Code("KL030", "too many combinations"),
    )
}
"""Every code, in order. KL001 to KL009 belong to the loader."""


@dataclass(frozen=True, slots=True)
class Step:
    """One event in one state. `target` is the state itself where the event was `ignored`; `guard` and `line`
    are those of the transition taken."""

    state: str
    event: str
    target: str
    guard: Guard | None = None
    line: int = 0
    ignored: bool = False


def route(steps: Sequence[Step]) -> str:
    """The steps as one line: `booting --done--> connecting --error--> killing`.

    A guard on the event's data is shown, for the path needs it; verdict and counters follow from the path.
    """
    parts = [step.state for step in steps[:1]]
    for step in steps:
        label = step.event
        if step.guard is not None and step.guard.kind == "data":
            label += f"[{step.guard.key}={json_like(step.guard.value)}]"
        if step.ignored:
            label += "(ignored)"
        parts.append(f"--{label}--> {step.target}")
    return " ".join(parts)


def json_like(value: object) -> str:
    """A scalar as it is written in YAML."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return "null" if value is None else str(value)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing wrong with a lifecycle.

    `state` is empty for what concerns `any` or the whole, `event` for what concerns the state as such.
    `under` is the part of the state that the event stands in (`on`, `ignore`), empty where it stands nowhere.
    `line` is the place in the lifecycle's file (0: none). `path` is a shortest way from the initial state to
    the fault; it is empty where the fault shows without any path.
    """

    code: str
    state: str
    event: str
    line: int
    message: str
    mend: str
    path: tuple[Step, ...] = ()
    under: Literal["on", "ignore", ""] = "on"

    @property
    def level(self) -> Level:
        """`error` refuses the lifecycle; `warning` does not."""
        return CODES[self.code].level

    @property
    def where(self) -> str:
        """The dotted place in the document: `states.running.on.end`."""
        if not self.state:
            return f"any.{self.event}" if self.event else ""
        place = {"on": f".on.{self.event}", "ignore": ".ignore", "": ""}
        return f"states.{self.state}{place[self.under] if self.event else ''}"

    def fault(self, file: str) -> Fault:
        """The finding as a fault of that file, on one line."""
        message = f"{self.message}; path: {route(self.path)}" if self.path else self.message
        place = Place(file, self.line, 1) if self.line else Place(file)
        return Fault(place, self.where, message, self.mend, self.code, self.level)
