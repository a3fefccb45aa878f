"""libvirt's domains, to the letter; what virsh says; and the probe against a scripted virsh."""

import os
import platform
import shutil
import subprocess
import uuid
import xml.etree.ElementTree as ET
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import jsonschema
import pytest

from kenaz_drivers._common.accelerator import run_guest
from kenaz_drivers.contract import Capabilities, Content, Disk, DriverError, Exit, LaunchRequest
from kenaz_drivers.libvirt import elsewhere
from kenaz_drivers.libvirt import probe as module
from kenaz_drivers.libvirt.domain import NAMESPACE, Facts, Volume, build, cid_of, uuid_of, volumes
from kenaz_drivers.libvirt.driver import LibvirtDriver
from kenaz_drivers.libvirt.virsh import Lifecycle, describe_exit, failure, parse_event, parse_monitor

GOLDEN = Path(__file__).parent / "golden"

SESSION = Facts("/usr/bin/virsh", "qemu:///session", "9.0.0")
SYSTEM = Facts("/usr/bin/virsh", "qemu:///system", "9.0.0", owner=(1000, 100))

DISKS = (
    Disk("root", "/state/root.qcow2", "qcow2"),
    Disk("config", "/state/config.iso", "raw", readonly=True),
    Disk("workbench", "/cache/blobs/ab", "raw", readonly=True),
)


def request_for(arch="x86_64", accel="tcg", **changes):
    capabilities = Capabilities(usable=True, reasons=(), arch=arch, accelerator=accel)
    request = LaunchRequest(
        session="hello",
        directory="/state",
        runtime="/run/k",
        cpus=2,
        memory=256 << 20,
        transport="virtio-serial",
        channel="/run/k/channel",
        port=7881,
        capabilities=capabilities,
        kernel="/cache/vmlinuz",
        initrd="/cache/initrd",
        cmdline="console=ttyS0 quiet",
        disks=DISKS,
        mark="hello-0123456789abcdef",
    )
    return replace(request, **changes)


CASES = {
    "x86_64-tcg-session": (request_for(), SESSION),
    "x86_64-kvm-system": (request_for(accel="kvm"), SYSTEM),
    "x86_64-tcg-disk-nat": (request_for(kernel="", initrd="", cmdline="", network="nat"), SESSION),
    "aarch64-tcg-session": (request_for("aarch64"), SESSION),
    "aarch64-kvm-disk": (request_for("aarch64", "kvm", kernel="", disks=DISKS[:1]), SYSTEM),
    "x86_64-vsock": (request_for(accel="kvm", transport="vsock", channel=""), SESSION),
    "x86_64-odd-paths": (
        request_for(cmdline="a='<&>\"", disks=(Disk("root", "/a b/<&'\"ü,,", "raw"),), initrd=""),
        SESSION,
    ),
}

THERE = Facts(
    "/usr/bin/virsh", "qemu+ssh://other/system", "9.0.0", None, "other", "scratch", "/pools/scratch"
)

# As the engine has it of a machine on another host.
MOVED = (
    Disk("root", "", "volume", base="/pools/scratch/kenaz-ab", base_format="raw", size=2 << 30),
    Disk("config", "/state/config.raw", "raw", readonly=True),
    Disk("workbench", "/pools/scratch/kenaz-cd", "raw", readonly=True),
)
CASES["x86_64-elsewhere"] = (request_for(disks=MOVED, kernel="/pools/scratch/kenaz-ef", initrd=""), THERE)


@pytest.mark.parametrize("name", CASES)
def test_the_domain_is_the_golden_one(name):
    text = build(*CASES[name])
    golden = GOLDEN / f"libvirt-{name}.xml"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(text)
    assert text == golden.read_text()


