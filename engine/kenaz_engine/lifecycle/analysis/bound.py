"""How long an abort can take."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from kenaz_engine.lifecycle.findings import Step
from kenaz_engine.lifecycle.model import State
from kenaz_engine.lifecycle.product import Edge, Node, Product, components, step

SWEEP = 10.0
"""Seconds that the sweep of the ledger after a final state may take."""


@dataclass(frozen=True, slots=True)
class AbortBound:
    """The most seconds that may pass from an `abort` to the end of the session, and the path that takes them.

    Infinite where some path never ends or some wait has no deadline.
    """

    seconds: float
    path: tuple[Step, ...]


def bound_of(product: Product, states: Mapping[str, State]) -> AbortBound:
    """The bound over every place where an abort can come. One that is ignored changes nothing: what remains
    of the session then counts from that state's own deadline."""
    longest: dict[Node, _Longest] = {}
    for component in components(product):
        for node in component:
            longest[node] = _longest_from(node, states[node.state], product, longest)
    worst = AbortBound(SWEEP, ())
    for node, edges in product.edges.items():
        state = states[node.state]
        if state.final:
            continue
        aborts = [edge for edge in edges if edge.event == "abort"]
        for edge in aborts:
            seconds = state.cleanup + longest[edge.target].seconds
            if seconds > worst.seconds:
                worst = AbortBound(seconds, tuple(_steps(node, edge, longest)))
        if not aborts and longest[node].seconds > worst.seconds:
            worst = AbortBound(longest[node].seconds, tuple(_steps(node, longest[node].edge, longest)))
    return worst


@dataclass(frozen=True, slots=True)
class _Longest:
    """The most seconds from the entry into a node to the end, and the edge that begins that way."""

    seconds: float
    edge: Edge | None


def _longest_from(node: Node, state: State, product: Product, longest: Mapping[Node, _Longest]) -> _Longest:
    if state.final:
        return _Longest(SWEEP, None)
    stay = (math.inf if state.timeout is None else state.timeout) + state.cleanup
    best = _Longest(-1.0, None)
    for edge in product.edges[node]:
        # A target without a value yet lies on a cycle: that may never end.
        onward = longest[edge.target].seconds if edge.target in longest else math.inf
        seconds = onward + stay if edge.arm else onward
        if seconds > best.seconds:
            best = _Longest(seconds, edge)
    return best if best.edge else _Longest(math.inf, None)


def _steps(node: Node, edge: Edge | None, longest: Mapping[Node, _Longest]) -> Iterator[Step]:
    seen: set[Node] = set()
    while edge is not None and node not in seen:
        seen.add(node)
        yield step(node, edge)
        node = edge.target
        edge = longest[node].edge
