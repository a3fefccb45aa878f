"""Children: the guard, waiting, ending, and ending by handle. With real, tiny processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import trio

from kenaz_drivers._common import guard
from kenaz_drivers._common import process as module
from kenaz_drivers._common import terminate as terminate_module
from kenaz_drivers._common.identity import boot_id, identify, is_alive
from kenaz_drivers._common.process import GUARD, capture, spawn
from kenaz_drivers._common.terminate import terminate
from kenaz_drivers.contract import MARK, DriverError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SLEEP = ("sleep", "600")
PATIENCE = 30.0
"""Seconds a wait may take on a busy host."""

OURS = f"m-{os.getpid()}-"
"""How marks begin here: who runs these tests at the same time has others, or they would end each other's."""


async def exec_done(child, name="sleep"):
    """Returns when the guard has become the program."""
    with trio.fail_after(PATIENCE):
        while Path(f"/proc/{child.pid}/comm").read_text().strip() != name:
            await trio.sleep(0.005)


async def test_the_exit_code_is_that_of_the_program():
    child = spawn(["sh", "-c", "exit 7"])
    assert await child.wait() == 7
    assert await child.wait() == 7
    child.send_signal(signal.SIGTERM)
    child.kill_group()


async def test_several_tasks_may_wait():
    child = spawn(["true"])
    codes = []

    async def wait():
        codes.append(await child.wait())

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        nursery.start_soon(wait)
    assert codes == [0, 0]


async def test_the_program_is_a_group_leader_without_a_terminal_and_with_clean_signals():
    child = spawn(SLEEP)
    try:
        await exec_done(child)
        assert os.getpgid(child.pid) == os.getsid(child.pid) == child.pid
        status = Path(f"/proc/{child.pid}/status").read_text()
        ignored = int(status.split("SigIgn:")[1].split()[0], 16)
        assert not ignored & (1 << (signal.SIGPIPE - 1))
    finally:
        assert await child.end() == -signal.SIGKILL
    assert not is_alive(child.handle)


async def test_descriptors_get_the_numbers_asked_for_even_crosswise():
    left, right = socket.socketpair()
    with left, right:
        a, b = left.fileno(), right.fileno()
        script = "readlink /proc/self/fd/{}"
        for theirs, ours in {a: b, b: a}.items():
            with module.open_pipe() as (stream, out):
                child = spawn(["sh", "-c", script.format(theirs)], descriptors={a: b, b: a}, stdout=out)
            async with stream:
                said = b"".join([data async for data in stream]).decode().strip()
            await child.wait()
            assert said == os.readlink(f"/proc/self/fd/{ours}")


async def test_other_descriptors_and_the_sources_are_closed():
    left, right = socket.socketpair()
    with left, right:
        captured_fd = left.fileno()
        with module.open_pipe() as (stream, out):
            child = spawn(["ls", "/proc/self/fd"], descriptors={9: captured_fd}, stdout=out)
        async with stream:
            said = b"".join([data async for data in stream]).split()
        await child.wait()
    assert set(said) == {b"0", b"1", b"2", b"9", b"3"}  # 3 is the directory that ls reads


async def test_limits_and_the_bar_on_privileges_reach_the_program():
    script = "ulimit -c; ulimit -d; grep NoNewPrivs /proc/self/status"
    with module.open_pipe() as (stream, out):
        child = spawn(
            ["sh", "-c", script], stdout=out, limits={"core": 0, "data": 1 << 30}, no_new_privileges=True
        )
    async with stream:
        said = b"".join([data async for data in stream]).split()
    assert await child.wait() == 0
    assert said == [b"0", b"1048576", b"NoNewPrivs:", b"1"]


async def test_a_program_that_does_not_exist_is_code_127_with_a_reason():
    captured = await capture(["/no/such/program"], deadline=PATIENCE)
    assert captured.code == guard.NOT_STARTED
    assert captured.text == "cannot start /no/such/program: No such file or directory\n"


async def test_a_child_whose_parent_is_gone_does_not_start():
    done = await trio.run_process(
        [sys.executable, "-I", "-S", "-E", str(GUARD), "--parent", "1", "--", "true"],
        check=False,
        capture_stderr=True,
    )
    assert done.returncode == guard.FAILED
    assert done.stderr == b"guard: the launcher is gone\n"