@pytest.mark.parametrize("name", CASES)
def test_the_domain_is_valid(name):
    """By libvirt's own schema, with libvirt's own tool."""
    if shutil.which("virt-xml-validate") is None or shutil.which("xmllint") is None:
        pytest.skip("needs virt-xml-validate (Debian: libvirt-clients, libxml2-utils)")
    command = ["virt-xml-validate", str(GOLDEN / f"libvirt-{name}.xml"), "domain"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_odd_paths_come_out_as_they_went_in():
    domain = ET.fromstring(build(*CASES["x86_64-odd-paths"]))
    assert domain.find("devices/disk/source").get("file") == "/a b/<&'\"ü,,"
    assert domain.findtext("os/cmdline") == "a='<&>\""


def test_the_cid_is_read_off_the_domain_that_was_made():
    planned = build(*CASES["x86_64-vsock"])
    assert cid_of(planned) is None
    assert cid_of(planned.replace('auto="yes"', 'auto="yes" address="7"')) == 7
    assert cid_of(build(*CASES["x86_64-tcg-session"])) is None


def test_memory_is_whole_mebibytes_and_never_less():
    assert ET.fromstring(build(request_for(memory=(64 << 20) + 1), SESSION)).findtext("memory") == "66560"


def test_the_volumes_of_a_machine_elsewhere_carry_its_mark():
    root, config = volumes(*CASES["x86_64-elsewhere"])
    mark = request_for().mark
    assert root == Volume(f"kenaz-{mark}-root", 2 << 30, "/pools/scratch/kenaz-ab", "raw")
    assert config == Volume(f"kenaz-{mark}-config", source="/state/config.raw")
    assert volumes(*CASES["x86_64-tcg-session"]) == ()
    assert elsewhere.creation("scratch", root, root.size) == (
        f"vol-create-as scratch kenaz-{mark}-root 2147483648 --format qcow2 --backing-vol kenaz-ab "
        "--backing-vol-format raw"
    )
    assert elsewhere.creation("scratch", config, 9).endswith(" 9 --format raw")


def test_a_plan_for_elsewhere_says_what_is_made_there():
    request, facts = CASES["x86_64-elsewhere"]
    can = replace(request.capabilities, data={"facts": asdict(facts)}, elsewhere="other")
    plan = LibvirtDriver().plan(replace(request, capabilities=can))
    names = [f"kenaz-{request.mark}-{role}" for role in ("root", "config")]
    assert plan.trace == {"uri": facts.uri, "pool": "scratch", "volumes": names}
    assert plan.data["carried"] == ["console", "channel"]
    assert "runs on other: image and build are kept in its storage pool scratch" in plan.notes[0]
    assert LibvirtDriver().placed(can, "ab") == "/pools/scratch/kenaz-ab"
    with pytest.raises(DriverError, match="no transport 'vsock'"):
        build(replace(request, transport="vsock"), facts)


def test_the_uuid_follows_from_the_mark():
    assert uuid_of("a-mark") == str(uuid.uuid5(NAMESPACE, "a-mark"))
    assert uuid_of("a-mark") != uuid_of("another")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transport": "tcp"}, "no transport 'tcp'"),
        ({"display": "window"}, "shows no screen"),
        ({"network": "bridge"}, "is unknown to this driver"),
        ({"channel": "/x" * 60}, "has 120 bytes"),
        ({"runtime": "/x" * 60}, "has 133 bytes"),
        ({"channel": ""}, "has 0 bytes"),
        ({"cmdline": "a\x1b"}, "cannot stand in XML"),
        ({"cmdline": "a" * 70_000}, "too long"),
        ({"disks": (Disk("swap", "/s", "raw"),)}, "no disk of role 'swap'"),
        ({"disks": (Disk("root", "/s", "vhdx"),)}, "format 'vhdx'"),
        ({"accel": "hvf"}, "no accelerator 'hvf'"),
        ({"arch": "riscv64"}, "no machine for riscv64"),
    ],
)
def test_what_cannot_be_is_refused(changes, said):
    with pytest.raises(DriverError, match=said):
        build(request_for(**changes), SESSION)


def line(words):
    return f"2026-11-24 18:21:36.910+0000: event {words}"


def test_lines_of_virsh_are_understood():
    stopped = parse_event(line("'lifecycle' for domain 'k': Stopped Shutdown"))
    assert stopped == Lifecycle("Stopped", "Shutdown")
    assert parse_event("event 'reboot' for domain 'k'") == Lifecycle("Reboot", "")
    assert parse_event("made" + line("'lifecycle' for domain 'k': Resumed Unpaused")).event == "Resumed"
    for other in ("", "events received: 1", line("'rtc-change' for domain 'k': 0"), "event 'lifecycle'"):
        assert parse_event(other) is None
    told = parse_monitor('event VSERPORT_CHANGE at 1.5 for domain \'k\': {"open":true,"id":"channel0"}')
    assert told == ("VSERPORT_CHANGE", {"open": True, "id": "channel0"})
    assert parse_monitor("event STOP at 1.5 for domain 'k': <null>") == ("STOP", {})
    assert parse_monitor("hello") is None


