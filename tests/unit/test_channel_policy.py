"""Which tools a session may use."""

import pytest

from kenaz_engine.channel.policy import ToolPolicy, Verdict, matches


@pytest.mark.parametrize(
    ("pattern", "name", "expected"),
    [
        ("fs.read", "fs.read", True),
        ("fs.read", "fs.reads", False),
        ("fs.*", "fs.read", True),
        ("fs.*", "fs.dir.list", True),
        ("fs.*", "fs.", True),
        ("fs.*", "fs", False),
        ("fs.*", "xfs.read", False),
        ("*", "anything.at/all", True),
        ("*.read", "fs.read", True),
        ("*.read", "fs.reader", False),
        ("fs.*.list", "fs.a.b.list", True),
        ("fs.*.list", "fs.list", False),
        ("a*b*c", "a-b-c", True),
        ("a*b*c", "abbc", True),
        ("a*b*c", "acb", False),
        ("ab*bc", "abc", False),
        ("ab*x*bc", "abc", False),
        ("a**b", "ab", True),
        ("fs.r.ad", "fs.read", False),
    ],
)
def test_patterns(pattern: str, name: str, expected: bool) -> None:
    assert matches(pattern, name) is expected


def test_deny_wins_and_nothing_is_allowed_by_itself() -> None:
    policy = ToolPolicy(allow=["fs.*", "web.search"], deny=["fs.delete"])
    assert policy.decide("fs.read") == Verdict(True, "fs.*")
    assert policy.decide("fs.delete") == Verdict(False, "fs.delete")
    assert policy.decide("web.fetch") == Verdict(False, "")
    assert ToolPolicy().decide("fs.read") == Verdict(False, "")


@pytest.mark.parametrize("pattern", ["", "fs read", "fs.?", "x" * 129, "fs.\n"])
def test_a_pattern_that_no_tool_could_match_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match="not a pattern of tool names"):
        ToolPolicy(deny=[pattern])


def test_a_hostile_name_costs_no_more_than_its_length() -> None:
    """With backtracking this would not end."""
    assert not matches("*a" * 60 + "b", "a" * 127)
