"""The same by code, where one file per case would be many."""

import drivers
import engine
import pytest


@pytest.mark.parametrize("state", ["booting", "connecting", "working"])
def test_a_panic_is_killed_and_the_verdict_says_so(kenaz_simulate, state):
    result = kenaz_simulate(
        {
            "lifecycle": "../lifecycles/careful.yaml",
            "script": [{"at": f"{state}/finish", "event": "guest.panic"}],
        }
    )
    assert result.ok, "\n".join(result.failures)
    assert "panicked" in result.outcome.verdict
    assert [step.state for step in result.path][-3:] == ["killing", "releasing", "failed"]


def test_other_folders_of_these_names_are_this_repository_s_own():
    assert engine.CYLINDERS == 4
    assert drivers.LICENSED == ["Ada", "Grace"]
