"""The PowerShell that Hyper-V is asked by: pure. Each script is a few commands in a row, without a branch.

Facts: Microsoft's reference of the module Hyper-V (learn.microsoft.com/powershell/module/hyper-v), and of
about_Quoting_Rules. Between single quotes nothing is expanded, but PowerShell ends such a text at any of five
characters, typographic ones included; each is doubled there. Machines are made under a name that nothing else
has, so that one that nobody saw made is found; afterwards they are known by their id alone.
"""

from __future__ import annotations

import re

from kenaz_drivers.contract import Disk, DriverError, LaunchRequest

SINGLE_QUOTES = "'\u2018\u2019\u201a\u201b"
"""What PowerShell takes for a single quote (System.Management.Automation.Language, IsSingleQuote)."""

MIB = 1 << 20

ALIGNMENT = 2 * MIB
"""Hyper-V gives memory in pieces of this size."""

SECTOR = 4096
"""A disk has whole sectors, physical ones of this size at the largest."""

TEMPLATE = "MicrosoftUEFICertificateAuthority"
"""Secure boot that takes Linux's boot loaders; the default one boots Windows only."""

REGISTRY = r"HKLM:\SOFTWARE\Microsoft\Windows NT\CurrentVersion\Virtualization\GuestCommunicationServices"

SWITCH = "Default Switch"
"""The network of Windows's own that hides machines behind the host's address."""

_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_MARK = re.compile(r"[a-z0-9][a-z0-9-]{0,93}")

_PROLOGUE = (
    "$ErrorActionPreference = 'Stop'",
    "$ProgressPreference = 'SilentlyContinue'",
    "$WarningPreference = 'SilentlyContinue'",
    "[Console]::OutputEncoding = [Text.UTF8Encoding]::new($false)",
)


def quoted(text: str) -> str:
    """The text as PowerShell takes it for itself. Raises DriverError for a NUL, which ends a command line."""
    if "\0" in text:
        raise DriverError("a NUL character cannot stand in a script", hint="rename the file")
    return "'" + "".join(char * 2 if char in SINGLE_QUOTES else char for char in text) + "'"


def script(*commands: str) -> str:
    """The commands, one a line, of which the first that fails ends it."""
    return "\n".join((*_PROLOGUE, *commands))


def machine_name(mark: str) -> str:
    """What the machine of a launch is called. Raises DriverError for a mark that is none of ours."""
    if not _MARK.fullmatch(mark):
        raise DriverError(f"{mark!r} cannot be part of a machine's name on Hyper-V")
    return f"kenaz-{mark}"


def pipe_of(mark: str) -> str:
    r"""The named pipe that is the guest's COM1, `ttyS0` there. Hyper-V makes it."""
    return rf"\\.\pipe\{machine_name(mark)}-com1"


def service_id(port: int) -> str:
    """The id of the service that a Linux guest reaches by dialling that vsock port: Microsoft's template."""
    return f"{port:08x}-facb-11e6-bd58-64006a7986d3"


def register(port: int) -> str:
    """What an administrator runs once, so that guests may dial that port: Windows refuses what it has no key
    for. It stays, and serves all machines."""
    key = quoted(rf"{REGISTRY}\{service_id(port)}")
    return (
        f"New-Item -Path {key} -Force | New-ItemProperty -Name 'ElementName' -Value 'kenaz-launcher' -Force"
    )


