"""The probe against scripted QEMUs; the real one is in the integration tests."""

import errno
import json
import os
import platform
import stat
import sys
from functools import partial

import pytest

from kenaz_drivers._common.accelerator import run_guest
from kenaz_drivers.contract import DriverError, LaunchRequest
from kenaz_drivers.qemu import probe as module
from kenaz_drivers.qemu.driver import QemuDriver, describe_exit, hint_for

FAKE = """#!/bin/sh
echo "$*" >> {log}
case "$1" in
-version) echo "QEMU emulator version 9.9.9 (fake)"; exit 0;;
-help) printf 'usage\\n-sandbox on\\n'; exit 0;;
-machine) printf 'Supported machines are:\\nmicrovm  x\\nq35 y\\nvirt z\\n\\n'; exit 0;;
-accel) printf 'Accelerators supported in QEMU binary:\\n{accels}\\n'; exit 0;;
esac
{guest}
"""


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(platform, "machine", lambda: "AMD64")
    return tmp_path / "cache" / "probe" / "qemu-x86_64.json"


@pytest.fixture
def devices(monkeypatch):
    """Which devices open; the others raise the errno given, ENOENT by default."""
    known = {"/dev/kvm": 0}
    real = os.open

    def fake(path, flags, *rest, **more):
        if not str(path).startswith("/dev/k") and not str(path).startswith("/dev/v"):
            return real(path, flags, *rest, **more)
        if number := known.get(path, errno.ENOENT):
            raise OSError(number, os.strerror(number))
        return real("/dev/null", flags)

    monkeypatch.setattr(os, "open", fake)
    return known


@pytest.fixture
def fake_qemu(tmp_path, cache, devices, monkeypatch):
    """Makes a QEMU whose guests end as the shell command says; returns options and how often it was run."""

    def make(guest="exit 33", accels=("tcg", "kvm")):
        if "sleep" not in guest:  # the others are done at once, once a busy host has started them
            monkeypatch.setattr(module, "run_guest", partial(run_guest, deadline=60.0))
        binary, log = tmp_path / "qemu", tmp_path / "log"
        binary.write_text(FAKE.format(log=log, guest=guest, accels="\\n".join(accels)))
        binary.chmod(0o755)
        return {"binary": str(binary)}, lambda: len(log.read_text().splitlines()) if log.exists() else 0

    return make


def texts(capabilities):
    return [reason.text for reason in capabilities.reasons if not reason.ok]


async def test_kvm_that_runs_guests_is_taken_and_the_answer_kept(fake_qemu, cache):
    options, runs = fake_qemu()
    found = await module.probe("x86_64", options)
    assert (found.usable, found.accelerator, found.deadline_scale) == (True, "kvm", 1.0)
    assert found.transports == ("virtio-serial", "tcp")
    assert found.data["facts"]["version"] == "9.9.9"
    assert found.data["fallback"] == ""
    assert runs() == 5
    assert await module.probe("x86_64", options) == found
    assert runs() == 5
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


@pytest.mark.parametrize(
    ("guest", "said"),
    [
        ("exec sleep 60", "a tiny guest is not done after 2 s"),
        ("echo 'qemu: error: failed to set MSR 0x10a'; exit 134", "error: failed to set MSR 0x10a"),
        ("echo 'odd'; exit 3", "odd"),
        ("exit 3", "QEMU ended with code 3"),
    ],
)
async def test_kvm_that_does_not_run_guests_means_tcg_and_says_so(fake_qemu, guest, said):
    options, runs = fake_qemu(guest)
    found = await module.probe("x86_64", options)
    asked = runs()
    assert asked == 5 or (guest, asked) == ("exec sleep 60", 4)  # ended before its shell has written its line
    assert (found.usable, found.accelerator, found.deadline_scale) == (True, "tcg", module.TCG_SCALE)
    assert texts(found)[0] == f"KVM present but does not run guests ({said}): using TCG (slow)"
    assert found.data["fallback"] == texts(found)[0]
    refused = await module.probe("x86_64", {**options, "accel": "kvm"})
    assert not refused.usable
    assert refused.reasons[1].mend == "accel: tcg"
    assert runs() == asked