POWERED_OFF = Lifecycle("Shutdown", "Finished after guest request")


@pytest.mark.parametrize(
    ("events", "ended"),
    [
        ([POWERED_OFF, Lifecycle("Stopped", "Shutdown")], Exit(True, "the guest powered off")),
        ([POWERED_OFF, Lifecycle("Stopped", "Destroyed")], Exit(False, "the launcher destroyed the domain")),
        (
            [Lifecycle("Shutdown", "Finished after host request"), Lifecycle("Stopped", "Shutdown")],
            Exit(False, "a signal ended QEMU"),
        ),
        (
            [Lifecycle("Reboot", ""), POWERED_OFF, Lifecycle("Stopped", "Shutdown")],
            Exit(False, "the guest asked for a reboot"),
        ),
        (
            [Lifecycle("Crashed", "Panicked"), Lifecycle("Stopped", "Crashed")],
            Exit(False, "the guest's kernel panicked"),
        ),
        ([Lifecycle("Stopped", "Failed")], Exit(False, "QEMU failed")),
        ([Lifecycle("Stopped", "Saved")], Exit(False, "libvirt says: Stopped Saved")),
    ],
)
def test_how_a_domain_ended(events, ended):
    assert describe_exit(events) == ended


def test_what_virsh_complains_of_comes_with_a_mend():
    said = "error: failed to connect to the hypervisor\nerror: Failed to connect socket to '/s': No such file"
    error = failure("it does not answer", said, "qemu:///system")
    assert str(error) == "it does not answer: Failed to connect socket to '/s': No such file"
    assert error.hint.startswith("start libvirt's daemon")
    assert str(failure("x", "", "")) == "x: virsh does not say why"


@pytest.mark.parametrize(
    ("said", "mend"),
    [
        ("root@other: Permission denied (publickey,password).: Connection reset by peer", "give ssh a key"),
        ("Could not open '/their/disk': Permission denied", "let the user that libvirt runs QEMU as"),
        ("ssh: Could not resolve hostname other: Name or service not known", "a host that ssh finds"),
        ("Unable to resolve address 'other' service '16509': Name or", "a host that is found by its name"),
        ("unable to connect to server at 'other:1': Connection refused", "see that the host listens"),
        ("unable to connect to server at 'other:1': No route to host", "see that other is up"),
        ("ssh: connect to host other port 22: Connection timed out", "see that other is up"),
        ("REMOTE HOST IDENTIFICATION HAS CHANGED!\nHost key verification failed.", "ssh-keygen -R other"),
        ("Host key verification failed.", "add the host to your known_hosts"),
        (
            "Cannot recv data: sh: 1: nc: not found: Connection reset by peer",
            "install netcat-openbsd on other",
        ),
        ("Cannot read CA certificate '/etc/pki/CA/cacert.pem': No such file", "certificate of other's CA"),
        ("authentication failed: Failed to verify peer's certificate", "give other a certificate"),
        ("authentication failed: Failed to start SASL negotiation: -4 (no mechanism)", "in auth.conf"),
        ("authentication unavailable: no polkit agent available", "log in to other as root"),
        ("Failed to connect socket to '/libvirt-sock': Permission denied", "log in to other as root"),
        ("Failed to connect socket to '/libvirt-sock': No such file", "start libvirt's daemon on other"),
    ],
)
def test_each_way_of_not_getting_there_has_its_own_mend(said, mend):
    found = failure("it does not answer", f"error: {said}", "qemu+ssh://root@other/system").hint
    assert mend in found
    assert "qemu:///session" not in found


@pytest.mark.parametrize(
    ("uri", "said", "mend"),
    [
        (
            "qemu:///system",
            "Failed to connect socket to '/s': Connection refused",
            "start libvirt's daemon: ",
        ),
        (
            "qemu:///system",
            "Failed to connect socket to '/libvirt-sock': Permission denied",
            "join the group",
        ),
        ("qemu:///system", "authentication unavailable: no polkit agent available", "join the group"),
        ("qemu:///session", "Failed to connect socket to '/s': No such file", "libvirt starts it"),
    ],
)
def test_this_host_has_mends_of_its_own(uri, said, mend):
    assert mend in failure("it does not answer", f"error: {said}", uri).hint


HAS_IT = module.Verdict(True, "it opens")
HERE = platform.node()

