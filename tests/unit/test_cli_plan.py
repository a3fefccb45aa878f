"""`plan`, on a driver whose host is made up."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kenaz_drivers.contract import Capabilities, Helper, LaunchPlan, LaunchRequest, Reason
from kenaz_engine.cli.main import main
from kenaz_engine.images.catalog import Located
from kenaz_engine.images.errors import ImageError, ImageMissing
from kenaz_engine.images.policy import Step
from kenaz_engine.session import prepare

Capture = pytest.CaptureFixture[str]

SPEC = """\
apiVersion: kenaz.dev/v1
kind: Session
metadata: {name: hello, labels: {team: demo}}
spec:
  workbench: {env: {KEY: "${env:KENAZ_SECRET}", LANG: C}}
  timeouts: {draining: 3s}
"""


class FakeDriver:
    """A QEMU that is only planned."""

    name: ClassVar[str] = "fake"
    options_schema: ClassVar[dict[str, Any]] = {"type": "object"}
    capabilities = Capabilities(
        usable=True,
        reasons=(Reason(True, "it is here"), Reason(False, "KVM is not: using TCG", "load kvm")),
        arch="x86_64",
        accelerator="tcg",
        deadline_scale=5.0,
        transports=("virtio-serial", "vsock"),
        disk_formats=("qcow2",),
    )

    async def probe(self, arch: str, options: Any) -> Capabilities:
        return self.capabilities

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        return LaunchPlan(
            driver=self.name,
            argv=("/usr/bin/fake vm", "-m", "256", "-append", "a b", "-disk", request.disks[0].path),
            descriptors={3: "qmp"},
            notes=("a note of the plan", "KVM is not: using TCG"),
        )


def located(image: Any) -> Any:
    return Located("demo", "x86_64", "demo", Step.USE, image)


class FakeImage:
    name, tag, digest, root_format = "demo", "1.0", "sha256:00", "raw"
    kernel, initrd, cmdline = Path("/k"), Path("/i"), ""


@pytest.fixture(autouse=True)
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KENAZ_STATE_DIR", "/state")
    monkeypatch.setenv("KENAZ_SECRET", "canary")
    monkeypatch.setattr("kenaz_drivers.registry.driver_names", lambda: ("fake",))
    monkeypatch.setattr("kenaz_engine.session.prepare.load", lambda name: FakeDriver())
    monkeypatch.setattr(prepare, "locate", lambda *_, **__: located(FakeImage()))
    (tmp_path / "hello.yaml").write_text(SPEC)
    return tmp_path


ARGV = [
    "plan",
    "hello.yaml",
    "--set",
    "spec.driver=fake",
    "--session-id",
    "s1",
    "--set",
    "spec.machine.arch=x86_64",
]


def test_plan_shows_what_runs_beside_the_machine(
    capsys: Capture, host: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Helped(FakeDriver):
        def plan(self, request: LaunchRequest) -> LaunchPlan:
            helper = Helper("daemon", ("/bin/daemon", "--socket=/run/a b"), ("/run/a b",), {"LC_ALL": "C"})
            return replace(super().plan(request), helpers=(helper,))

    monkeypatch.setattr("kenaz_engine.session.prepare.load", lambda name: Helped())
    assert main(ARGV) == 0
    assert (
        "\ncommand\n"
        "  # before it, and for as long: daemon\n"
        "  /bin/daemon \\\n"
        "    '--socket=/run/a b'\n"
        "  '/usr/bin/fake vm' \\\n"
    ) in capsys.readouterr().out
    assert main([*ARGV, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["command"]["helpers"] == [
        {
            "name": "daemon",
            "argv": ["/bin/daemon", "--socket=/run/a b"],
            "environment": {"LC_ALL": "C"},
            "sockets": ["/run/a b"],
        }
    ]


def test_plan_shows_everything_and_where_it_comes_from(capsys: Capture, host: Path) -> None:
    assert main([*ARGV, "--set", "spec.channel.transport=vsock"]) == 0
    out, err = capsys.readouterr()
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert err == ""
    assert lines[0] == "session s1"
    for line in (
        "metadata.id s1 --session-id",
        "metadata.labels.team demo hello.yaml:3:40",
        "spec.driver fake --set",
        "spec.machine.cpus 1 default",
        "spec.workbench.env.KEY (hidden) environment KENAZ_SECRET",
        "spec.workbench.env.LANG (hidden) hello.yaml:5:55",
        "spec.tools.allow none default",
        "driver fake: named by --set",
        "fake: usable",
        "ok it is here",
        "no KVM is not: using TCG (load kvm)",
        "accelerator tcg",
        "transport vsock: asked for by the spec",
        "image demo:1.0 sha256:00",
        "resolving at most 30m the lifecycle",
        "connecting at most 7m30s 1m30s x5 under tcg",
        "running no deadline idle at most 30m the lifecycle",
        "draining at most 3s hello.yaml:6:24, instead of 10s",
        "deadlines that wait for the guest are x5 under tcg",
        "a note of the plan",
    ):
        assert line in lines, line
    assert out.count("\n  KVM is not: using TCG\n") == 1
    assert (
        "\ncommand\n"
        "  '/usr/bin/fake vm' \\\n"
        "    -m 256 \\\n"
        "    -append 'a b' \\\n"
        "    -disk /state/sessions/s1/root.qcow2\n"
    ) in out
    assert "canary" not in out
    assert not Path("/state").exists()
    assert [path.name for path in host.iterdir()] == ["hello.yaml"]


def test_plan_as_json(capsys: Capture) -> None:
    assert main([*ARGV, "--json"]) == 0
    out = capsys.readouterr().out
    data = json.loads(out)
    assert data["session"]["id"] == "s1"
    assert data["origins"]["spec.timeouts.draining"] == "hello.yaml:6:24"
    assert data["driver"] == {
        "name": "fake",
        "reason": "named by --set",
        "considered": [
            {
                "name": "fake",
                "usable": True,
                "reasons": [
                    {"ok": True, "text": "it is here", "mend": None},
                    {"ok": False, "text": "KVM is not: using TCG", "mend": "load kvm"},
                ],
            }
        ],
    }
    assert (data["arch"], data["accelerator"], data["isolates"]) == ("x86_64", "tcg", True)
    assert data["transport"]["name"] == "virtio-serial"
    assert data["image"] == {"name": "demo", "tag": "1.0", "digest": "sha256:00"}
    assert data["deadlines"][3] == {
        "state": "connecting",
        "timeout": 450.0,
        "idle": None,
        "origin": "1m30s x5 under tcg",
    }
    assert data["command"]["argv"][1:3] == ["-m", "256"]
    assert data["command"]["descriptors"] == {"3": "qmp"}
    assert data["abortBound"] > 0
    assert "canary" not in out


@pytest.mark.parametrize(("hint", "words"), [("run `make image`", " (run `make image`)"), ("", "")])
def test_a_missing_image_is_shown_and_fails(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, hint: str, words: str
) -> None:
    def missing(*_: Any, **__: Any) -> None:
        raise ImageMissing("it is not on this machine", hint)

    monkeypatch.setattr(prepare, "locate", missing)
    assert main(ARGV) == 3
    out = capsys.readouterr().out
    assert f"demo is missing: it is not on this machine{words}\n" in out
    assert "\ncommand\n  not known without the image\n" in out
    assert main([*ARGV, "--json"]) == 3
    data = json.loads(capsys.readouterr().out)
    assert data["command"] is None
    assert data["image"] == {"name": "demo", "missing": "it is not on this machine", "hint": hint or None}


def test_an_image_that_the_session_fetches_is_no_failure(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = Located("demo", "x86_64", "demo", Step.FETCH)
    monkeypatch.setattr(prepare, "locate", lambda *_, **__: fetched)
    assert main(ARGV) == 0
    assert "demo is not here yet: the session fetches it first" in capsys.readouterr().out
    assert main([*ARGV, "--json"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["image"], data["command"]) == ({"name": "demo", "fetched": False}, None)


def test_a_damaged_image_is_shown_too(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    def damaged(*_: Any, **__: Any) -> None:
        raise ImageError("kernel has 0 bytes")

    monkeypatch.setattr(prepare, "locate", damaged)
    assert main(ARGV) == 3
    assert "demo is missing: kernel has 0 bytes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("accelerator", "isolates", "reason"),
    [
        ("kvm", True, "auto: the first usable one"),
        ("tcg", True, "auto: the first usable one, and none runs guests without emulation"),
        ("none", False, "auto: the last resort, as nothing else is usable"),
    ],
)
def test_why_auto_chose_it(
    capsys: Capture, monkeypatch: pytest.MonkeyPatch, accelerator: str, isolates: bool, reason: str
) -> None:
    chosen = Capabilities(
        True, (), "x86_64", accelerator, 1.0, ("unix",), ("directory",), boots_image=False, isolates=isolates
    )

    async def choose(arch: str, options: Any, unfit: Any) -> Any:
        return FakeDriver(), chosen, (("fake", chosen),)

    monkeypatch.setattr("kenaz_engine.session.prepare.choose", choose)
    assert main(["plan", "hello.yaml"]) == 0
    out = capsys.readouterr().out
    assert f"driver fake: {reason}\n" in out
    assert "none: the driver fake boots no image" in out
    assert main(["plan", "hello.yaml", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["image"] is None


def test_a_bad_file_is_refused(capsys: Capture, host: Path) -> None:
    (host / "hello.yaml").write_text("kind: Session\n")
    assert main(["plan", "hello.yaml"]) == 2
    assert capsys.readouterr().err.startswith("hello.yaml:1:1: `apiVersion` is missing")