async def test_a_bad_descriptor_stops_the_guard():
    argv = [
        sys.executable,
        "-I",
        "-S",
        "-E",
        str(GUARD),
        "--parent",
        str(os.getpid()),
        "--dup=99:3",
        "--",
        "true",
    ]
    with subprocess.Popen(argv, stderr=subprocess.PIPE) as popen:
        assert popen.communicate()[1] == b"guard: [Errno 9] Bad file descriptor\n"
    assert popen.returncode == guard.FAILED


async def test_the_whole_group_ends_with_its_leader(tmp_path):
    pid_file = tmp_path / "pid"
    child = spawn(["sh", "-c", f"sleep 600 & echo $! > {pid_file}; exit 3"])
    assert await child.wait() == 3
    grandchild = int(pid_file.read_text())
    with trio.fail_after(PATIENCE):
        while is_alive(identify(grandchild)):
            await trio.sleep(0.01)


async def test_end_asks_first_and_kills_then(tmp_path):
    polite = spawn(SLEEP)
    await exec_done(polite)
    assert await polite.end((signal.SIGTERM, PATIENCE)) == -signal.SIGTERM

    stubborn = spawn(["sh", "-c", f"trap '' TERM; echo $$ > {tmp_path}/deaf; while :; do sleep 0.05; done"])
    await number_in(tmp_path / "deaf")
    assert await stubborn.end((signal.SIGTERM, 0.1)) == -signal.SIGKILL


async def test_end_takes_its_time_even_when_cancelled():
    child = spawn(SLEEP)
    with trio.CancelScope() as scope:
        scope.cancel()
        await child.end()
    assert not is_alive(child.handle)


async def test_a_process_that_does_not_die_is_an_error():
    child = spawn(SLEEP)
    await exec_done(child)
    real = child.kill_group
    child.kill_group = lambda: None
    try:
        with pytest.raises(DriverError, match="does not die"):
            await child.end(limit=0.05)
    finally:
        child.kill_group = real
        await child.end()


async def test_a_command_that_cannot_be_made_is_an_error():
    with pytest.raises(DriverError, match="cannot start"):
        spawn(["tr\0ue"])


@pytest.mark.parametrize("missing", ["job", "start time"])
async def test_a_child_that_nobody_could_end_later_is_ended_now(monkeypatch, missing):
    started = []

    class Popen(subprocess.Popen):
        def __init__(self, *args, **how):
            super().__init__(*args, **how)
            started.append(self)

    def fails(*args):
        raise DriverError(f"no {missing}")

    monkeypatch.setattr(subprocess, "Popen", Popen)
    if missing == "job":
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setattr(module, "_job", fails, raising=False)
    else:
        monkeypatch.setattr(module, "identify", fails)
    with pytest.raises(DriverError, match=f"no {missing}"):
        spawn(SLEEP)
    assert [popen.returncode for popen in started] == [-signal.SIGKILL]


async def test_without_pidfds_a_thread_waits(monkeypatch):
    def none(pid):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "pidfd_open", none)
    child = spawn(SLEEP)
    await exec_done(child)
    with trio.move_on_after(0.05) as scope:
        await child.wait()
    assert scope.cancelled_caught
    assert await child.end((signal.SIGTERM, PATIENCE)) == -signal.SIGTERM


async def test_terminate_ends_the_group_of_a_handle_stopped_or_not(tmp_path):
    pid_file = tmp_path / "pid"
    child = spawn(["sh", "-c", f"sleep 600 & echo $! > {pid_file}; wait"])
    with trio.fail_after(PATIENCE):
        while not (pid_file.exists() and pid_file.read_text().endswith("\n")):
            await trio.sleep(0.01)
    grandchild = identify(int(pid_file.read_text()))
    os.kill(child.pid, signal.SIGSTOP)
    await terminate(child.handle)
    assert not is_alive(child.handle)
    with trio.fail_after(PATIENCE):
        while is_alive(grandchild):
            await trio.sleep(0.01)
    await terminate(child.handle)  # a zombie
    assert await child.wait() == -signal.SIGKILL
    await terminate(child.handle)  # gone


async def test_terminate_leaves_others_groups_alone():
    member = subprocess.Popen(["sleep", "600"])
    try:
        await terminate(identify(member.pid))
        assert member.wait(5) == -signal.SIGKILL
    finally:
        member.kill()
        member.wait()


async def number_in(file):
    with trio.fail_after(PATIENCE):
        while not (file.exists() and file.read_text().endswith("\n")):
            await trio.sleep(0.01)
    return identify(int(file.read_text()))


