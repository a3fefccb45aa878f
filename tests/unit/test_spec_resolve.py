from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from kenaz_engine.spec.faults import InvalidFile, Place
from kenaz_engine.spec.resolve import ResolvedSession, describe, load_session

HEAD = "apiVersion: kenaz.dev/v1\nkind: Session\nmetadata: {name: hello}\n"
EXAMPLES = sorted((Path(__file__).parents[2] / "specs" / "sessions").glob("*.yaml"))


def load(
    text: str,
    *overrides: str,
    session_id: str | None = None,
    environment: Mapping[str, str] | None = None,
    file: str = "s.yaml",
) -> ResolvedSession:
    return load_session(
        text,
        file,
        overrides=overrides,
        session_id=session_id,
        environment=environment or {},
        randomness=lambda count: bytes(range(count)),
    )


def refused(text: str, *overrides: str, session_id: str | None = None) -> list[str]:
    with pytest.raises(InvalidFile) as caught:
        load(text, *overrides, session_id=session_id)
    return [str(fault) for fault in caught.value.faults]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_the_examples_are_valid(example: Path) -> None:
    session = load_session(example.read_bytes(), example.name, environment={"API_KEY": "k"})
    assert session.name == example.stem


def test_everything_has_a_default() -> None:
    session = load(HEAD)
    assert session.id == "hello-abcdef"
    assert (session.lifecycle, session.driver, session.image, session.network) == (
        "standard",
        "auto",
        "demo",
        "none",
    )
    assert (session.machine.cpus, session.machine.memory, session.machine.disk) == (1, 512 << 20, 2 << 30)
    assert session.tools.allow == ()
    assert session.channel.limits.frame == 4 << 20
    assert session.channel.limits.handshake == 10.0
    assert (session.timeouts, session.driver_options, session.workbench.env) == ({}, {}, {})
    assert session.origins["spec.machine.cpus"] == "default"
    assert session.origins["metadata.name"] == "s.yaml:3:18"
    assert session.origins["metadata.id"] == "random"
    assert session.secrets == frozenset()


def test_a_default_is_never_shared() -> None:
    labels = load(HEAD).labels
    assert isinstance(labels, dict)
    labels["a"] = "b"
    assert load(HEAD).labels == {}


def test_where_the_id_comes_from() -> None:
    with_id = HEAD.replace("hello}", "hello, id: mine}")
    assert load(with_id).id == "mine"
    assert load(with_id).origins["metadata.id"] == "s.yaml:3:29"
    session = load(with_id, session_id="theirs")
    assert (session.id, session.origins["metadata.id"]) == ("theirs", "--session-id")
    assert refused(HEAD, session_id="No") == [
        "--session-id: `No` is not an id of 1 to 63 lower-case letters, digits and hyphens"
    ]


def test_a_random_id_is_never_too_long() -> None:
    session = load(HEAD.replace("hello", "a" * 55 + "-b-c-d-e"))
    assert session.id == "a" * 55 + "-abcdef"
    assert len(load(HEAD.replace("hello", "a" * 63)).id) == 63


def test_overrides() -> None:
    session = load(
        HEAD + "spec: {machine: {cpus: 2, memory: 1GiB}}\n",
        "spec.machine.cpus=4",
        "spec.tools.allow=[fs.*]",
        "spec.workbench.build=2026.10",
        "spec.workbench.env.PORT=8080",
        "spec.workbench.env.WORDS='a",
        "spec.driverOptions.qemu={accel: tcg}",
        "spec.driverOptions.qemu.extra.deep=true",
        "spec.timeouts.booting=5s",
        "spec.image=",
        "spec.image='demo'",
        "metadata.labels.team=a=b",
    )
    assert (session.machine.cpus, session.machine.memory) == (4, 1 << 30)
    assert session.tools.allow == ("fs.*",)
    assert session.workbench.build == "2026.10"
    assert session.workbench.env == {"PORT": "8080", "WORDS": "'a"}
    assert session.driver_options == {"qemu": {"accel": "tcg", "extra": {"deep": True}}}
    assert session.timeouts == {"booting": 5.0}
    assert session.image == "demo"
    assert session.labels == {"team": "a=b"}
    for path in ("spec.machine.cpus", "spec.driverOptions.qemu.accel", "spec.driverOptions.qemu.extra.deep"):
        assert session.origins[path] == "--set"
    assert session.origins["spec.machine.memory"].startswith("s.yaml:")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("spec.machine", "--set spec.machine: is not of the form path=value (--set spec.machine.cpus=4)"),
        ("=1", "--set : is not of the form path=value (--set spec.machine.cpus=4)"),
        (
            "spec.machine.cpu=1",
            "--set spec.machine.cpu: spec.machine.cpu: this key is unknown (did you mean `cpus`?)",
        ),
        ("spec.image.name=1", "--set spec.image.name: spec.image.name: this key is unknown"),
        (
            "spec.machine.cpus=four",
            "--set spec.machine.cpus: spec.machine.cpus: must be a whole number, not a text",
        ),
        ("spec.network=[", "--set spec.network: spec.network: is not valid YAML: "),
        ("spec.machine=1", "--set spec.machine: spec.machine: must be a mapping, not a number"),
    ],
)
def test_a_wrong_override_is_told_as_such(override: str, expected: str) -> None:
    [fault] = refused(HEAD, override)
    assert fault.startswith(expected)


