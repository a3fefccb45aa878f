"""What is wrong with a lifecycle by a path that shows it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from kenaz_engine.lifecycle.analysis.text import OF_A_STATE, Text, hidden_by
from kenaz_engine.lifecycle.findings import Finding, Step, route
from kenaz_engine.lifecycle.model import Arm
from kenaz_engine.lifecycle.product import DEFECT, LOST, NO, SURE, Edge, Held, Node, Product, components, step


class Graph:
    """A lifecycle beside its product graph."""

    def __init__(self, text: Text, product: Product) -> None:
        self._text = text
        self._lifecycle = text.lifecycle
        self._states = text.lifecycle.states
        self._product = product

    def findings(self) -> Iterator[Finding]:
        yield from self._unhandled()
        if None not in self._text.misspelt.values():
            yield from self._needs()
            yield from self._leaks()
        yield from self._verdicts()
        yield from self._unmerited()
        yield from self._cycles()
        # What follows says that something never happens: only a whole graph can tell.
        if not self._product.complete:
            yield Finding(
                "KL030",
                "",
                "",
                0,
                "there are too many combinations of states, counters and resources to prove anything",
                "lower the bounds of the counters, or use fewer of them",
            )
            return
        yield from self._unreached()
        yield from self._untaken()
        if None not in self._text.misspelt.values():
            yield from self._never_arising()

    def _enterings(self) -> Iterator[tuple[Node, Edge]]:
        """Every edge that enters a state, nearest first."""
        for node, edges in self._product.edges.items():
            for edge in edges:
                if edge.arm is not None:
                    yield node, edge

    def _firsts(
        self, wrong: Callable[[Node, Edge], bool]
    ) -> Iterator[tuple[Node, Edge, Arm, tuple[Step, ...]]]:
        """The first edge of each transition that is wrong, with the path through it."""
        seen: set[tuple[str, str, int]] = set()
        for node, edge in self._enterings():
            key = (node.state, edge.event, edge.nth)
            if key not in seen and wrong(node, edge):
                seen.add(key)
                assert edge.arm is not None
                yield node, edge, edge.arm, (*self._product.path(node), step(node, edge))

    def _unhandled(self) -> Iterator[Finding]:
        for name, events in self._product.arises.items():
            state = self._states[name]
            for event, node in events.items():
                if event in (*OF_A_STATE, DEFECT) or event in state.ignore:
                    continue
                if self._lifecycle.arms(state, event):
                    continue
                yield Finding(
                    "KL016",
                    name,
                    event,
                    state.line,
                    f"`{event}` can arise here and is neither handled nor ignored",
                    "add it under `on`, or to `ignore` where it means nothing",
                    self._product.path(node),
                    under="",
                )

    def _needs(self) -> Iterator[Finding]:
        def unmet(target: str, held: Held) -> list[str]:
            activity = self._text.activities.get(target)
            needs = activity.needs if activity is not None else frozenset()
            resources = zip(self._product.resources, held, strict=True)
            return [_described(name, h) for name, h in resources if name in needs and h != SURE]

        def finding(
            state: str, event: str, target: str, held: Held, line: int, path: tuple[Step, ...]
        ) -> Finding:
            activity = self._text.activities[target].name
            message = f"`{target}` runs {activity}, but {_listed(unmet(target, held))}"
            mend = "first pass, on `done`, through what acquires it"
            return Finding("KL018", state, event, line, message, mend, path)

        first = self._states[self._lifecycle.initial]
        nothing: Held = (NO,) * len(self._product.resources)
        if unmet(first.name, nothing):
            yield finding(first.name, "", first.name, nothing, first.line, ())
        for node, edge, arm, path in self._firsts(
            lambda _, edge: bool(unmet(edge.target.state, edge.before))
        ):
            yield finding(node.state, edge.event, arm.target, edge.before, arm.line, path)

    def _leaks(self) -> Iterator[Finding]:
        def leaks(_: Node, edge: Edge) -> bool:
            return bool(self._states[edge.target.state].final) and any(edge.before)

        for node, edge, arm, path in self._firsts(leaks):
            held = [name for name, h in zip(self._product.resources, edge.before, strict=True) if h != NO]
            yield Finding(
                "KL019",
                node.state,
                edge.event,
                arm.line,
                f"`{arm.target}` ends the session while {_listed(held)} may still be held",
                "first pass through a state that releases everything",
                path,
            )

    def _verdicts(self) -> Iterator[Finding]:
        def contradicts(_: Node, edge: Edge) -> bool:
            final = self._states[edge.target.state].final
            return final is not None and (final == "failure") != edge.target.failed

        for node, edge, arm, path in self._firsts(contradicts):
            failed = edge.target.failed
            yield Finding(
                "KL029",
                node.state,
                edge.event,
                arm.line,
                f"`{arm.target}` says {self._states[arm.target].final}, but on this path the session "
                + ("has failed" if failed else "has not failed"),
                "guard it with `when: {verdict: success}`" if failed else "add `fail: text` on the way",
                path,
            )

    def _unmerited(self) -> Iterator[Finding]:
        """Success without a goal. The transition that gives the goal up is to blame, not the last one."""
        if not any(state.goal for state in self._states.values()):
            return

        def is_unmerited(node: Node) -> bool:
            return self._states[node.state].final == "success" and not node.failed and not node.goal

        leading = self._product.leading_to(is_unmerited)
        hopeful = self._text.to_goal

        def gives_up(node: Node, edge: Edge) -> bool:
            if edge.target not in leading:
                return False
            if self._lifecycle.initial not in hopeful:
                return is_unmerited(edge.target)
            return node.state in hopeful and edge.target.state not in hopeful

        for node, edge, arm, path in self._firsts(gives_up):
            onward = self._product.onward(edge.target, is_unmerited)
            yield Finding(
                "KL028",
                node.state,
                edge.event,
                arm.line,
                f"`{edge.event}` leads past the goal, and the session still ends in success",
                "add `fail: text` to the transition",
                (*path, *onward),
            )

    def _cycles(self) -> Iterator[Finding]:
        """Cycles, once for each sequence of events; those without a way to a final state are traps."""
        ending = self._product.leading_to(lambda node: self._states[node.state].final is not None)
        order = {node: i for i, node in enumerate(self._product.edges)}
        entries: dict[Node, tuple[Step, ...]] = {}
        for component in components(self._product):
            entry = min(component, key=order.__getitem__)
            if cycle := self._shortest_cycle(entry, frozenset(component)):
                entries[entry] = cycle
        seen: set[tuple[Step, ...]] = set()
        for entry in sorted(entries, key=order.__getitem__):
            path = (*self._product.path(entry), *entries[entry])
            cycle = self._turned(entries[entry])
            if cycle in seen:
                continue
            seen.add(cycle)
            last = cycle[-1]
            if entry in ending or not self._product.complete:
                yield Finding(
                    "KL022",
                    last.state,
                    last.event,
                    last.line,
                    f"{route(cycle)} can go round for ever",
                    "bound it: `count: name` on a transition of the cycle and `when: {below: {name: 5}}`",
                    path,
                )
            else:
                yield Finding(
                    "KL011",
                    entry.state,
                    "",
                    self._states[entry.state].line,
                    "no final state can be reached from here",
                    "lead some transition out of the cycle",
                    path,
                )

    def _shortest_cycle(self, entry: Node, component: frozenset[Node]) -> tuple[Step, ...]:
        cycles = [
            (step(entry, edge), *self._product.onward(edge.target, entry.__eq__, component))
            for edge in self._product.edges[entry]
            if edge.target in component
        ]
        return min(cycles, key=len, default=())

    def _turned(self, cycle: tuple[Step, ...]) -> tuple[Step, ...]:
        """The cycle from its earliest state on, so that its last step is the one that goes back."""
        order = list(self._product.arises)
        first = min(range(len(cycle)), key=lambda i: order.index(cycle[i].state))
        return (*cycle[first:], *cycle[:first])

    def _unreached(self) -> Iterator[Finding]:
        reached = {node.state for node in self._product.edges}
        for state in self._states.values():
            if state.name not in reached:
                yield Finding(
                    "KL010",
                    state.name,
                    "",
                    state.line,
                    f"no path leads to `{state.name}`",
                    "lead a transition to it, or remove it",
                )

    def _untaken(self) -> Iterator[Finding]:
        taken = {
            (self._owner(node.state, edge.event), edge.event, edge.nth) for node, edge in self._enterings()
        }
        arising = {
            (self._owner(name, event), event)
            for name, events in self._product.arises.items()
            for event in events
        }
        for owner, event in sorted(arising):
            arms = self._states[owner].on.get(event, ()) if owner else self._lifecycle.any.get(event, ())
            for index, arm in enumerate(arms):
                if (owner, event, index) in taken or hidden_by(arms, index) is not None:
                    continue
                yield Finding(
                    "KL024",
                    owner,
                    event,
                    arm.line,
                    f"on no path is the transition to `{arm.target}` taken",
                    "remove it, or change its guard or one above it",
                )

    def _owner(self, state: str, event: str) -> str:
        return state if event in self._states[state].on or event in self._states[state].ignore else ""

    def _never_arising(self) -> Iterator[Finding]:
        used: set[str] = set()
        for name, events in self._product.arises.items():
            state = self._states[name]
            used |= {event for event in events if event not in state.on and event not in state.ignore}
            for event in sorted({*state.on, *(state.ignore - {*OF_A_STATE})} - events.keys()):
                if not self._text.knows(event):
                    continue
                if event in state.on:
                    yield self._cannot_arise(name, event, state.on[event][0].line)
                else:
                    yield replace(self._cannot_arise(name, event, state.line), under="ignore")
        for event, arms in self._lifecycle.any.items():
            if event not in used and self._text.knows(event) and event not in OF_A_STATE:
                yield self._cannot_arise("", event, arms[0].line)

    def _cannot_arise(self, owner: str, event: str, line: int) -> Finding:
        where = f"in `{owner}`" if owner else "in any state that leaves it to `any`"
        return Finding("KL015", owner, event, line, f"`{event}` cannot arise {where}", "remove it")


def _described(resource: str, held: int) -> str:
    states = {NO: "is not held", LOST: "is lost"}
    return f"the {resource} {states.get(held, 'may not be held')}"


def _listed(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"
