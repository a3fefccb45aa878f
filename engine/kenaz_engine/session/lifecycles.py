"""Finds the lifecycle of a session and checks it against this product's vocabulary. Imports nothing heavy."""

from __future__ import annotations

from importlib import resources

from kenaz_engine.lifecycle.analysis import analyse
from kenaz_engine.lifecycle.deadlines import with_deadlines
from kenaz_engine.lifecycle.loader import load_lifecycle
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.session.vocabulary import VOCABULARY
from kenaz_engine.spec.faults import Fault, InvalidFile
from kenaz_engine.spec.files import read
from kenaz_engine.spec.resolve import ResolvedSession
from kenaz_engine.spec.schema import suggestion


def shipped_lifecycles() -> list[str]:
    """The names of the lifecycles that come with this product."""
    folder = resources.files("kenaz_specs") / "lifecycles"
    names = (item.name for item in folder.iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def shipped_lifecycle(name: str) -> Lifecycle:
    """The shipped lifecycle of that name. Raises KeyError when there is none."""
    if name not in shipped_lifecycles():
        raise KeyError(name)
    source = resources.files("kenaz_specs") / "lifecycles" / f"{name}.yaml"
    return load_lifecycle(source.read_bytes(), f"kenaz_specs/lifecycles/{name}.yaml")


def is_path(name: str) -> bool:
    """True when a spec's `lifecycle` names a file rather than a shipped lifecycle."""
    return "/" in name or name.endswith((".yaml", ".yml"))


def find_lifecycle(resolved: ResolvedSession) -> Lifecycle:
    """The lifecycle that the spec names: a shipped one, or a file beside the spec. Raises InvalidFile."""
    name = resolved.lifecycle
    if is_path(name):
        return load_lifecycle(*read(resolved.beside(name)))
    try:
        return shipped_lifecycle(name)
    except KeyError:
        hint = suggestion(name, shipped_lifecycles()) or "a file of your own needs a path, such as ./own.yaml"
        path = ("spec", "lifecycle")
        raise InvalidFile([resolved.fault(path, f"there is no lifecycle `{name}`", hint)]) from None


def lifecycle_faults(lifecycle: Lifecycle) -> list[Fault]:
    """What the analysis finds, errors and warnings, in the file's order."""
    return [finding.fault(lifecycle.file) for finding in analyse(lifecycle, VOCABULARY)]


def executes(lifecycle: Lifecycle) -> bool:
    """True for sessions that run one command, which the launcher tells the guest over the channel."""
    return any(state.invoke == "session.exec" for state in lifecycle.states.values())


def reaccepts(lifecycle: Lifecycle) -> bool:
    """Whether a session along it waits for a guest whose channel is lost."""
    return any(state.invoke == "channel.reaccept" for state in lifecycle.states.values())


def examine(resolved: ResolvedSession) -> tuple[Lifecycle, list[Fault]]:
    """The spec's lifecycle with the spec's own deadlines, and all that is wrong with it, warnings too.

    Raises InvalidFile where there is no lifecycle to look at.
    """
    lifecycle = find_lifecycle(resolved)
    waiting = [state.name for state in lifecycle.states.values() if not state.final]
    faults = lifecycle_faults(lifecycle) + [
        resolved.fault(
            ("spec", "timeouts", state),
            f"the lifecycle `{lifecycle.name}` has no state `{state}` that could time out",
            suggestion(state, waiting) or f"its states are {', '.join(waiting)}",
        )
        for state in resolved.timeouts
        if state not in waiting
    ]
    if executes(lifecycle) and not resolved.workbench.args:
        message = f"the lifecycle `{lifecycle.name}` runs a command, and there is none"
        hint = 'name one, such as ["sh", "-c", "ls"]'
        faults.append(resolved.fault(("spec", "workbench", "args"), message, hint))
    return with_deadlines(lifecycle, VOCABULARY, resolved.timeouts, 1.0), faults
