"""The simplest script that still breaks a law in the same way, and its file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from kenaz_engine.lifecycle.model import Lifecycle
from kenaz_engine.lifecycle.vocabulary import Vocabulary
from kenaz_engine.replay.explore import Found
from kenaz_engine.replay.laws import Breach
from kenaz_engine.replay.scenario import to_yaml
from kenaz_engine.replay.script import EVERY, WORK, Cue, Script
from kenaz_engine.replay.stage import Stage
from kenaz_engine.session.vocabulary import VOCABULARY


def shrink(lifecycle: Lifecycle, found: Found, vocabulary: Vocabulary = VOCABULARY) -> Found:
    """The same breach from the simplest script that can be had by leaving things out, one after the other."""
    stage = Stage(lifecycle, vocabulary)
    shortest = _again(stage, found.script, found) or found
    better: Found | None = shortest
    while better is not None:
        shortest = better
        tried = (_again(stage, script, found) for script in _simpler(shortest.script))
        better = next((again for again in tried if again is not None), None)
    return shortest


def _again(stage: Stage, script: Script, found: Found) -> Found | None:
    """What the script shows of the same breach, if it does."""
    played = stage.play(script)
    same = [b for b in played.breaches if (b.law, b.state) == (found.breach.law, found.breach.state)]
    events = sum(record["kind"] == "event" for record in played.records)
    return Found(same[0], script, found.world, events) if same else None


def _simpler(script: Script) -> Iterator[Script]:
    """Every script with one thing less in it."""
    cues = script.cues
    for index, cue in enumerate(cues):
        yield replace(script, cues=(*cues[:index], *cues[index + 1 :]))
        for less in _less(cue):
            yield replace(script, cues=(*cues[:index], less, *cues[index + 1 :]))
    if script.opposite:
        yield replace(script, opposite=False)
    if script.work != WORK:
        yield replace(script, work=WORK)


def _less(cue: Cue) -> Iterator[Cue]:
    if cue.nth == EVERY:
        yield replace(cue, nth=1)
    if cue.what == "abort-twice":
        yield replace(cue, what="abort")
    if cue.after and cue.at:
        yield replace(cue, after=0.0)
    if cue.data:
        yield replace(cue, data=())


def scenario_of(found: Found, name: str, lifecycle: str) -> str:
    """The breach as the file of a scenario that fails as long as the lifecycle allows it."""
    breach: Breach = found.breach
    return to_yaml(name, lifecycle, found.script, comment=f"Found by explore. {breach}")