VIRSH = """#!/bin/sh
echo "$* LIBVIRT_AUTOSTART=$LIBVIRT_AUTOSTART" >> {log}
{answer}
"""

ANSWER = """
echo {host}
echo "Running hypervisor: QEMU 7.2.22"
echo "Running against daemon: 9.0.0"
for kind in {kinds}; do
    printf '<domainCapabilities>\\n  <path>{qemu}</path>\\n  <domain>%s</domain>\\n' $kind
done
"""


@pytest.fixture
def virsh(tmp_path, monkeypatch):
    """A virsh that answers as it is told; and a QEMU that runs guests, or does not."""
    monkeypatch.setenv("KENAZ_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    monkeypatch.setattr(module, "host_arch", lambda: "x86_64")
    opened = module.Verdict(True, "/dev/kvm opens")
    missing = module.Verdict(False, "there is no /dev/vhost-vsock", "load the module vhost_vsock")
    monkeypatch.setattr(module, "open_device", lambda path, module: missing if "vsock" in path else opened)
    monkeypatch.setattr(module, "run_guest", partial(run_guest, deadline=60.0))  # a busy host has to start it

    def make(answer=None, host=HERE, kinds="qemu kvm", guest="exit 33"):
        qemu = tmp_path / "qemu"
        qemu.write_text(f"#!/bin/sh\n{guest}\n")
        text = ANSWER.format(host=host, kinds=kinds, qemu=qemu) if answer is None else answer
        (tmp_path / "virsh").write_text(VIRSH.format(log=tmp_path / "log", answer=text))
        for program in ("virsh", "qemu"):
            (tmp_path / program).chmod(0o755)
        return (tmp_path / "log").read_text

    return make


async def test_kvm_that_runs_guests_is_taken(virsh):
    virsh()
    found = await module.probe("x86_64", {"uri": "qemu:///system"})
    assert (found.usable, found.accelerator, found.deadline_scale) == (True, "kvm", 1.0)
    assert [reason.text for reason in found.reasons[:2]] == [
        "libvirt 9.0.0 at qemu:///system",
        "KVM runs guests",
    ]
    assert found.data["facts"]["owner"] == [os.geteuid(), os.getegid()]
    assert Facts.from_json(found.data["facts"]).owner == (os.geteuid(), os.getegid())


async def test_kvm_that_does_not_run_guests_is_not(virsh):
    virsh(guest="echo no; exit 1")
    found = await module.probe("x86_64", {"uri": "qemu:///session"})
    assert (found.usable, found.accelerator, found.deadline_scale) == (True, "tcg", 5.0)
    assert found.data["fallback"] == "KVM present but does not run guests (no): using TCG (slow)"
    assert found.data["facts"]["owner"] is None
    refused = await module.probe("x86_64", {"accel": "kvm"})
    assert not refused.usable
    assert refused.reasons[1].mend == "accel: tcg"
    asked = await module.probe("x86_64", {"accel": "tcg"})
    assert (asked.accelerator, asked.data["fallback"]) == ("tcg", "")


async def test_a_guest_of_another_architecture_is_emulated(virsh):
    virsh(kinds="qemu")
    assert (await module.probe("aarch64", {})).accelerator == "tcg"
    refused = await module.probe("aarch64", {"accel": "kvm"})
    assert "this host's own architecture" in refused.reasons[1].text


async def test_no_kvm_and_no_qemu(virsh, monkeypatch):
    virsh(kinds="qemu")
    found = await module.probe("x86_64", {})
    assert [r.text for r in found.reasons if not r.ok] == [
        "libvirt has no KVM: using TCG (slow)",
        "there is no /dev/vhost-vsock: the channel goes over virtio-serial",
    ]
    virsh(kinds="")
    assert not (await module.probe("x86_64", {})).usable


async def test_kvm_that_only_libvirt_may_open_is_believed_and_that_is_said(virsh, monkeypatch):
    virsh()
    closed = module.Verdict(False, "/dev/kvm may not be opened", "join the group kvm")
    monkeypatch.setattr(module, "open_device", lambda path, module: closed)
    found = await module.probe("x86_64", {})
    assert found.accelerator == "kvm"
    assert found.reasons[1].text == "libvirt has KVM, which was not tried: /dev/kvm may not be opened"


async def test_vsock_is_offered_where_the_device_opens(virsh, monkeypatch):
    virsh()
    monkeypatch.setattr(module, "open_device", lambda path, module: HAS_IT)
    found = await module.probe("x86_64", {"accel": "tcg"})
    assert found.transports == ("vsock", "virtio-serial")
    assert found.assigns_cid


async def test_no_daemon_is_started_unless_the_spec_names_one(virsh):
    log = virsh(answer="echo 'error: Failed to connect socket' >&2; exit 1")
    found = await module.probe("x86_64", {})
    assert not found.usable
    assert found.reasons[0].mend
    assert "LIBVIRT_AUTOSTART=0" in log()
    await module.probe("x86_64", {"uri": "qemu:///session"})
    assert "LIBVIRT_AUTOSTART=1" in log()


async def test_a_users_own_daemon_that_the_spec_names_is_started_for_the_machine_too(virsh):
    log = virsh(answer="echo 'error: no daemon'; exit 1")

    def planned(facts, **options):
        facts = asdict(replace(facts, virsh="virsh"))
        can = Capabilities(usable=True, reasons=(), arch="x86_64", accelerator="tcg", data={"facts": facts})
        return LibvirtDriver().plan(request_for(capabilities=can, options=options))

    plan = planned(SESSION, uri=SESSION.uri)
    with pytest.raises(DriverError, match="libvirt at qemu:///session does not answer: no daemon"):
        async with LibvirtDriver().launch(plan, {}):
            pytest.fail("it was launched")
    assert log() == "-c qemu:///session --quiet uri LIBVIRT_AUTOSTART=1\n"
    assert not planned(SESSION).data["starts"]
    assert not planned(SYSTEM, uri=SYSTEM.uri).data["starts"]


POOL = """
case "$*" in
*pool-info*)
    printf 'Name: default\\nState: {state}\\nAvailable:  7.00 GiB\\n'
    printf "<pool type='{kind}'>\\n<target>\\n<path>{path}</path></target></pool>\\n"
    exit {code};;
esac
"""


def elsewhere_answer(state="running", kind="dir", code=0, host="elsewhere", path="/pools/default"):
    pool = POOL.format(state=state, kind=kind, code=code, path=path)
    return pool + ANSWER.format(host=host, kinds="qemu kvm", qemu="/usr/bin/qemu")


@pytest.fixture
def carriers(monkeypatch):
    """The program that carries streams, as if libvirt's library were here, whether it is or not."""
    monkeypatch.setattr(elsewhere, "STREAMS", ("true",))


async def test_another_host_is_taken_by_name(virsh, carriers):
    virsh(answer=elsewhere_answer())
    found = await module.probe("x86_64", {"uri": "qemu+ssh://elsewhere/system"})
    assert found.usable
    assert (found.elsewhere, found.disk_formats, found.transports) == (
        "elsewhere",
        ("volume",),
        ("virtio-serial",),
    )
    facts = Facts.from_json(found.data["facts"])
    assert (facts.elsewhere, facts.pool, facts.target) == ("elsewhere", "default", "/pools/default")
    assert facts.owner is None
    assert [reason.text for reason in found.reasons] == [
        "libvirt 9.0.0 at qemu+ssh://elsewhere/system",
        "libvirt on elsewhere has KVM for such guests, which was not tried",
        "machines run on elsewhere; its storage pool default has 7.00 GiB free",
    ]
    assert (await module.probe("x86_64", {"uri": "qemu+ssh://e/system", "accel": "tcg"})).accelerator == "tcg"


async def test_a_pool_may_have_an_odd_path(virsh, carriers):
    virsh(answer=elsewhere_answer(path="/r&amp;d/it&apos;s"))
    found = await module.probe("x86_64", {"uri": "qemu+ssh://elsewhere/system"})
    assert found.data["facts"]["target"] == "/r&d/it's"


@pytest.mark.parametrize("transport", ["", "+ssh", "+libssh2", "+unix"])
def test_each_transport_of_libvirts_may_be_named(transport):
    jsonschema.validate({"uri": f"qemu{transport}://host/system"}, LibvirtDriver.options_schema)


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        ({"state": "inactive"}, "the storage pool default on elsewhere is not active"),
        ({"kind": "rbd"}, "of the type rbd"),
        ({"code": 1}, "the disks cannot be put on elsewhere"),
    ],
)
async def test_a_pool_that_is_of_no_use_is_told(virsh, carriers, answer, said):
    virsh(answer=elsewhere_answer(**answer))
    found = await module.probe("x86_64", {"uri": "qemu+ssh://elsewhere/system"})
    assert not found.usable
    assert said in found.reasons[0].text
    assert found.reasons[0].mend