async def test_alone_means_that_process_only(tmp_path):
    child = spawn(["sh", "-c", f"sleep 600 & echo $! > {tmp_path}/pid; wait"])
    grandchild = await number_in(tmp_path / "pid")
    await terminate(child.handle, alone=True)
    assert (is_alive(child.handle), is_alive(grandchild)) == (False, True)
    assert await child.wait() == -signal.SIGKILL  # which ends the group
    with trio.fail_after(PATIENCE):
        while is_alive(grandchild):
            await trio.sleep(0.01)


async def settled(handle, mark):
    """Returns when that process has become `sleep`. In the midst of an exec it has no environment."""
    place = Path(f"/proc/{handle['pid']}")
    with trio.fail_after(PATIENCE):
        while not (
            (place / "comm").read_text().strip() == "sleep"
            and f"{MARK}={mark}".encode() in (place / "environ").read_bytes().split(b"\0")
        ):
            await trio.sleep(0.005)


@pytest.mark.parametrize("leader", ["lives", "is gone", "was never known"])
async def test_what_left_its_leader_is_found_by_its_mark(tmp_path, leader):
    script = f"setsid sh -c 'echo $$ > {tmp_path}/far; exec sleep 600' & wait"
    child = spawn(["sh", "-c", script], env={**os.environ, MARK: f"{OURS}1"})
    other = spawn(SLEEP, env={**os.environ, MARK: f"{OURS}12"})
    try:
        far = await number_in(tmp_path / "far")
        assert child.handle["mark"] == f"{OURS}1"
        with trio.fail_after(PATIENCE):
            while os.getsid(far["pid"]) != far["pid"]:  # its number is told before it leaves
                await trio.sleep(0.005)
        await settled(far, f"{OURS}1")
        if leader == "is gone":
            await child.end()
            assert is_alive(far)
        await terminate({"mark": f"{OURS}1"} if leader == "was never known" else child.handle)
        assert (is_alive(child.handle), is_alive(far), is_alive(other.handle)) == (False, False, True)
        await terminate({"mark": f"{OURS}1"})
        assert is_alive(other.handle)
    finally:
        await child.end()
        await other.end()


async def test_who_hides_its_mark_is_found_in_the_session_of_a_leader_that_is_proven(tmp_path):
    """In a group of its own and without an environment, in the session of a leader that lives; and of one
    that is gone, beside a process with the mark, while which is there that session is no other's."""
    hide = f"set -m; env -i sleep 600 & echo $! > {tmp_path}/"
    child = spawn(["bash", "-c", f"{hide}one; wait"], env={**os.environ, MARK: f"{OURS}2"})
    hidden = await number_in(tmp_path / "one")
    await terminate(child.handle)
    assert not is_alive(hidden)
    await child.end()

    script = f"{hide}two; sleep 600 & echo $! > {tmp_path}/marked; exec sleep 600"
    child = spawn(["bash", "-c", script], env={**os.environ, MARK: f"{OURS}3"})
    hidden, marked = await number_in(tmp_path / "two"), await number_in(tmp_path / "marked")
    await settled(marked, f"{OURS}3")
    os.kill(child.pid, signal.SIGKILL)
    await child.wait()
    assert (is_alive(hidden), is_alive(marked)) == (True, True)
    await terminate({**child.handle, "mark": f"{OURS}0"})  # nothing proves it
    assert is_alive(hidden)
    await terminate(child.handle)
    assert (is_alive(hidden), is_alive(marked)) == (False, False)


async def test_a_handle_of_another_boot_says_nothing_of_this_one():
    child = spawn(SLEEP, env={**os.environ, MARK: f"{OURS}4"})
    await terminate({"mark": f"{OURS}4", "boot_id": "another"})
    assert is_alive(child.handle)
    await child.end()


@pytest.mark.parametrize("wrong", [{"start_time": "1"}, {"boot_id": "another"}])
async def test_a_reused_number_is_never_touched(wrong):
    child = spawn(SLEEP)
    try:
        await terminate({**child.handle, **wrong})
        await trio.sleep(0.05)
        assert is_alive(child.handle)
    finally:
        await child.end()


async def test_a_process_of_another_user_is_an_error(monkeypatch):
    child = spawn(SLEEP)

    def refuse(*args):
        raise PermissionError(1, "Operation not permitted")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "pidfd_send_signal", refuse)
            with pytest.raises(DriverError, match="belongs to another user"):
                await terminate(child.handle)
    finally:
        await child.end()