async def test_an_explicit_tcg_asks_nothing_of_kvm(fake_qemu):
    options, runs = fake_qemu("exit 1")
    found = await module.probe("x86_64", {**options, "accel": "tcg"})
    assert (found.accelerator, found.data["fallback"], runs()) == ("tcg", "", 4)


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.EACCES, "/dev/kvm may not be opened"),
        (errno.ENOENT, "there is no /dev/kvm"),
        (errno.EIO, "/dev/kvm: Input/output error"),
    ],
)
async def test_a_device_that_does_not_open_is_named(fake_qemu, devices, number, said):
    options, runs = fake_qemu()
    devices["/dev/kvm"] = number
    found = await module.probe("x86_64", options)
    assert found.accelerator == "tcg"
    assert texts(found)[0] == f"{said}: using TCG (slow)"
    assert runs() == 4
    devices["/dev/kvm"] = 0
    assert (await module.probe("x86_64", options)).accelerator == "kvm"


async def test_vsock_comes_first_where_its_device_opens(fake_qemu, devices):
    devices["/dev/vhost-vsock"] = 0
    options, _ = fake_qemu()
    assert (await module.probe("x86_64", options)).transports == ("vsock", "virtio-serial", "tcp")


async def test_the_vsock_daemon_is_the_one_asked_for_or_the_paths_or_the_caches(
    fake_qemu, cache, tmp_path, monkeypatch
):
    options, _ = fake_qemu()
    monkeypatch.setattr(module.sys, "platform", "linux")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    found = await module.probe("x86_64", options)
    assert "vhost-user-vsock" not in found.transports
    [lacking] = [reason for reason in found.reasons if reason.transport]
    assert (lacking.ok, lacking.text) == (
        False,
        "vhost-device-vsock is not installed: no transport vhost-user-vsock",
    )
    assert "cargo install --locked --version 0.3.0" in lacking.mend
    for place in ("cache/tools/bin", "bin", "asked"):
        daemon = tmp_path / place / "vhost-device-vsock"
        daemon.parent.mkdir(parents=True)
        daemon.touch(0o700)
        more = {"vsockDaemon": str(daemon)} if place == "asked" else {}
        found = await module.probe("x86_64", {**options, **more})
        # Only who asks for it gets it.
        assert found.transports[:2] == ("virtio-serial", "vhost-user-vsock")
        assert found.data["vhost-device-vsock"] == str(daemon)
    daemon.chmod(0o600)
    assert module.find_vsock_daemon(str(daemon))[1].text.startswith(f"{daemon} is no program")
    monkeypatch.setattr(module.sys, "platform", "darwin")
    assert module.find_vsock_daemon()[0] == ""


async def test_an_accelerator_that_does_not_exist_here(fake_qemu):
    options, _ = fake_qemu()
    found = await module.probe("x86_64", {**options, "accel": "whpx"})
    assert not found.usable
    assert found.reasons[1].text == "accelerator whpx does not exist here"


async def test_a_qemu_without_any_accelerator(fake_qemu):
    options, _ = fake_qemu(accels=("xen",))
    found = await module.probe("x86_64", options)
    assert not found.usable
    assert found.accelerator == "none"


async def test_hvf_needs_no_device(fake_qemu):
    options, _ = fake_qemu(accels=("hvf", "tcg"))
    assert (await module.probe("x86_64", options)).accelerator == "hvf"


async def test_guests_of_another_architecture_are_emulated(fake_qemu):
    options, runs = fake_qemu()
    found = await module.probe("aarch64", options)
    assert (found.accelerator, texts(found)[:1]) == ("tcg", [texts(found)[0]])
    assert runs() == 4


async def test_what_cannot_be_tried_is_not_believed(fake_qemu):
    options, _ = fake_qemu()
    verdict = await module.run_guest(options["binary"], "riscv64", "kvm", "host")
    assert (verdict.works, verdict.text) == (False, "KVM cannot be tried for riscv64")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: "[]",
        lambda text: text[:50],
        lambda text: json.dumps({**json.loads(text), "key": "another boot"}),
        lambda text: json.dumps({**json.loads(text), "facts": {"binary": 1}}),
        lambda text: json.dumps({**json.loads(text), "verdicts": {"kvm": {"x": 1}}}),
        lambda text: json.dumps({**json.loads(text), "verdicts": []}),
    ],
)
async def test_a_cache_that_cannot_be_used_is_as_good_as_none(fake_qemu, cache, damage):
    options, runs = fake_qemu()
    found = await module.probe("x86_64", options)
    cache.write_text(damage(cache.read_text()))
    assert await module.probe("x86_64", options) == found
    assert runs() == 10
    assert await module.probe("x86_64", options) == found
    assert runs() == 10


async def test_a_cache_that_cannot_be_written_is_no_error(fake_qemu, cache):
    options, runs = fake_qemu()
    cache.parent.parent.write_text("a file in the way")
    await module.probe("x86_64", options)
    assert (await module.probe("x86_64", options)).accelerator == "kvm"
    assert runs() == 10