def test_an_override_below_what_is_no_mapping_leaves_that_fault() -> None:
    assert refused(HEAD + "spec: 5\n", "spec.machine.cpus=1") == [
        "s.yaml:4:7: spec: must be a mapping, not a number"
    ]


def test_faults_of_overrides_come_after_those_of_the_file() -> None:
    told = refused(HEAD + "spec: {image: 1, network: x}\n", "spec.channel.port=0")
    assert [line.split(":")[0] for line in told] == ["s.yaml", "s.yaml", "--set spec.channel.port"]


ENV = HEAD + 'spec: {workbench: {env: {A: "x-${env:K}-${env:K}", B: plain-canary}}}\n'


def test_the_environment_is_filled_in_and_marked() -> None:
    session = load(ENV, environment={"K": "canary ${env:K} \\1"})
    assert session.workbench.env["A"] == "x-canary ${env:K} \\1-canary ${env:K} \\1"
    assert session.origins["spec.workbench.env.A"] == "environment K"
    assert session.secrets == {"spec.workbench.env.A"}


def test_values_of_the_environment_appear_nowhere() -> None:
    session = load(ENV, "spec.workbench.env.C=third-canary", environment={"K": "other-canary"})
    assert session.workbench.env["C"] == "third-canary"
    assert describe(session)["workbench"]["env"] == ["A", "B", "C"]
    for text in (json.dumps(describe(session)), repr(session), str(session.origins)):
        assert "canary" not in text


def test_the_description_can_be_loaded_again() -> None:
    """What `plan` prints is what a file would say, but for the environment."""
    text = HEAD + "spec: {timeouts: {a: 90s}, driverOptions: {qemu: {accel: tcg}}, tools: {allow: [a]}}\n"
    described = describe(load(text))
    metadata = {key: described.pop(key) for key in ("id", "name", "labels")}
    described["workbench"]["env"] = {}
    again = {"apiVersion": "kenaz.dev/v1", "kind": "Session", "metadata": metadata, "spec": described}
    assert describe(load(json.dumps(again))) == {
        **metadata,
        **described,
        "workbench": {**described["workbench"], "env": []},
    }


def test_later_faults_find_their_place() -> None:
    session = load(HEAD + "spec:\n  timeouts: {nowhere: 5s}\n  driverOptions: {qemu: {acel: 1}}\n")
    assert session.place("spec", "timeouts", "nowhere") == Place("s.yaml", 5, 23)
    assert session.place("spec", "machine", "cpus") == Place("s.yaml", 5, 3)
    fault = session.fault(("spec", "timeouts", "nowhere"), "there is no such state")
    assert str(fault) == "s.yaml:5:23: spec.timeouts.nowhere: there is no such state"
    options = {"type": "object", "properties": {"accel": {}}, "additionalProperties": False}
    [fault] = session.check_driver_options("qemu", options)
    assert (
        str(fault) == "s.yaml:6:26: spec.driverOptions.qemu.acel: this key is unknown (did you mean `accel`?)"
    )
    assert session.check_driver_options("process", options) == []


def test_paths_are_relative_to_the_file() -> None:
    assert load(HEAD, file="a/b/s.yaml").beside("./x.yaml") == "a/b/x.yaml"
    assert load(HEAD, file="a/s.yaml").beside("/x.yaml") == "/x.yaml"
    assert load(HEAD, file="<stdin>").beside("x.yaml") == "x.yaml"


DIGEST = "sha256:" + "0a" * 32


@pytest.mark.parametrize(
    "image",
    ["demo", "demo:1.2", f"demo@{DIGEST}", "a-b_c.d", "./x.img", "/x y", "a/b", f"https://h/x.zst@{DIGEST}"],
)
def test_images(image: str) -> None:
    assert load(HEAD, f"spec.image='{image}'").image == image


@pytest.mark.parametrize(
    ("image", "words"),
    [
        ("https://h/x.img", "needs its digest"),
        ("https://h/x.img@sha256:0", "needs its digest"),
        (f"http://h/x@{DIGEST}", "cannot be fetched (only https:// is)"),
        ("Demo", "is not an image"),
        ("demo:", "is not an image"),
        ("demo@sha256:0", "is not an image"),
        ("", "must not be empty"),
    ],
)
def test_what_is_no_image(image: str, words: str) -> None:
    [fault] = refused(HEAD, f"spec.image='{image}'")
    assert words in fault


@pytest.mark.parametrize(
    ("allow", "deny", "dead"),
    [
        (["fs.*"], ["fs.delete"], []),
        (["fs.read", "fs.*"], ["fs.*"], [0, 1]),
        (["*"], ["*.*"], []),
        (["a.b*"], ["a.*", "a.b*"], [0]),
        (["a*c"], ["a*b*c"], []),
        (["axb"], ["a.b"], []),
    ],
)
def test_what_is_denied_altogether_need_not_be_allowed(
    allow: Sequence[str], deny: Sequence[str], dead: Sequence[int]
) -> None:
    text = HEAD + f"spec: {{tools: {{allow: {json.dumps(allow)}, deny: {json.dumps(deny)}}}}}\n"
    if not dead:
        assert load(text).tools.allow == tuple(allow)
        return
    told = refused(text)
    assert len(told) == len(dead)
    for fault, index in zip(told, dead, strict=True):
        assert f"spec.tools.allow[{index}]: `{allow[index]}` allows nothing" in fault


def test_whole_numbers_may_be_written_as_floats() -> None:
    session = load(HEAD, "spec.machine.cpus=2.0")
    assert type(session.machine.cpus) is int
