"""Everything that can happen in a lifecycle, as a finite graph.

A node is a state together with all that later decisions and proofs depend on: whether a failure was
remembered, whether a goal was passed, what is held, and the counters. Verdict and counters are exact; what an
event's data say is not known, so a guard on them counts as "may be either". Nodes are found breadth first,
hence the path to each is a shortest one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from kenaz_engine.lifecycle.findings import Step
from kenaz_engine.lifecycle.model import REQUESTS, Arm, Guard, Lifecycle, State
from kenaz_engine.lifecycle.vocabulary import Activity, Vocabulary

NO: Final = 0
MAYBE: Final = 1
SURE: Final = 2
LOST: Final = 3
"""How a resource is held. A lost one is gone and raises nothing more, but is still to be released."""

DEFECT: Final = "internal.error"
"""A defect of the engine, told as an event. It may arise in every state; unhandled it becomes an `abort`."""

Held = tuple[int, ...]

LIMIT: Final = 20_000
"""Nodes after which exploration gives up: about a second. The shipped lifecycles have less than 200."""


class Node(NamedTuple):
    """A state as one stands in it. `held` and `counters` follow the order of Product's names; what the
    state's own activity acquires counts as maybe held."""

    state: str
    failed: bool
    goal: bool
    held: Held
    counters: tuple[int, ...]


class Edge(NamedTuple):
    """An event that leads from one node to another. `nth` counts the event's arms from 0; `before` is what is
    held on entering, before the new activity begins. Without `arm` the event was ignored, but something was
    lost by it."""

    event: str
    arm: Arm | None
    nth: int
    before: Held
    target: Node


@dataclass(slots=True)
class Product:
    """The graph. `edges` holds every node, in order of distance; `arises` the first node of each state in
    which an event can arise. `complete` is False when LIMIT was reached."""

    resources: tuple[str, ...]
    edges: dict[Node, list[Edge]] = field(default_factory=dict)
    parents: dict[Node, tuple[Node, Edge]] = field(default_factory=dict)
    arises: dict[str, dict[str, Node]] = field(default_factory=dict)
    complete: bool = True

    def path(self, node: Node) -> tuple[Step, ...]:
        """A shortest path from the initial state to `node`."""
        steps: list[Step] = []
        while node in self.parents:
            node, edge = self.parents[node]
            steps.append(step(node, edge))
        return tuple(reversed(steps))

    def onward(
        self, start: Node, wanted: Callable[[Node], bool], within: Container[Node] | None = None
    ) -> tuple[Step, ...]:
        """A shortest path from `start`, through `within`, to a node that is wanted. There must be one."""
        ways: dict[Node, tuple[Node, Edge] | None] = {start: None}
        queue = deque([start])
        while not wanted(node := queue.popleft()):
            for edge in self.edges[node]:
                if edge.target not in ways and (within is None or edge.target in within):
                    ways[edge.target] = (node, edge)
                    queue.append(edge.target)
        steps: list[Step] = []
        while (way := ways[node]) is not None:
            node, edge = way
            steps.append(step(node, edge))
        return tuple(reversed(steps))

    def leading_to(self, wanted: Callable[[Node], bool]) -> set[Node]:
        """The nodes that are wanted, and all from which one of them can be reached."""
        sources: dict[Node, list[Node]] = {}
        for node, edges in self.edges.items():
            for edge in edges:
                sources.setdefault(edge.target, []).append(node)
        found = set(filter(wanted, self.edges))
        queue = deque(found)
        while queue:
            for node in sources.get(queue.popleft(), ()):
                if node not in found:
                    found.add(node)
                    queue.append(node)
        return found


def step(node: Node, edge: Edge) -> Step:
    """An edge as people see it."""
    if edge.arm is None:
        return Step(node.state, edge.event, edge.target.state, ignored=True)
    return Step(node.state, edge.event, edge.target.state, edge.arm.when, edge.arm.line)


def explore(lifecycle: Lifecycle, vocabulary: Vocabulary, activities: Mapping[str, Activity]) -> Product:
    """Explores a lifecycle whose targets all exist. `activities` holds the activity of each state that has a
    known one."""
    return _Explorer(lifecycle, vocabulary, activities).run()


