"""What carries streams of another host: how files are put into a pool, and how two sides are joined."""

from __future__ import annotations

import ctypes
import os
import select
import socket
import sys
import threading
from contextlib import closing
from types import SimpleNamespace

import pytest

from kenaz_drivers.libvirt.streams import library
from kenaz_drivers.libvirt.streams.carrier import HELD, Carrier
from kenaz_drivers.libvirt.streams.program import main
from kenaz_drivers.libvirt.streams.store import PIECE, Busy, Failed, Gone
from kenaz_drivers.libvirt.streams.upload import GAP, POLL, STILL, extents, put

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="UNIX sockets")


class Store:
    """A pool in memory. So many looks and writes find it `busy`; `full` is how many bytes it takes."""

    def __init__(self, busy=0, full=1 << 40):
        self.volumes = {}
        self.busy = busy
        self.full = full
        self.written = []
        self.time = 0

    def _volume(self, name):
        if name not in self.volumes:
            raise Gone("no storage vol")
        if self.busy:
            self.busy -= 1
            raise Busy
        return self.volumes[name]

    def create(self, name, size):
        if name in self.volumes:
            return False
        self.volumes[name] = bytearray(size)
        return True

    def read(self, name, offset, length):
        return bytes(self._volume(name)[offset : offset + length])

    def write(self, name, offset, length, pieces):
        volume = self._volume(name)
        data = b"".join(pieces)
        assert len(data) == length
        self.written.append((offset, length))
        if sum(length for _, length in self.written) > self.full:
            raise Failed("No space left on device")
        self.time += 1
        volume[offset : offset + length] = data

    def stamp(self, name):
        if name not in self.volumes:
            raise Gone("no storage vol")
        return str(self.time)

    def delete(self, name):
        del self.volumes[name]


@pytest.fixture
def content(tmp_path):
    """Makes a file; its descriptor."""
    made = []

    def make(*runs, size):
        with (tmp_path / str(len(made))).open("w+b") as file:
            for offset, data in runs:
                file.seek(offset)
                file.write(data)
            file.truncate(size)
            made.append(os.dup(file.fileno()))
        return made[-1]

    yield make
    for descriptor in made:
        os.close(descriptor)


def bring(store, file, other=lambda waits: None):
    """Puts it there; `other` is what another does while we wait, by how often we did."""
    told, waits = [], []

    def wait(seconds):
        waits.append(seconds)
        other(len(waits))

    put(store, file, "k", told.append, wait)
    os.lseek(file, 0, os.SEEK_SET)
    size = os.fstat(file).st_size
    whole = b""
    while data := os.read(file, 1 << 20):
        whole += data
    assert (bytes(store.volumes["k"]), len(whole)) == (whole, size)
    return told, waits


def test_a_file_comes_whole_with_its_first_piece_last(content):
    store = Store()
    file = content((0, b"\0" * 100_000 + b"x" * 200_000), size=5 * PIECE)
    told, waits = bring(store, file)
    assert store.written[-1] == (PIECE, PIECE)  # the first that is not all zeros
    assert store.written[0][0] == 2 * PIECE
    done, whole = map(int, told[-1].split())
    assert 200_000 < done == whole <= 4 * PIECE  # what is all zeros before that does not go
    assert waits == []
    before = len(store.written)
    assert bring(store, file) == ([], [])  # it is there
    assert len(store.written) == before


def test_holes_are_left_out(content):
    store = Store()
    far = 10 * GAP
    bring(store, content((0, b"a" * PIECE), (far, b"b" * 10), size=far + 10))
    assert sum(length for _, length in store.written) < 2 * GAP
    assert list(extents(content(size=GAP), GAP)) == []
    bring(Store(), content(size=GAP))
    bring(Store(), content(size=0))


def test_what_stands_still_is_begun_anew(content):
    file = content((0, b"a" * 3 * PIECE), size=3 * PIECE)
    store = Store()
    store.volumes["k"] = bytearray(3 * PIECE)  # all but the piece that comes last may be there
    told, waits = bring(store, file)
    assert waits == [POLL] * (STILL + 1)
    assert told[: STILL + 2] == [f"waiting {3 * PIECE}"] * (STILL + 1) + [f"{PIECE} {3 * PIECE}"]


@pytest.mark.parametrize("breaks_off", [False, True])
def test_what_somebody_else_brings_is_waited_for(content, breaks_off):
    file = content((0, b"a" * 3 * PIECE), size=3 * PIECE)
    store = Store()
    store.volumes["k"] = bytearray(3 * PIECE)

    def other(waits):
        if waits <= 3 * STILL and waits % (STILL - 1) == 0:  # slowly
            store.time += 1
        if waits == 3 * STILL and not breaks_off:
            store.volumes["k"][:] = b"a" * 3 * PIECE

    told, waits = bring(store, file, other)
    assert waits == [POLL] * (3 * (STILL - 1) + STILL + 1 if breaks_off else 3 * STILL)
    assert (store.written != []) == breaks_off
    assert len(told) == len(waits) + (3 if breaks_off else 0)


def test_what_is_busy_is_waited_for(content):
    file = content((0, b"a" * 3 * PIECE), size=3 * PIECE)
    done = Store(busy=3)
    done.volumes["k"] = bytearray(b"a" * 3 * PIECE)
    assert len(bring(done, file)[1]) == 3
    assert done.written == []
    held = Store()
    held.create = lambda name, size: Store.create(held, name, size) and not setattr(held, "busy", 2)
    _, waits = bring(held, file)  # somebody looks while it is written
    assert waits == [POLL / 10] * 2


