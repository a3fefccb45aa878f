"""What is known before anything is made, and what is refused then."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest

from kenaz_drivers.contract import Capabilities, DriverError, LaunchPlan, LaunchRequest, Reason
from kenaz_engine.images.errors import ImageMissing
from kenaz_engine.session import prepare as module
from kenaz_engine.session.prepare import CannotRun, Prepared, native_arch, prepare, survey
from kenaz_engine.spec.faults import InvalidFile
from kenaz_engine.spec.resolve import load_session

SPEC = """\
apiVersion: kenaz.dev/v1
kind: Session
metadata: {name: test, id: s1}
spec: {driver: fake, machine: {arch: x86_64}}
"""


class FakeDriver:
    """A driver on a host that a test makes up."""

    name: ClassVar[str] = "fake"
    options_schema: ClassVar[dict[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "properties": {"accel": {"type": "string"}},
    }

    def __init__(self) -> None:
        self.capabilities = Capabilities(
            usable=True,
            reasons=(Reason(False, "no KVM: using TCG", "load kvm"),),
            arch="x86_64",
            accelerator="tcg",
            deadline_scale=5.0,
            transports=("virtio-serial", "vsock"),
            disk_formats=("qcow2",),
            boots_image=False,
        )
        self.refuses: DriverError | None = None
        self.cid: int | None = None

    async def probe(self, arch: str, options: Mapping[str, Any]) -> Capabilities:
        return self.capabilities

    def plan(self, request: LaunchRequest) -> LaunchPlan:
        if self.refuses:
            raise self.refuses
        self.cid = request.cid
        return LaunchPlan(self.name, ("fake",))


@pytest.fixture
def driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeDriver:
    driver = FakeDriver()
    monkeypatch.setenv("KENAZ_STATE_DIR", str(tmp_path))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("kenaz_drivers.registry.driver_names", lambda: ("fake", "other"))
    monkeypatch.setattr("kenaz_drivers.registry.load", lambda name: driver)
    monkeypatch.setattr(module, "load", lambda name: driver)
    return driver


async def prepared(*overrides: str) -> Prepared:
    return await prepare(load_session(SPEC, "spec.yaml", overrides=overrides, environment={}))


async def refused(*overrides: str) -> tuple[str, str]:
    with pytest.raises(CannotRun) as caught:
        await prepared(*overrides)
    return str(caught.value), caught.value.hint


def change(driver: FakeDriver, **changes: Any) -> None:
    driver.capabilities = replace(driver.capabilities, **changes)


async def test_every_fall_back_is_a_note(driver: FakeDriver) -> None:
    change(driver, isolates=False)
    ready = await prepared()
    assert ready.notes == (
        "no KVM: using TCG",
        "deadlines that wait for the guest are x5 under tcg",
        "the driver fake isolates nothing: the guest is a process of yours",
    )
    assert ready.lifecycle.states["connecting"].timeout == 450
    assert ready.lifecycle.states["resolving"].timeout == 1800
    assert (ready.image, ready.missing, ready.arch) == (None, None, "x86_64")
    assert (ready.transport, ready.transport_reason) == (
        "virtio-serial",
        "first of what fake offers here: virtio-serial, vsock",
    )


async def test_where_nothing_falls_back_there_is_nothing_to_note(driver: FakeDriver) -> None:
    change(driver, reasons=(), deadline_scale=1.0)
    assert (await prepared("spec.machine.arch=native")).notes == ()
    assert (await prepared("spec.machine.arch=native")).arch == native_arch()


async def test_auto_passes_over_who_boots_no_kernel_where_the_image_has_one(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[Reason | None] = []

    async def choose(arch: str, options: Any, unfit: Any) -> Any:
        can = replace(driver.capabilities, boots_image=True)
        told.extend(unfit(one) for one in (can, replace(can, boots_kernels=False)))
        return driver, driver.capabilities, ()

    monkeypatch.setattr(module, "choose", choose)
    kernel = (module._STAND_IN, None, False)
    bare = (replace(module._STAND_IN, parts={"root": module._STAND_IN.parts["root"]}), None, False)
    for found in (kernel, bare, (None, None, True)):
        monkeypatch.setattr(module, "_image", lambda *asked, found=found: found)
        await survey(load_session(SPEC, "spec.yaml", overrides=["spec.driver=auto"], environment={}))
    assert [one and one.text for one in told] == [
        None,
        "the image demo has a kernel of its own, and only disks with a boot loader boot",
        *(None,) * 4,
    ]


async def test_a_transport_can_be_asked_for(driver: FakeDriver) -> None:
    ready = await prepared("spec.channel.transport=vsock")
    assert (ready.transport, ready.transport_reason) == ("vsock", "asked for by the spec")
    # Drivers refuse to plan for AF_VSOCK without a CID, which is claimed only when the session runs.
    assert driver.cid == 3
    await prepared()
    assert driver.cid is None
    assert await refused("spec.channel.transport=unix") == (
        "the driver fake has no transport unix here",
        "it has virtio-serial, vsock; or leave spec.channel.transport at auto",
    )


async def test_what_only_one_transport_lacks_is_told_to_who_asks_for_it(driver: FakeDriver) -> None:
    lacks = Reason(False, "no daemon", "get it", transport="vhost-user-vsock")
    change(driver, reasons=(lacks,), deadline_scale=1.0)
    assert (await prepared()).notes == ()
    assert await refused("spec.channel.transport=vhost-user-vsock") == (
        "the driver fake has no transport vhost-user-vsock here: no daemon",
        "get it; or it has virtio-serial, vsock; or leave spec.channel.transport at auto",
    )


DIALLED = (
    "spec.network=nat",
    "spec.channel={transport: tcp, framing: ndjson, dial: host}",
)


async def test_a_port_that_others_can_reach_is_a_note(driver: FakeDriver) -> None:
    change(driver, transports=("virtio-serial", "tcp"))
    assert (await prepared()).transport == "virtio-serial"
    ready = await prepared(*DIALLED)
    assert ready.transport == "tcp"
    assert ready.notes[-1] == (
        "transport tcp: every user of this host can reach the guest's port on 127.0.0.1; "
        "only the session's token keeps them out"
    )


async def test_a_command_is_for_guests_that_dial(driver: FakeDriver) -> None:
    change(driver, transports=("tcp",))
    exec_ = ("spec.lifecycle=ephemeral-exec", "spec.workbench.args=[ls]")
    with pytest.raises(InvalidFile) as caught:
        await prepared(*DIALLED, *exec_)
    assert [fault.message for fault in caught.value.faults] == ["a guest that is dialled runs no commands"]


async def test_a_driver_that_is_not_usable_says_why(driver: FakeDriver) -> None:
    change(driver, usable=False, reasons=(Reason(True, "fine"), Reason(False, "no QEMU", "get it")))
    assert await refused() == ("the driver fake cannot run x86_64 guests here: no QEMU", "get it")


async def test_auto_says_why_others_are_not_used(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Capabilities(False, (Reason(True, "fine"), Reason(False, "no libvirt", "get it")), "x86_64")
    foreign = Capabilities(False, (Reason(False, "runs on macOS only"),), "x86_64")

    async def choose(arch: str, options: Any, unfit: Any) -> Any:
        fake = ("fake", driver.capabilities)
        considered = (("foreign", foreign), ("other", other), fake, ("lesser", other))
        return driver, driver.capabilities, considered

    monkeypatch.setattr(module, "choose", choose)
    notes = (await prepared("spec.driver=auto")).notes
    # What nobody can mend on this host is no note of a session, nor is one that would not be taken anyway.
    assert [note for note in notes if "is not used" in note] == ["other is not used: no libvirt"]

    async def none(arch: str, options: Any, unfit: Any) -> Any:
        raise DriverError("no driver is usable", hint="get one")

    monkeypatch.setattr(module, "choose", none)
    assert await refused("spec.driver=auto") == ("no driver is usable", "get one")


async def test_a_driver_that_there_is_not_is_a_fault_of_the_file(driver: FakeDriver) -> None:
    with pytest.raises(InvalidFile) as caught:
        await prepared("spec.driver=fakr")
    assert "there is no driver `fakr`" in str(caught.value.faults[0])
    with pytest.raises(InvalidFile) as caught:
        await prepared("spec.driverOptions.fake.acel=tcg")
    assert "acel" in str(caught.value.faults[0])


async def test_a_driver_that_cannot_be_loaded_is_told(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(name: str) -> Any:
        raise DriverError("the driver fake cannot be imported", hint="install it anew")

    monkeypatch.setattr(module, "load", broken)
    assert await refused() == ("the driver fake cannot be imported", "install it anew")


async def test_a_missing_image_is_found_before_anything_is_made(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(reference: str, arch: str, cache: Path, **more: Any) -> Any:
        assert (reference, arch, cache, more["base"]) == ("demo", "x86_64", tmp_path, ".")
        raise ImageMissing("it is not here", "get it")

    change(driver, boots_image=True)
    monkeypatch.setattr(module, "locate", missing)
    assert await refused("spec.image=demo") == ("it is not here", "get it")
    seen = await survey(load_session(SPEC, "spec.yaml", overrides=["spec.image=demo"], environment={}))
    assert (seen.image, str(seen.missing)) == (None, "it is not here")
    assert list(tmp_path.iterdir()) == []


async def test_an_image_that_can_be_fetched_is_fetched_by_the_session(
    driver: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change(driver, boots_image=True)
    reference = f"https://images.example.org/image.json@sha256:{'0' * 64}"
    ready = await prepared(f"spec.image={reference}")
    assert (ready.image, ready.missing, ready.fetches, ready.offline) == (None, None, True, False)
    resolved = load_session(SPEC, "spec.yaml", overrides=[f"spec.image={reference}"], environment={})
    with pytest.raises(CannotRun, match=r"offline, and .* was not fetched yet"):
        await prepare(resolved, offline=True)
    assert list(tmp_path.iterdir()) == []


async def test_a_plan_that_the_driver_refuses_is_found_before_anything_is_made(
    driver: FakeDriver, tmp_path: Path
) -> None:
    driver.refuses = DriverError("the path is too long", hint="take a shorter one")
    assert await refused() == ("the path is too long", "take a shorter one")
    assert list(tmp_path.iterdir()) == []


async def test_a_place_without_room_for_a_sockets_name_is_found_too(
    driver: FakeDriver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KENAZ_STATE_DIR", "/" + "a" * 120)
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/" + "b" * 120)
    message, hint = await refused()
    assert message.startswith("a socket's path would be too long: /bbb")
    assert hint == "set XDG_RUNTIME_DIR to a shorter directory"
