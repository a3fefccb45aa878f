"""docs/reference/vsock-protocol.md says what the code does."""

import re
from pathlib import Path

import pytest

from kenaz_engine.channel import harness_vm, protocol
from kenaz_engine.channel.dialect import HARNESS_VM
from kenaz_engine.channel.framing import DEFAULT_LIMIT, LINE_OUT, LengthPrefixed
from kenaz_engine.channel.policy import ToolPolicy
from kenaz_engine.channel.protocol import Expected, GuestProtocol, Limits, ToGuest, ToHarness
from kenaz_engine.channel.strict_json import DEPTH, DIGITS

REFERENCE = (Path(__file__).parents[2] / "docs/reference/vsock-protocol.md").read_text()


def test_the_states_are_those_of_the_code() -> None:
    assert f"```mermaid\n{protocol.diagram()}\n```" in REFERENCE


def test_the_example_is_what_happens() -> None:
    example: dict[str, list[bytes]] = {"guest": [], "launcher": []}
    for side, block in re.findall(r"```hex (\w+)\n(.*?)```", REFERENCE, re.DOTALL):
        example[side].append(bytes.fromhex(" ".join(line.split("#")[0] for line in block.splitlines())))
    assert len(example["guest"]) == len(example["launcher"]) == 2
    tools = ToolPolicy(allow=["fs.*"], deny=["fs.delete"])
    launcher = GuestProtocol(Expected(session="s-1", token="t0ken", tools=tools))
    framing = LengthPrefixed()
    answers = []
    for data in example["guest"]:
        (payload,) = framing.feed(data)
        actions = launcher.from_guest(payload)
        answers += [framing.encode(a.payload) for a in actions if isinstance(a, ToGuest)]
    assert answers == example["launcher"]


def test_the_example_in_lines_is_what_happens() -> None:
    [block] = re.findall(r"```lines\n(.*?)```", REFERENCE, re.DOTALL)
    limits = Expected("s-1", "t0ken", ToolPolicy(), capabilities=frozenset({"approval"}))
    launcher = HARNESS_VM.talk(limits, {}, None)
    hears = {"guest": launcher.from_guest, "harness": launcher.from_harness}
    said = launcher.begin()
    for line in block.splitlines():
        who, _, rest = line.partition(" > ")
        whom, _, text = rest.partition(" ")
        payload = text.strip().encode()
        words = [action for action in said if isinstance(action, ToGuest | ToHarness)]
        if who == "launcher":
            assert words == [(ToGuest if whom == "guest" else ToHarness)(payload)], line
            said = []
        else:
            assert words == [], line
            said = hears[who](payload)


def test_every_kind_is_in_its_table() -> None:
    for kind in {kind for kinds in protocol._KINDS.values() for kind in kinds} - {"end"}:
        assert re.search(rf"^\|.*`{re.escape(kind)}`", REFERENCE, re.MULTILINE), kind


def test_every_code_is_explained() -> None:
    source = "".join(
        (Path(protocol.__file__).parent / f"{name}.py").read_text()
        for name in ("framing", "strict_json", "protocol", "relay", "harness_vm")
    )
    codes = set(re.findall(r'(?:_Breach|JsonRefused|FramingError)\(\s*"(\w+)"', source))
    codes |= set(harness_vm._MESSAGES) | {"auth_refused", "not_granted"}
    codes |= set(protocol._REFUSALS) | {"already_connected"}
    assert len(codes) > 20
    for code in codes:
        assert f"`{code}`" in REFERENCE, code


def test_every_kind_of_the_other_dialect_is_named() -> None:
    for kind in harness_vm.READS | harness_vm.OURS:
        assert f"`{kind}`" in REFERENCE, kind


@pytest.mark.parametrize(
    "text",
    [
        f"4 MiB ({DEFAULT_LIMIT})",
        f"at most {DEPTH} deep",
        f"at most {DIGITS} characters",
        f"at most {Limits().handshake:g} s pass",
        f"for {Limits().write:g} s has been lost",
        f"to the guest 64 KiB ({LINE_OUT})",
        f"its sender waits too | {Limits().queue} |",
    ],
)
def test_numbers_are_those_of_the_code(text: str) -> None:
    assert text in " ".join(REFERENCE.split())