async def test_another_host_is_not_taken_unasked_nor_without_the_library(virsh, monkeypatch):
    virsh(answer=elsewhere_answer())
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+ssh://elsewhere/system")
    found = await module.probe("x86_64", {})
    assert not found.usable
    assert "is on elsewhere, where sessions are placed only by name" in found.reasons[0].text
    monkeypatch.setattr(elsewhere, "STREAMS", ("false",))
    found = await module.probe("x86_64", {"uri": "qemu+ssh://elsewhere/system"})
    assert "needs libvirt's library" in found.reasons[0].text


async def test_names_of_hosts_prove_little_and_files_do(virsh, monkeypatch):
    same = 'case "$*" in *emulatorbin*) echo "error: Cannot check QEMU binary $8";; esac'
    seen = 'case "$*" in *-not) echo "error: $8: no such file";; *) echo "error: $8: not executable";; esac'
    across, socket = "qemu+tcp://localhost/system", "qemu:///system"
    virsh(answer=same)
    assert not await elsewhere.is_here("virsh", across, HERE)
    assert await elsewhere.is_here("virsh", socket, f"{HERE.swapcase()}.example.org")
    assert not await elsewhere.is_here("virsh", socket, "another")
    virsh(answer=seen)
    assert await elsewhere.is_here("virsh", across, HERE)
    assert await elsewhere.is_here("virsh", socket, "another")
    assert not await elsewhere.is_here("virsh", across, "another")
    monkeypatch.setattr(elsewhere.tempfile, "tempdir", "/nowhere")
    with pytest.raises(DriverError, match="cannot be found out"):
        await elsewhere.is_here("virsh", across, HERE)