def test_what_somebody_else_deletes_is_made_anew(content):
    """Whoever made it and failed; or a person, and a third has made it again by then."""
    file = content((0, b"a" * 3 * PIECE), size=3 * PIECE)
    store = Store()
    store.volumes["k"] = bytearray(3 * PIECE)
    bring(store, file, lambda waits: store.delete("k") if waits == 2 else None)
    replaced = Store()

    def written(name, offset, length, pieces):
        Store.write(replaced, name, offset, length, pieces)
        replaced.write = lambda *words: Store.write(replaced, *words)
        replaced.volumes["k"] = bytearray(3 * PIECE)

    replaced.write = written
    before = []
    bring(replaced, file, lambda waits: before.append(bytes(replaced.volumes["k"])))
    assert set(before) == {b"\0" * 3 * PIECE}  # it was not called whole
    assert replaced.written == [(PIECE, 2 * PIECE), (PIECE, 2 * PIECE), (0, PIECE)]
    never = Store()
    never.create = lambda name, size: True
    with pytest.raises(Gone):
        bring(never, file)


@pytest.mark.parametrize("others", [False, True])
def test_a_pool_that_is_full_keeps_nothing_of_it_but_what_somebody_else_writes(content, others):
    store = Store(full=PIECE)

    def wait(seconds):
        store.time += others

    with pytest.raises(Failed, match="No space left"):
        put(store, content((0, b"a" * 4 * PIECE), size=4 * PIECE), "k", lambda line: None, wait)
    assert list(store.volumes) == ["k"] * others


class Library:
    """libvirt's event loop and one stream of it, over a socket."""

    def __init__(self, far):
        self.far = far
        self.far.setblocking(False)
        self.near_events = self.far_events = 0
        self.read = 0

    def call(self, name, *arguments):
        calls = {
            "virStreamEventAddCallback": self.add_stream,
            "virStreamEventUpdateCallback": self.update_stream,
            "virEventAddHandle": self.add_near,
            "virEventRunDefaultImpl": self.run_once,
        }
        return calls[name](*arguments)

    def add_stream(self, stream, events, callback, *_):
        self.on_stream, self.far_events = callback, events

    def update_stream(self, stream, events):
        self.far_events = events

    def add_near(self, file, events, callback, *_):
        self.file, self.near_events, self.on_near = file, events, callback
        return 7

    def update_near(self, watch, events):
        assert watch == 7
        self.near_events = events

    def run_once(self):
        wants = {self.file: self.near_events, self.far.fileno(): self.far_events}
        ready = select.select(
            [f for f, e in wants.items() if e & 1], [f for f, e in wants.items() if e & 2], []
        )
        for file in {*ready[0], *ready[1]}:
            events = (file in ready[0]) | 2 * (file in ready[1])
            if file == self.file:
                self.on_near(7, file, events, None)
            else:
                self.on_stream(None, events, None)

    # As Connection has them.

    @property
    def library(self):
        return SimpleNamespace(virEventUpdateHandle=self.update_near)

    def receive(self, stream):
        try:
            data = self.far.recv(PIECE)
        except BlockingIOError:
            return None
        self.read += len(data)
        return data

    def send(self, stream, data):
        try:
            return self.far.send(data)
        except BlockingIOError:
            return None


@pytest.fixture
def joined():
    """A carrier that runs: what is on our side, what is on the other, and the library between."""
    near, ours = socket.socketpair()
    far, other = socket.socketpair()
    library = Library(far)
    failures = []

    def run():
        try:
            Carrier(library, None, near).run()
        except (Failed, OSError) as error:
            failures.append(error)
        near.close()

    thread = threading.Thread(target=run)
    thread.start()
    with closing(ours), closing(other), closing(far):
        yield ours, other, library
        other.close()
        ours.close()
        thread.join(30)
        assert not thread.is_alive()


def read_all(end, length):
    got = b""
    while len(got) < length:
        got += end.recv(1 << 20)
    return got


def test_both_directions_come_whole_and_one_that_waits_holds_up_none(joined):
    ours, other, library = joined
    much = os.urandom(3 * HELD)
    writing = threading.Thread(target=other.sendall, args=(much,))
    writing.start()
    back = os.urandom(HELD)
    sending = threading.Thread(target=ours.sendall, args=(back,))
    sending.start()
    # Nobody reads on our side yet; the other direction goes on.
    assert read_all(other, len(back)) == back
    assert library.read < 2 * HELD
    assert read_all(ours, len(much)) == much
    writing.join(30)
    sending.join(30)


def test_the_end_of_either_side_is_the_end_and_what_was_said_before_is_heard(joined):
    ours, other, _ = joined
    other.sendall(b"last words")
    other.close()
    assert read_all(ours, 10) == b"last words"
    assert ours.recv(1) == b""


def test_what_libvirt_says_is_told(monkeypatch, capsys):
    """The program, with a libvirt that refuses."""

    class Refusing:
        def __init__(self):
            for name in library._CALLS:
                setattr(self, name, self._function(name))

        @staticmethod
        def _function(name):
            def function(*arguments):
                if name == "virGetLastErrorMessage":
                    return b"authentication failed"
                if name == "virConnectOpenAuth":
                    assert arguments == (b"qemu+tcp://nowhere/system", "as virsh does", 0)
                    return None
                return 0

            return function

    monkeypatch.setattr(ctypes, "CDLL", lambda name: Refusing())
    monkeypatch.setattr(library, "_credentials", lambda _: "as virsh does")
    assert main([]) == 0
    assert main(["qemu+tcp://nowhere/system", "upload", "default", "/f", "n"]) == 1
    assert main(["qemu+tcp://nowhere/system", "console", "uuid", "/s"]) == 1
    assert capsys.readouterr().err == "authentication failed\n" * 2

    def missing(name):
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert main([]) == 1
    assert "libvirt.so.0: cannot open" in capsys.readouterr().err