async def test_terminate_gives_up_after_its_deadline(monkeypatch):
    child = spawn(SLEEP)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(signal, "pidfd_send_signal", lambda *args: None)
            patch.setattr(os, "killpg", lambda *args: None)
            with pytest.raises(DriverError, match="does not die"):
                await terminate(child.handle, deadline=0.05)
    finally:
        await child.end()


async def test_capture_keeps_the_beginning_and_ends_what_takes_too_long():
    assert (await capture(["sh", "-c", "echo out; echo err >&2; exit 2"], deadline=PATIENCE)).code == 2
    assert (await capture(["sh", "-c", "echo abcdef"], deadline=PATIENCE, limit=3)).text == "abc"
    for deadline in (0.3, 3.0, PATIENCE):  # in which a guard and a shell have to start, too
        started = time.monotonic()
        captured = await capture(["sh", "-c", "echo a; sleep 600"], deadline=deadline)
        if captured.text:
            break
    assert (captured.code, captured.text) == (None, "a\n")
    assert time.monotonic() - started < deadline + PATIENCE


def test_names_with_spaces_and_parentheses_do_not_confuse(tmp_path):
    program = tmp_path / "a) R 1 (b"
    program.symlink_to("/bin/sleep")
    with subprocess.Popen([str(program), "600"]) as popen:
        assert is_alive(identify(popen.pid))
        popen.kill()
        popen.wait()
        assert not is_alive({"pid": popen.pid, "start_time": "", "boot_id": boot_id()})


def test_a_platform_without_boot_ids_has_an_empty_one(monkeypatch):
    def missing(*args, **kwargs):
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert boot_id() == ""
    assert identify(1)["start_time"] == ""


def test_ps_names_a_process_alike_whoever_asks(monkeypatch):
    """As BSD's writes it: by strftime("%c") of localtime, in the environment that it is given."""

    def ps(command, *, env=None, **how):
        seen = os.environ if env is None else env
        began = f"{seen.get('LC_ALL') or seen.get('LANG')} {seen.get('TZ')}"
        return subprocess.CompletedProcess(command, 0, f"Ss   {began}\n", "")

    monkeypatch.setattr(subprocess, "run", ps)
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.delenv("LC_ALL", raising=False)
    monkeypatch.setenv("LANG", "C")
    handle = identify(7)
    monkeypatch.setenv("LANG", "de_DE.UTF-8")
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    assert is_alive(handle)


async def test_a_process_that_ends_while_it_is_ended_is_gone(monkeypatch):
    """Outside of Linux nothing pins it between the look and the signal."""
    looks = iter([True, False])
    monkeypatch.setattr(sys, "platform", "darwin")
    monkeypatch.setattr(terminate_module, "is_alive", lambda handle: next(looks))

    def gone(pid, number):
        raise ProcessLookupError

    monkeypatch.setattr(os, "kill", gone)
    await terminate({"pid": 7, "start_time": "then", "boot_id": ""})


def test_guard_takes_its_own_options_only_before_the_dashes():
    options, argv = guard.parse(["--parent", "5", "--dup=7:3", "--limit=core:0", "--", "x", "--", "--parent"])
    assert (options.parent, options.dup, options.limit) == (5, [(7, 3)], [("core", 0)])
    assert argv == ["x", "--", "--parent"]


def test_guard_in_this_process(monkeypatch, capsys):
    """The same code once more where coverage can see it, with nothing irreversible in it."""
    started = []
    monkeypatch.setattr(os, "execvp", lambda name, argv: started.append(argv))
    monkeypatch.setattr(signal, "signal", lambda *args: None)
    left, right = os.pipe()
    try:
        spare = os.dup(left)
        arguments = ["--parent", str(os.getppid()), f"--dup={left}:{spare}", "--limit=core:0", "--", "x"]
        import ctypes

        class Libc:
            def prctl(self, option, *values):
                return 0

        monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: Libc())
        import resource

        monkeypatch.setattr(resource, "setrlimit", lambda *args: None)
        guard.main(arguments)
        assert started == [["x"]]
        assert os.path.sameopenfile(spare, left)

        monkeypatch.setattr(Libc, "prctl", lambda *args: -1)
        assert guard.main(arguments) == guard.FAILED
        assert "prctl(1)" in capsys.readouterr().err
    finally:
        for number in (left, right, spare):
            os.close(number)