async def test_a_libvirt_that_does_not_answer_in_time_is_told_as_that(virsh, monkeypatch, tmp_path):
    uri = "qemu+ssh://other/system"
    hangs = ANSWER.format(host="other", kinds="", qemu="") + "exec sleep 60"
    virsh(answer=hangs)
    monkeypatch.setattr(module, "PROBE_DEADLINE", 0.5)
    for name in ("LOAD_DEADLINE", "DISCARD_DEADLINE"):
        monkeypatch.setattr(elsewhere, name, 0.5)
    monkeypatch.setattr(elsewhere, "call", partial(elsewhere.call, deadline=0.5))
    monkeypatch.setattr(elsewhere, "STREAMS", ("sleep", "60"))
    [reason] = (await module.probe("x86_64", {"uri": uri})).reasons
    assert reason.text == f"libvirt at {uri} does not answer: nothing came within 0.5 s"
    assert reason.mend == f"see that libvirt answers: virsh -c '{uri}' version"
    for told in (
        elsewhere.find_pool("virsh", uri, "other", "p"),
        elsewhere.is_here("virsh", "qemu:///system", "other"),
        elsewhere.discard_volumes("virsh", uri, "p", ["a"]),
    ):
        with pytest.raises(DriverError, match=": nothing came within ") as raised:
            await told
        assert raised.value.hint.startswith("see that libvirt answers: ")
    with pytest.raises(DriverError, match=r"library cannot be loaded within 0\.5 s"):
        await elsewhere.require_library()


async def test_volumes_are_deleted_until_none_is_listed(virsh, tmp_path):
    busy = f"""
    if [ -e {tmp_path}/again ]; then echo ' other   /p/other'; exit 0; fi
    touch {tmp_path}/again
    echo "error: volume 'a' is still in use."
    echo ' a   /p/a'
    """
    log = virsh(answer=busy)
    await elsewhere.discard_volumes("virsh", "qemu+ssh://o/system", "p", ["a", "b"])
    assert log().count("vol-delete --pool p a; vol-delete --pool p b; vol-list --pool p") == 2
    virsh(answer="echo 'error: Permission denied'; echo ' a   /p/a'")
    with pytest.raises(DriverError, match="the disks a in the storage pool p cannot be deleted"):
        await elsewhere.discard_volumes("virsh", "qemu+ssh://o/system", "p", ["a", "b"])
    virsh(answer="exit 1")
    with pytest.raises(DriverError, match="the disks a, b in"):
        await elsewhere.discard_volumes("virsh", "qemu+ssh://o/system", "p", ["a", "b"])


