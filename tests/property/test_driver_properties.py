"""Whatever is asked, a command line is well formed; whatever comes, the monitor's codec copes."""

import json
from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from kenaz_drivers._common.output import LogTail
from kenaz_drivers.contract import Capabilities, Disk, DriverError, LaunchRequest
from kenaz_drivers.qemu.argv import Facts, build
from kenaz_drivers.qemu.qmp import Event, QmpCodec, QmpError, Reply

paths = st.text(max_size=60).map(lambda text: "/" + text)
disks = st.builds(
    Disk,
    st.sampled_from(["root", "config", "workbench", "swap"]),
    paths,
    st.sampled_from(["raw", "qcow2", "vhdx"]),
)
requests = st.builds(
    LaunchRequest,
    session=st.text(max_size=10),
    directory=paths,
    runtime=paths,
    cpus=st.integers(1, 64),
    memory=st.integers(1, 1 << 40),
    transport=st.sampled_from(["virtio-serial", "vsock", "unix"]),
    channel=paths,
    port=st.integers(1, 65535),
    kernel=st.just("") | paths,
    initrd=st.just("") | paths,
    cmdline=st.text(max_size=40),
    disks=st.lists(disks, max_size=3).map(tuple),
    network=st.sampled_from(["none", "nat", "other"]),
    cid=st.none() | st.integers(3, 100),
    options=st.fixed_dictionaries(
        {}, optional={"machine": st.sampled_from(["auto", "microvm", "q35", "virt"])}
    ),
    capabilities=st.builds(
        Capabilities,
        usable=st.just(True),
        reasons=st.just(()),
        arch=st.sampled_from(["x86_64", "aarch64"]),
        accelerator=st.sampled_from(["tcg", "kvm", "hvf", "whpx"]),
    ),
)
FACTS = Facts("/usr/bin/qemu", "9.0", ("microvm", "q35", "virt"), ("tcg",), sandbox=True)


def split(option):
    """QEMU's own rule (qemu_opts_parse): a comma separates, two commas are one of the value."""
    values, current, rest = [], "", option
    while rest:
        if rest.startswith(",,"):
            current, rest = current + ",", rest[2:]
        elif rest.startswith(","):
            values, current, rest = [*values, current], "", rest[1:]
        else:
            current, rest = current + rest[0], rest[1:]
    return [*values, current]


@given(requests)
def test_a_command_line_is_well_formed_or_refused(request):
    try:
        command = build(request, FACTS)
    except DriverError:
        return
    assert all(argument and "\0" not in argument for argument in command.argv)
    assert command.argv == build(request, FACTS).argv
    drives = [
        split(value) for flag, value in zip(command.argv, command.argv[1:], strict=False) if flag == "-drive"
    ]
    assert [drive[3] for drive in drives] == [f"file={disk.path}" for disk in request.disks]
    if request.transport == "virtio-serial":
        chardevs = [
            split(value)
            for flag, value in zip(command.argv, command.argv[1:], strict=False)
            if flag == "-chardev"
        ]
        assert ["socket", "id=channel", f"path={request.channel}"] in chardevs
    used = {number for number in range(3, 9) if f"fd={number}" in ",".join(command.argv)}
    assert used == set(command.descriptors)


@given(requests)
def test_the_command_line_depends_on_nothing_that_is_secret(request):
    elsewhere = replace(request, directory="/elsewhere", runtime="/else")
    try:
        argv = build(request, FACTS).argv
    except DriverError:
        return
    assert build(elsewhere, FACTS).argv == argv


messages = st.lists(
    st.builds(Reply, st.integers(1, 99), value=st.dictionaries(st.text(), st.integers()))
    | st.builds(Event, st.text(min_size=1), st.dictionaries(st.text(), st.integers()))
)


@given(messages, st.data())
def test_any_chunking_gives_the_same_messages(sent, data):
    wire = b""
    for message in sent:
        match message:
            case Reply():
                wire += json.dumps({"return": message.value, "id": message.number}).encode() + b"\r\n"
            case Event():
                wire += json.dumps({"event": message.name, "data": message.data}).encode() + b"\r\n"
    codec, received = QmpCodec(), []
    while wire:
        size = data.draw(st.integers(1, len(wire)))
        received += codec.feed(wire[:size])
        wire = wire[size:]
    assert received == sent


@given(st.lists(st.binary(max_size=200), max_size=20))
def test_garbage_is_an_error_and_nothing_else(chunks):
    codec = QmpCodec()
    for chunk in chunks:
        try:
            codec.feed(chunk)
        except QmpError:
            return


@given(st.lists(st.binary(max_size=300)))
def test_a_log_is_bounded_and_printable(chunks):
    tail = LogTail(lines=5, width=20)
    for chunk in chunks:
        tail.feed(chunk)
    lines = tail.lines()
    assert len(lines) <= 5
    assert all(0 < len(line) <= 20 and line.isprintable() for line in lines)
