"""The driver hyperv against a stand-in for PowerShell that knows the module's commands and parameters."""

import json
import os
import shlex
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import trio

from kenaz_drivers.contract import Disk, DriverError, LaunchRequest
from kenaz_drivers.hyperv import driver as module
from kenaz_drivers.hyperv.driver import HypervDriver
from kenaz_drivers.hyperv.scripts import script

STANDIN = Path(__file__).parent / "standins/powershell.py"

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is for Linux")


@pytest.fixture
def driver():
    return HypervDriver()


@pytest.fixture
def place(tmp_path):
    """A directory whose name would end the text of a careless script, twice."""
    path = tmp_path / "it's $(Stop-Computer) \u2019; Remove-Item 'x\u201b \"&| `n"
    path.mkdir()
    for name in ("base.vhdx", "config.iso"):
        (path / name).write_bytes(b"x")
    return path


@pytest.fixture
def machines(tmp_path):
    """The machines that there are, by id."""
    return lambda: json.loads((tmp_path / "state").read_text() or "{}")


@pytest.fixture
async def plan_for(driver, tmp_path, place):
    async def plan(trap="", **changes):
        program = tmp_path / f"powershell-{trap}"
        words = [sys.executable, str(STANDIN), *([f"--trap={trap}"] if trap else []), str(tmp_path / "state")]
        program.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        program.chmod(0o755)
        capabilities = await driver.probe("x86_64", {"powershell": str(program)})
        request = LaunchRequest(
            session="s",
            directory=str(place),
            runtime=str(tmp_path),
            cpus=2,
            memory=(256 << 20) + 1,
            transport="hyperv",
            channel="",
            port=7881,
            capabilities=capabilities,
            disks=(
                Disk(
                    "root",
                    str(place / "root.vhdx"),
                    "vhdx",
                    base=str(place / "base.vhdx"),
                    size=(1 << 30) + 1,
                ),
                Disk("config", str(place / "config.iso"), "iso", readonly=True),
            ),
            mark="s-0123456789abcdef",
        )
        return driver.plan(replace(request, **changes))

    return plan


async def test_a_machine_is_made_started_shut_down_and_removed(driver, plan_for, machines, place):
    plan = await plan_for(options={"secureBoot": True})
    async with driver.launch(plan, {}) as machine:
        [(found, made)] = machines().items()
        assert machine.handle["vm"] == found
        assert (made["State"], made["Generation"], made["adapters"]) == ("Off", 2, 0)
        assert (made["Name"], made["VHDPath"]) == ("kenaz-s-0123456789abcdef", str(place / "root.vhdx"))
        assert made["MemoryStartupBytes"] == 258 << 20
        log = made["log"]
        assert log["firmware"] == {
            "EnableSecureBoot": "On",
            "SecureBootTemplate": "MicrosoftUEFICertificateAuthority",
        }
        assert log["dvd"] == {"Path": str(place / "config.iso")}
        assert log["com"] == {"Number": 1, "Path": r"\\.\pipe\kenaz-s-0123456789abcdef-com1"}
        assert (log["vm"]["ProcessorCount"], log["vm"]["AutomaticCheckpointsEnabled"]) == (2, False)
        await machine.ready()
        assert machines()[found]["State"] == "Running"
        await machine.powerdown()
        with trio.fail_after(20):
            ended = await machine.wait()
        assert (ended.clean, ended.reason) == (True, "the guest shut itself down")
    assert machines() == {}
    assert (place / "root.vhdx").exists()  # Remove-VM leaves disks, and the ledger gives them back
    assert (place / "root.vhdx").read_text() == f"vhdxfile {(1 << 30) + 4096}"
    assert not (place / "kenaz-s-0123456789abcdef").exists()  # what Hyper-V keeps beside them
    assert plan.trace == {"powershell": plan.data["powershell"]}


async def test_the_power_is_cut_where_the_guest_is_deaf(driver, plan_for, machines, monkeypatch):
    monkeypatch.setattr(module, "CONSOLE_PATIENCE", 0.3)
    async with driver.launch(await plan_for("deaf", network="nat"), {}) as machine:
        await machine.ready()
        assert [made["SwitchName"] for made in machines().values()] == ["Default Switch"]
        assert [made["adapters"] for made in machines().values()] == [1]
        await machine.powerdown()
        with trio.move_on_after(1):
            await machine.wait()
        assert [data async for data in machine.console()] == []
        await machine.kill()
        await machine.kill()
        assert (await machine.wait()).reason == "the launcher cut the power"
    assert machines() == {}