async def test_a_volume_that_cannot_be_made_is_told(virsh, tmp_path):
    (tmp_path / "config").write_bytes(b"c")
    log = virsh(answer="")
    made = [Volume("r", 7, "/p/kenaz-ab", "raw"), Volume("c", source=str(tmp_path / "config"))]
    await elsewhere.make_volumes("virsh", "qemu+ssh://o/system", "p", made)
    first, second = log().splitlines()
    assert "vol-create-as p r 7 --format qcow2 --backing-vol kenaz-ab --backing-vol-format raw; " in first
    assert "; vol-create-as p c 1 --format raw" in first
    assert f"vol-upload --pool p c {tmp_path}/config" in second
    virsh(answer="echo 'error: No space left on device'")
    with pytest.raises(DriverError, match="no disk can be made in the storage pool p: No space") as raised:
        await elsewhere.make_volumes("virsh", "qemu+ssh://o/system", "p", made)
    assert raised.value.hint == "free some space"


async def test_files_are_brought_with_progress_or_a_reason(monkeypatch, tmp_path):
    program = tmp_path / "streams"
    program.write_text(
        "#!/bin/sh\necho '1 waiting 9'\necho '0 3 9'\n[ $3 != full ] || { echo no room; exit 1; }\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(elsewhere, "STREAMS", (str(program),))
    contents = [Content("/a", "ab"), Content("/c", "cd")]
    told = []
    await elsewhere.place(THERE, contents, lambda *seen: told.append(seen))
    assert told == [(contents[1], 0, 9, True), (contents[0], 3, 9, False)]
    with pytest.raises(DriverError, match="cannot be put into the storage pool full on other: no room"):
        await elsewhere.place(replace(THERE, pool="full"), contents, lambda *seen: None)


async def test_an_upload_that_goes_on_is_waited_for_and_one_that_stalls_is_not(
    mock_clock, monkeypatch, tmp_path
):
    program = tmp_path / "streams"
    program.write_text('#!/bin/sh\nexec <$0.go\nfor n in 1 2 3 4; do echo "0 $n 9"; read -r line; done\n')
    program.chmod(0o755)
    os.mkfifo(tmp_path / "streams.go")
    # For both directions, so that neither side waits for the other to open it, or finds an end.
    go = os.open(tmp_path / "streams.go", os.O_RDWR)
    monkeypatch.setattr(elsewhere, "STREAMS", (str(program),))

    def told(content, done, whole, waiting):
        mock_clock.jump(elsewhere.STALLED - 1 if done < 4 else elsewhere.STALLED)
        if done < 4:
            os.write(go, b"on\n")

    with pytest.raises(DriverError, match="nothing more of the image went to other within 120 s") as raised:
        await elsewhere.place(THERE, [Content("/a", "ab")], told)
    os.close(go)
    assert raised.value.transient
    assert mock_clock.current_time() == 4 * elsewhere.STALLED - 3


async def test_an_unknown_machine_and_no_virsh_are_told(virsh, monkeypatch):
    virsh()
    assert "no machine for vax" in (await module.probe("vax", {})).reasons[0].text
    monkeypatch.setattr(module.shutil, "which", lambda name: None)
    assert (await module.probe("x86_64", {})).reasons[0].text == "virsh is not installed"
    with pytest.raises(DriverError, match="this host was not probed"):
        LibvirtDriver().plan(request_for())


async def test_a_release_asks_for_the_domain_of_the_mark(virsh):
    log = virsh(answer="echo \"error: failed to get domain 'x'\" >&2; exit 1")
    await LibvirtDriver().release({"mark": "m-1", "uri": "qemu:///session"})
    assert log() == f"-c qemu:///session --quiet destroy {uuid_of('m-1')} LIBVIRT_AUTOSTART=1\n"
    virsh(answer="echo 'error: failed to connect to the hypervisor\nerror: no' >&2; exit 1")
    with pytest.raises(DriverError, match=r"cannot be ended: no$"):
        await LibvirtDriver().release({"mark": "m-1", "uri": "qemu:///session"})


def test_the_default_is_libvirts_own(monkeypatch):
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    assert module.default_uri() == "qemu:///system"
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert module.default_uri() == "qemu:///session"
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+ssh://h/system")
    assert module.default_uri() == "qemu+ssh://h/system"