class _Explorer:
    def __init__(
        self, lifecycle: Lifecycle, vocabulary: Vocabulary, activities: Mapping[str, Activity]
    ) -> None:
        self._lifecycle = lifecycle
        self._activities = activities
        resources = vocabulary.resources
        self._index = {name: i for i, name in enumerate(resources)}
        self._raised = [(i, sorted(resource.raises)) for i, resource in enumerate(resources.values())]
        self._lost_by = {
            event: [self._index[name] for name in vocabulary.lost_with(resource.name)]
            for resource in resources.values()
            for event in resource.loses
        }
        self._bounds = _bounds(lifecycle)
        self._counter = {name: i for i, name in enumerate(self._bounds)}
        self._own_events = {name: _own_events(state) for name, state in lifecycle.states.items()}
        self._product = Product(tuple(resources))

    def run(self) -> Product:
        product = self._product
        nothing: Held = (NO,) * len(self._index)
        first = self._enter(self._lifecycle.initial, False, False, nothing, (0,) * len(self._bounds))
        product.edges[first] = []
        queue = deque([first])
        while queue:
            node = queue.popleft()
            if len(product.edges) > LIMIT:
                product.complete = False
                break
            found = product.edges[node]
            found.extend(self._edges(node))
            for edge in found:
                if edge.target not in product.edges:
                    product.edges[edge.target] = []
                    product.parents[edge.target] = (node, edge)
                    queue.append(edge.target)
        return product

    def _enter(self, name: str, failed: bool, goal: bool, held: Held, counters: tuple[int, ...]) -> Node:
        """The node in which one stands once the state's activity has begun."""
        activity = self._activities.get(name)
        if activity is not None:
            # What is needed is taken for held from here on: where it was not, that is one finding, not many.
            needs, made = activity.needs, activity.acquires | activity.replaces
            held = tuple(
                MAYBE if r in made else SURE if r in needs else h
                for r, h in zip(self._index, held, strict=True)
            )
        goal = goal or self._lifecycle.states[name].goal
        return Node(name, failed, goal, held, counters)

    def _edges(self, node: Node) -> Iterator[Edge]:
        state = self._lifecycle.states[node.state]
        first = self._product.arises.setdefault(node.state, {})
        for event in self._arising(node):
            first.setdefault(event, node)
            after = self._after(node, event)
            arms = self._lifecycle.arms(state, event)
            for index in self._possible(arms, node):
                arm = arms[index]
                counters = self._counted(node.counters, arm)
                failed = node.failed or bool(arm.fail)
                yield Edge(
                    event, arm, index, after, self._enter(arm.target, failed, node.goal, after, counters)
                )
            if not arms and event in self._lost_by and after != node.held:
                yield Edge(event, None, 0, after, node._replace(held=after))

    def _arising(self, node: Node) -> Iterator[str]:
        own = self._own_events[node.state]
        yield from own
        if own:
            for i, events in self._raised:
                if node.held[i] in (MAYBE, SURE):
                    yield from events

    def _possible(self, arms: tuple[Arm, ...], node: Node) -> Iterator[int]:
        """The arms that can be the first to match in `node`."""
        refused: list[Guard] = []
        for index, arm in enumerate(arms):
            guard = arm.when
            if guard is None:
                yield index
                return
            if guard.kind == "data":
                if not any(same(guard, other) for other in refused):
                    yield index
                    refused.append(guard)
            elif self._holds(guard, node):
                yield index
                return

    def _holds(self, guard: Guard, node: Node) -> bool:
        if guard.kind == "verdict":
            return bool(guard.value == ("failure" if node.failed else "success"))
        return bool(node.counters[self._counter[guard.key]] < guard.value)

    def _counted(self, counters: tuple[int, ...], arm: Arm) -> tuple[int, ...]:
        """A counter stops at the highest bound that anything asks for: beyond it no guard can tell."""
        i = self._counter.get(arm.count)
        if i is None or counters[i] >= self._bounds[arm.count]:
            return counters
        return (*counters[:i], counters[i] + 1, *counters[i + 1 :])

    def _after(self, node: Node, event: str) -> Held:
        """What is held when `event` has ended the activity of `node`."""
        held = node.held
        activity = self._activities.get(node.state)
        if activity is not None:
            if activity.releases_all:
                if event in ("done", "error", "timeout"):
                    return (NO,) * len(held)
                held = tuple(MAYBE if h == SURE else h for h in held)
            elif event == "done" and (made := activity.acquires | activity.replaces):
                held = tuple(
                    SURE if h == MAYBE and r in made else h for r, h in zip(self._index, held, strict=True)
                )
        if (lost := self._lost_by.get(event)) is not None:
            held = tuple(LOST if i in lost and h != NO else h for i, h in enumerate(held))
        return held


def same(guard: Guard, other: Guard) -> bool:
    """Whether two guards always agree. YAML's `1` and `true` are two things, Python's are equal."""
    return guard == other and type(guard.value) is type(other.value)


def _bounds(lifecycle: Lifecycle) -> dict[str, int]:
    """The highest bound that a guard sets on each counter."""
    bounds: dict[str, int] = {}
    tables = [lifecycle.any, *(state.on for state in lifecycle.states.values())]
    for arm in (arm for table in tables for arms in table.values() for arm in arms):
        if arm.when is not None and arm.when.kind == "below":
            bounds[arm.when.key] = max(bounds.get(arm.when.key, 0), arm.when.value)
    return bounds


def _own_events(state: State) -> tuple[str, ...]:
    """What can arise in a state whatever is held."""
    if state.final:
        return ()
    return (
        "done",
        "error",
        *(("timeout",) if state.timeout is not None else ()),
        *(("idle",) if state.idle is not None else ()),
        *REQUESTS,
        DEFECT,
    )


def components(product: Product) -> Iterator[list[Node]]:
    """The strongly connected components, each after all that it leads to (Tarjan, without recursion)."""
    order: dict[Node, int] = {}
    low: dict[Node, int] = {}
    stack: list[Node] = []
    open_nodes: set[Node] = set()
    for root in product.edges:
        if root in order:
            continue
        work = [(root, iter(product.edges[root]))]
        order[root] = low[root] = len(order)
        stack.append(root)
        open_nodes.add(root)
        while work:
            node, edges = work[-1]
            for edge in edges:
                target = edge.target
                if target not in order:
                    order[target] = low[target] = len(order)
                    stack.append(target)
                    open_nodes.add(target)
                    work.append((target, iter(product.edges[target])))
                    break
                if target in open_nodes:
                    low[node] = min(low[node], order[target])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == order[node]:
                    component = [stack.pop()]
                    while component[-1] != node:
                        component.append(stack.pop())
                    open_nodes.difference_update(component)
                    yield component