async def test_a_new_binary_is_looked_at_anew(fake_qemu):
    options, runs = fake_qemu()
    await module.probe("x86_64", options)
    os.utime(options["binary"], (1, 1))
    await module.probe("x86_64", options)
    assert runs() == 10


async def test_what_is_no_qemu_is_no_driver(fake_qemu, tmp_path):
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\nexit 1\n")
    program.chmod(0o755)
    found = await module.probe("x86_64", {"binary": str(program)})
    assert texts(found) == [f"{program} does not say its version like QEMU"]
    program.chmod(stat.S_IRUSR)
    found = await module.probe("x86_64", {"binary": str(tmp_path)})
    assert texts(found) == [f"{tmp_path} is no program"]


async def test_no_processes_to_be_had_is_no_traceback(fake_qemu, monkeypatch):
    async def refuse(*args, **kwargs):
        raise DriverError("cannot start it")

    options, _ = fake_qemu()
    monkeypatch.setattr(module, "capture", refuse)
    assert not (await module.probe("x86_64", options)).usable


def test_the_binary_is_looked_for_where_distributions_put_it(monkeypatch, cache):
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: None)
    monkeypatch.setattr(os, "access", lambda path, mode: path == "/usr/libexec/qemu-kvm")
    assert module.find_binary("x86_64") == "/usr/libexec/qemu-kvm"
    with pytest.raises(DriverError, match="qemu-system-aarch64 is not installed") as caught:
        module.find_binary("aarch64")
    assert caught.value.hint == "apt install qemu-system-arm"
    monkeypatch.setattr(module.sys, "platform", "darwin")
    with pytest.raises(DriverError) as caught:
        module.find_binary("aarch64")
    assert caught.value.hint == "brew install qemu"
    monkeypatch.setattr(module.shutil, "which", lambda name, path=None: f"/bin/{name}")
    assert module.find_binary("riscv64") == "/bin/qemu-system-riscv64"


def test_without_a_configured_cache_the_users_own_is_taken(monkeypatch):
    monkeypatch.delenv("KENAZ_CACHE_DIR", raising=False)
    assert module.cache_directory().name == "kenaz"


async def test_plans_carry_the_fall_back_and_no_environment(fake_qemu):
    driver = QemuDriver()
    options, _ = fake_qemu("exit 1")
    capabilities = await driver.probe("x86_64", options)
    request = LaunchRequest(
        "s", "/d", "/r", 1, 1 << 20, "virtio-serial", "/r/c", 7881, capabilities, kernel="/k"
    )
    plan = driver.plan(request)
    assert plan == driver.plan(request)
    assert plan.notes[0] == capabilities.data["fallback"]
    assert dict(plan.environment) == {"LC_ALL": "C.UTF-8"}
    unusable = await driver.probe("x86_64", {"binary": "/nowhere"})
    with pytest.raises(DriverError, match="/nowhere is no program"):
        driver.plan(LaunchRequest("s", "/d", "/r", 1, 1, "virtio-serial", "/r/c", 7881, unusable))


@pytest.mark.parametrize(
    ("code", "shutdown", "log", "clean", "reason"),
    [
        (0, "guest-shutdown", (), True, "guest-shutdown: the guest powered off"),
        (0, "guest-panic", (), False, "guest-panic: the guest's kernel panicked"),
        (0, "host-signal", (), False, "host-signal: a signal ended QEMU"),
        (0, "host-ui", (), False, "host-ui: QEMU ended"),
        (0, "", (), False, "QEMU ended with code 0"),
        (1, "guest-shutdown", ("a", "b"), False, "QEMU ended with code 1: b"),
        (-6, "", ("assertion",), False, "SIGABRT killed QEMU"),
        (-99, "", (), False, "signal 99 killed QEMU"),
    ],
)
def test_how_a_machine_ended(code, shutdown, log, clean, reason):
    ended = describe_exit(code, shutdown, log)
    assert (ended.clean, ended.reason, ended.code) == (clean, reason, code)


def test_hints_come_from_what_qemu_says(monkeypatch):
    assert "accel: tcg" in hint_for(("x", "Could not access KVM kernel module: Permission denied"))
    assert hint_for(("all is well",)) == ""
    said = (r"Could not open 'C:\Users\José\root.qcow2': Path not found.",)
    assert hint_for(said) == ""
    monkeypatch.setattr(sys, "platform", "win32")
    assert "KENAZ_STATE_DIR" in hint_for(said)
    assert hint_for((r"Could not open 'C:\Users\Jo\root.qcow2': Path not found.",)) == ""