async def test_a_machine_that_is_half_made_is_removed(driver, plan_for, machines):
    with pytest.raises(DriverError, match="cannot be made: The operation failed because of the trap"):
        async with driver.launch(await plan_for("half"), {}):
            pass
    assert machines() == {}


async def test_a_machine_is_released_by_its_id_or_by_its_mark_alone(driver, plan_for, machines):
    plan = await plan_for()
    async with driver.launch(plan, {}) as machine:
        await machine.ready()
        for _ in range(2):
            await driver.release(machine.handle)
        assert machines() == {}
        with trio.fail_after(20):
            assert not (await machine.wait()).clean
    plan = await plan_for(disks=(Disk("root", plan_root(plan), "vhdx"), plan_config(plan)))
    async with driver.launch(plan, {}) as machine:
        await driver.release({"mark": plan.data["mark"], "powershell": plan.data["powershell"]})
        assert machines() == {}


async def test_what_powershell_says_before_its_answer_is_not_taken_for_it(driver, plan_for, machines):
    async with driver.launch(await plan_for("chatty"), {}) as machine:
        assert list(machines()) == [machine.handle["vm"]]


async def test_a_machine_that_may_not_be_seen_is_not_taken_for_removed(driver, plan_for, machines, tmp_path):
    await plan_for("denied")  # for its program alone
    async with driver.launch(await plan_for(), {}) as machine:
        denied = {**machine.handle, "powershell": str(tmp_path / "powershell-denied")}
        with pytest.raises(DriverError, match="cannot be removed: You do not have the required") as caught:
            await driver.release(denied)
        assert "Hyper-V Administrators" in caught.value.hint
        assert len(machines()) == 1


async def test_an_error_that_is_silenced_still_ends_powershell_with_1(plan_for, tmp_path):
    """Of the stand-in: what asks for a machine that may be gone has to expect it."""
    await plan_for()
    shell = module.PowerShell(str(tmp_path / "powershell-"))
    ask = "Get-VM -Name 'gone' -ErrorAction SilentlyContinue"
    with pytest.raises(DriverError, match="ended with code 1"):
        await shell.run(script(ask), "it fails", 20)
    await shell.run(script(ask, "Get-VM | Where-Object -Property Name -EQ -Value 'gone'"), "it works", 20)


def plan_root(plan):
    return str(next(Path(plan.data["powershell"]).parent.glob("it's*/root.vhdx")))


def plan_config(plan):
    path = next(Path(plan.data["powershell"]).parent.glob("it's*/config.iso"))
    return Disk("config", str(path), "iso", readonly=True)


@pytest.mark.parametrize("after", [0.02, 0.2, 0.5])
async def test_a_launch_that_is_cancelled_leaves_no_machine(driver, plan_for, machines, after):
    plan = await plan_for()
    before = len(os.listdir("/proc/self/fd"))
    with trio.move_on_after(after):
        async with driver.launch(plan, {}) as machine:
            await machine.ready()
            await machine.wait()
    assert machines() == {}
    assert len(os.listdir("/proc/self/fd")) == before


async def test_a_host_without_the_module_says_how_to_get_it(driver, plan_for, tmp_path):
    with pytest.raises(DriverError, match="Hyper-V's module is not installed"):
        await plan_for("absent")
    found = await driver.probe("x86_64", {"powershell": str(tmp_path / "powershell-absent")})
    assert not found.usable
    assert "Enable-WindowsOptionalFeature" in found.reasons[0].mend
    with pytest.raises(DriverError, match=r"00001ec9-facb-11e6-bd58-64006a7986d3 .* not registered"):
        await plan_for("unknown")
    found = await driver.probe("x86_64", {"powershell": str(tmp_path / "powershell-unknown")})
    assert found.reasons[2].mend.startswith("as administrator, once: New-Item -Path 'HKLM:")
    found = await driver.probe("x86_64", {"powershell": "/bin/true"})
    assert not found.usable
    found = await driver.probe("x86_64", {"powershell": "/bin/false"})
    assert "PowerShell ended with code 1" in found.reasons[0].text
    found = await driver.probe("x86_64", {})
    assert [reason.text for reason in found.reasons] == ["Hyper-V runs on Windows only"]