def create(request: LaunchRequest, *, secure_boot: bool) -> str:
    """Makes the machine, and says its id as JSON; does not start it. Raises DriverError for what Hyper-V or
    this driver cannot do."""
    _check(request)
    root, config = (_disk(request, role) for role in ("root", "config"))
    memory = -(-request.memory // ALIGNMENT) * ALIGNMENT
    name = quoted(machine_name(request.mark))
    network = f" -SwitchName {quoted(SWITCH)}" if request.network == "nat" else ""
    boot = f"On -SecureBootTemplate {quoted(TEMPLATE)}" if secure_boot else "Off"
    return script(
        *([_differencing(root)] if root.base else []),
        f"$vm = New-VM -Name {name} -Generation 2 -MemoryStartupBytes {memory}"
        f" -VHDPath {quoted(root.path)} -Path {quoted(request.directory)}{network}",
        f"Set-VM -VM $vm -StaticMemory -ProcessorCount {request.cpus} -AutomaticCheckpointsEnabled $false"
        " -CheckpointType Disabled -AutomaticStartAction Nothing -AutomaticStopAction TurnOff",
        f"Set-VMFirmware -VM $vm -EnableSecureBoot {boot}",
        f"Add-VMDvdDrive -VM $vm -Path {quoted(config.path)}",
        f"Set-VMComPort -VM $vm -Number 1 -Path {quoted(pipe_of(request.mark))}",
        *([] if network else ["Get-VMNetworkAdapter -VM $vm | Remove-VMNetworkAdapter"]),
        "ConvertTo-Json -Compress -InputObject @{ id = $vm.Id.ToString() }",
    )


def _differencing(disk: Disk) -> str:
    """The ephemeral disk: what the guest writes; the rest is read from the base, which must not change."""
    size = f" -SizeBytes {-(-disk.size // SECTOR) * SECTOR}" if disk.size else ""
    return f"New-VHD -Path {quoted(disk.path)} -ParentPath {quoted(disk.base)} -Differencing{size}"


def start(machine: str) -> str:
    """Starts the machine of that id."""
    return script(f"Start-VM -VM {_by_id(machine)}")


def shut_down(machine: str) -> str:
    """Has the guest shut itself down, by Hyper-V's service inside of it; returns when it has, or will not."""
    return script(f"Stop-VM -VM {_by_id(machine)} -Force")


def watch(machine: str) -> str:
    """Returns when the machine is off, however that came about."""
    get = f"$vm = Get-VM -Id {quoted(_known(machine))}"
    return script(f"do {{ Start-Sleep -Milliseconds 250; {get} }} until ($vm.State -eq 'Off')")


def remove(handle: str, *, by_name: bool = False) -> str:
    """Cuts the power and removes the machine of that id, or of that name, if there is one. Its disks stay.

    It is looked for among all: to ask for one that is gone is an error, and PowerShell ends with 1 after that
    even where it is silenced (`_WriteErrorSkipAllowCheck` of its MshCommandRuntime; about_PowerShell_exe). To
    silence it would also hide that machines may not be seen.
    """
    key = f"Name -EQ -Value {quoted(handle)}" if by_name else f"Id -EQ -Value {quoted(_known(handle))}"
    get = f"Get-VM | Where-Object -Property {key}"
    return script(
        f"{get} | Stop-VM -TurnOff -Force",
        f"{get} | Remove-VM -Force",
    )


def look(port: int) -> str:
    """What there is on this host, as JSON: the module, the right to use it, and the registered port."""
    key = quoted(rf"{REGISTRY}\{service_id(port)}")
    groups = "[Security.Principal.WindowsIdentity]::GetCurrent().Groups.Value"
    return script(
        "ConvertTo-Json -Compress -InputObject @{"
        " module = [bool](Get-Command -Name 'New-VM' -ErrorAction SilentlyContinue);"
        f" allowed = [bool]({groups} -match '^S-1-5-32-(544|578)$');"
        f" registered = (Test-Path -LiteralPath {key}) }}"
    )


def _by_id(machine: str) -> str:
    return f"(Get-VM -Id {quoted(_known(machine))})"


def _known(machine: str) -> str:
    if not _ID.fullmatch(machine):
        raise DriverError(f"{machine!r} is no id of a machine")
    return machine


def _disk(request: LaunchRequest, role: str) -> Disk:
    found = [disk for disk in request.disks if disk.role == role]
    if len(found) != 1:
        raise DriverError(f"Hyper-V needs one disk of the role {role}")
    return found[0]


def _check(request: LaunchRequest) -> None:
    if request.kernel:
        raise DriverError(
            "Hyper-V boots no kernel, only a disk with a boot loader",
            hint="use a disk image with UEFI, or driver: qemu",
        )
    if request.transport != "hyperv":
        raise DriverError(f"Hyper-V has no transport {request.transport!r}", hint="hyperv")
    if request.display != "none":
        raise DriverError(f"display {request.display!r}: this driver shows no screen", hint="display: none")
    if request.network not in {"none", "nat"}:
        raise DriverError(f"network {request.network!r} is unknown to this driver", hint="none or nat")
    formats = {"root": "vhdx", "config": "iso"}
    for disk in request.disks:
        if formats.get(disk.role) != disk.format:
            raise DriverError(f"Hyper-V is given no disk of role {disk.role!r} and format {disk.format!r}")
        if disk.format == "iso" and not disk.path.lower().endswith(".iso"):
            raise DriverError(f"Hyper-V takes no disc whose name does not end in .iso: {disk.path}")
