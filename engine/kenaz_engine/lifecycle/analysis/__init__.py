"""What can be proven wrong with a lifecycle before it runs, each with a shortest path that shows it.

`text` looks at what each state says, `graph` at what can happen, `bound` at how long an abort can take. The
rules are in docs/reference/lifecycle.md, the findings in docs/reference/findings.md.
"""

from __future__ import annotations

from kenaz_engine.lifecycle.analysis.bound import AbortBound, bound_of
from kenaz_engine.lifecycle.analysis.graph import Graph
from kenaz_engine.lifecycle.analysis.text import Text
from kenaz_engine.lifecycle.findings import Finding
from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.product import explore
from kenaz_engine.lifecycle.vocabulary import Vocabulary

__all__ = ["AbortBound", "abort_bound", "analyse"]


def analyse(lifecycle: Lifecycle, vocabulary: Vocabulary) -> list[Finding]:
    """Every finding, in the order of the file.

    The lifecycle must be one that the loader lets pass: every target is a state, no list of transitions is
    empty, every state that is not final has an activity and a deadline.
    """
    text = Text(lifecycle, vocabulary)
    graph = Graph(text, explore(lifecycle, vocabulary, text.activities))
    found = [*text.findings(), *graph.findings()]
    return sorted(found, key=lambda f: (f.line, f.code))


def abort_bound(lifecycle: Lifecycle, vocabulary: Vocabulary) -> AbortBound:
    """The most seconds from an `abort`, wherever it comes, to the end: the clean-up and the deadline of every
    state still to pass, and the sweep."""
    text = Text(lifecycle, vocabulary)
    return bound_of(explore(lifecycle, vocabulary, text.activities), lifecycle.states)
