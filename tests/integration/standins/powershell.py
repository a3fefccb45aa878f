"""Stands in for Windows PowerShell with the module Hyper-V: reads our scripts by PowerShell's own rules of
quoting, holds each command to the parameters that Microsoft's reference has, and keeps machines in a file.

    powershell.py [--trap=NAME] STATE -NoProfile -NonInteractive -Command SCRIPT

Traps: `deaf` (the guest has no shut-down service), `half` (the machine is made, and then setting it up
fails), `absent` (no such module), `unknown` (the port's service is not registered), `denied` (the user may
not see machines), `chatty` (something is said before any answer). COMMANDS is written from
learn.microsoft.com/powershell/module/hyper-v, the pages of each name, view windowsserver2025-ps: for each
command its parameter sets, as far as they can be meant here, where `!` marks what must be there.

It ends with 1 where the last statement had an error, silenced or not: by about_PowerShell_exe that is `$?`,
and PowerShell's MshCommandRuntime notes the failure before it looks at what shall be done about it.
"""

from __future__ import annotations

import fcntl
import json
import re
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

COMMON = {"ErrorAction"}
SWITCHES = {"Differencing", "StaticMemory", "TurnOff", "Force", "Compress", "EQ"}
ENUMS = {
    "Generation": {1, 2},
    "CheckpointType": {"Disabled", "Production", "ProductionOnly", "Standard"},
    "AutomaticStartAction": {"Nothing", "StartIfRunning", "Start"},
    "AutomaticStopAction": {"TurnOff", "Save", "ShutDown"},
    "EnableSecureBoot": {"On", "Off"},
    "ErrorAction": {"SilentlyContinue", "Stop"},
    "SecureBootTemplate": {"MicrosoftWindows", "MicrosoftUEFICertificateAuthority", "OpenSourceShieldedVM"},
    "Number": {1, 2},
}
COMMANDS: dict[str, list[str]] = {
    "New-VHD": ["!Path !ParentPath SizeBytes Differencing BlockSizeBytes PhysicalSectorSizeBytes"],
    "New-VM": [
        "Name MemoryStartupBytes BootDevice SwitchName !VHDPath Path Version Generation Force",
        "Name MemoryStartupBytes BootDevice SwitchName NoVHD Path Version Generation Force",
    ],
    "Set-VM": [
        "!VM ProcessorCount DynamicMemory StaticMemory MemoryStartupBytes AutomaticStartAction "
        "AutomaticStopAction AutomaticStartDelay AutomaticCheckpointsEnabled Notes NewVMName CheckpointType"
    ],
    "Set-VMFirmware": ["!VM BootOrder FirstBootDevice EnableSecureBoot SecureBootTemplate ConsoleMode"],
    "Add-VMDvdDrive": ["!VM ControllerNumber ControllerLocation Path ResourcePoolName"],
    "Set-VMComPort": ["!VM !Number Path DebuggerMode"],
    "Get-VMNetworkAdapter": ["!VM Name IsLegacy"],
    "Remove-VMNetworkAdapter": ["!VMNetworkAdapter", "!VM Name"],
    "Get-VM": ["Name", "!Id"],
    "Where-Object": ["!InputObject !Property !Value !EQ"],
    "Start-VM": ["!VM AsJob"],
    "Stop-VM": ["!VM Save TurnOff Force AsJob"],
    "Remove-VM": ["!VM Force AsJob"],
    "Start-Sleep": ["!Milliseconds"],
    "ConvertTo-Json": ["!InputObject Compress Depth"],
}
PIPED = {
    "Remove-VMNetworkAdapter": "VMNetworkAdapter",
    "Stop-VM": "VM",
    "Remove-VM": "VM",
    "Where-Object": "InputObject",
}
PROLOGUE = [
    "$ErrorActionPreference = 'Stop'",
    "$ProgressPreference = 'SilentlyContinue'",
    "$WarningPreference = 'SilentlyContinue'",
    "[Console]::OutputEncoding = [Text.UTF8Encoding]::new($false)",
]
QUOTES = "'\u2018\u2019\u201a\u201b"
LOOK = re.compile(
    r"ConvertTo-Json -Compress -InputObject @\{ module = \[bool\]\(Get-Command -Name 'New-VM' .*LiteralPath "
    r"('HKLM:\\SOFTWARE\\Microsoft\\Windows NT\\CurrentVersion\\Virtualization\\GuestCommunicationServices\\"
    r"00001ec9-facb-11e6-bd58-64006a7986d3')\) \}"
)

Token = tuple[str, str]


class ScriptError(Exception):
    """What PowerShell would end the script with."""


def tokens(text: str) -> Iterator[Token]:
    """The words of a script: (`text`, what was quoted), (`word`, as it stands), or (`mark`, ()|;={}@)."""
    at = 0
    while at < len(text):
        char = text[at]
        if char in " \t":
            at += 1
        elif char in QUOTES:
            value, at = "", at + 1
            while True:
                if at >= len(text):
                    raise ScriptError("The string is missing the terminator: '.")
                if text[at] in QUOTES:
                    if at + 1 < len(text) and text[at + 1] in QUOTES:
                        value, at = value + text[at], at + 2
                        continue
                    at += 1
                    break
                value, at = value + text[at], at + 1
            yield "text", value
        elif char in "()|;={}@\n":
            yield "mark", char
            at += 1
        else:
            word = re.match(r"[^\s'\u2018\u2019\u201a\u201b()|;={}@]+", text[at:])
            assert word is not None
            yield "word", word[0]
            at += word.end()


def statements(script: str) -> list[list[Token]]:
    """The commands of a script, which stand one a line."""
    found: list[list[Token]] = [[]]
    depth = 0
    for token in tokens(script):
        depth += {("mark", "{"): 1, ("mark", "("): 1, ("mark", "}"): -1, ("mark", ")"): -1}.get(token, 0)
        if token == ("mark", "\n") and depth == 0:
            found.append([])
        else:
            found[-1].append(token)
    return [statement for statement in found if statement]


class Host:
    """The machines, and what a script does to them."""

    def __init__(self, state: dict[str, Any], trap: str) -> None:
        self.state = state
        self.trap = trap
        self.vm: Any = None
        self.output: list[str] = []
        self.failed = False  # what `$?` is not

    def run(self, statement: list[Token]) -> Any:
        self.failed = False
        match statement:
            case [("word", "$vm"), ("mark", "="), *rest]:
                self.vm = self.pipeline(rest)
                return None
            case [("word", "do"), ("mark", "{"), *_]:
                return self.until_off(statement)
            case [("word", "ConvertTo-Json"), *_]:
                words = " ".join(value for _, value in statement)
                assert words == "ConvertTo-Json -Compress -InputObject @ { id = $vm.Id.ToString ( ) }", words
                self.output.append(json.dumps({"id": self.vm["Id"]}))
                return None
        return self.pipeline(statement)

    def until_off(self, statement: list[Token]) -> None:
        end = statement.index(("mark", "}"))
        sleep, get = " ".join(v for _, v in statement[2:end]).split(" ; ")
        condition = " ".join(v for _, v in statement[end + 1 :])
        assert (sleep, condition) == ("Start-Sleep -Milliseconds 250", "until ( $vm.State -eq Off )")
        assert get.startswith("$vm = Get-VM -Id ")
        while True:
            self.release()
            time.sleep(0.05)
            self.acquire()
            [machine] = self.get_vm({"Id": get.split()[-1]})
            if machine["State"] == "Off":
                return

    def acquire(self) -> None:
        fcntl.flock(LOCK, fcntl.LOCK_EX)
        self.state.clear()
        self.state.update(json.loads(FILE.read_text() if FILE.exists() else "{}"))

    def release(self) -> None:
        """Tests read the file without the lock: they see what was, or what is."""
        scratch = FILE.with_suffix(".new")
        scratch.write_text(json.dumps(self.state))
        scratch.replace(FILE)
        fcntl.flock(LOCK, fcntl.LOCK_UN)

    def pipeline(self, words: list[Token]) -> Any:
        """What comes out at its end: nothing, one, or a list."""
        stages: list[list[Token]] = [[]]
        depth = 0
        for token in words:
            depth += (token == ("mark", "(")) - (token == ("mark", ")"))
            if token == ("mark", "|") and depth == 0:
                stages.append([])
            else:
                stages[-1].append(token)
        values = self.command(stages[0], None)
        for stage in stages[1:]:
            values = [made for value in values for made in self.command(stage, value)]
        return values[0] if len(values) == 1 else values or None

    def command(self, words: list[Token], piped: Any) -> list[Any]:
        (kind, name), *rest = words
        if kind != "word" or name not in COMMANDS or self.trap == "absent":
            raise ScriptError(f"The term '{name}' is not recognized as the name of a cmdlet")
        given: dict[str, Any] = {PIPED[name]: piped} if piped is not None else {}
        position = 0
        while position < len(rest):
            kind, word = rest[position]
            if kind != "word" or not word.startswith("-"):
                raise ScriptError(f"A positional parameter cannot be found that accepts argument '{word}'.")
            parameter, position = word[1:], position + 1
            if parameter in given:
                raise ScriptError(f"Cannot bind parameter because parameter '{parameter}' is given twice.")
            if parameter in SWITCHES:
                given[parameter] = True
                continue
            given[parameter], position = self.value(rest, position)
            if parameter in ENUMS and given[parameter] not in ENUMS[parameter]:
                raise ScriptError(f"Cannot bind parameter '{parameter}': '{given[parameter]}' is none of it.")
        self.check(name, given)
        made = getattr(self, name.replace("-", "_").lower())(given)
        return made if isinstance(made, list) else [made] if made is not None else []

    def check(self, name: str, given: dict[str, Any]) -> None:
        names = given.keys() - COMMON
        for parameters in COMMANDS[name]:
            known = {word.lstrip("!") for word in parameters.split()}
            needed = {word[1:] for word in parameters.split() if word.startswith("!")}
            if needed <= names <= known:
                return
        raise ScriptError(f"{name}: Parameter set cannot be resolved using the named parameters {names}.")

    def value(self, words: list[Token], at: int) -> tuple[Any, int]:
        if at >= len(words):
            raise ScriptError("Missing an argument.")
        kind, word = words[at]
        if (kind, word) == ("mark", "("):
            end = words.index(("mark", ")"), at)
            return self.pipeline(words[at + 1 : end]), end + 1
        if kind == "text":
            return word, at + 1
        known = {"$vm": self.vm, "$true": True, "$false": False}
        if word in known:
            return known[word], at + 1
        if word.startswith("$") or not re.fullmatch(r"[A-Za-z]+|\d+", word):
            raise ScriptError(f"what is {word}?")
        return (int(word) if word.isdigit() else word), at + 1

    def new_vhd(self, given: dict[str, Any]) -> None:
        path, parent = Path(given["Path"]), Path(given["ParentPath"])
        if not given.get("Differencing") or not parent.is_file() or path.exists() or path.suffix != ".vhdx":
            raise ScriptError("Failed to create the virtual hard disk.")
        path.write_text(f"vhdxfile {given.get('SizeBytes', 0)}")

    def new_vm(self, given: dict[str, Any]) -> dict[str, Any]:
        disk = Path(given["VHDPath"])
        if not disk.is_file() or disk.suffix != ".vhdx" or len(given["Name"]) > 100:
            raise ScriptError("The system cannot find the file specified.")
        if given["MemoryStartupBytes"] % (2 << 20):
            raise ScriptError("Invalid memory value assigned. It must be aligned to 2 MB.")
        made = {"Id": str(uuid.uuid4()), "State": "Off", "log": {}, **given}
        made["adapters"] = 1
        if "Path" in given:
            Path(given["Path"], given["Name"], "Virtual Machines").mkdir(parents=True)
        self.state[made["Id"]] = made
        return made

    def set_up(self, what: str, given: dict[str, Any]) -> None:
        if self.trap == "half" and what == "firmware":
            raise ScriptError("The operation failed because of the trap.")
        machine = self.state[given.pop("VM")["Id"]]
        machine["log"][what] = given

    def set_vm(self, given: dict[str, Any]) -> None:
        self.set_up("vm", given)

    def set_vmfirmware(self, given: dict[str, Any]) -> None:
        self.set_up("firmware", given)

    def set_vmcomport(self, given: dict[str, Any]) -> None:
        if not re.fullmatch(r"\\\\\.\\pipe\\[^\\]+", given["Path"]):
            raise ScriptError("that is the path of no pipe")
        self.set_up("com", given)

    def add_vmdvddrive(self, given: dict[str, Any]) -> None:
        if not Path(given["Path"]).is_file() or not given["Path"].endswith(".iso"):
            raise ScriptError("The file is no disc.")
        self.set_up("dvd", given)

    def get_vmnetworkadapter(self, given: dict[str, Any]) -> dict[str, Any]:
        return self.state[given["VM"]["Id"]]  # type: ignore[no-any-return]

    def remove_vmnetworkadapter(self, given: dict[str, Any]) -> None:
        given["VMNetworkAdapter"]["adapters"] -= 1

    def get_vm(self, given: dict[str, Any]) -> list[dict[str, Any]]:
        """Those asked for. To ask for one that is gone is an error; to find none among all is not."""
        found = [
            machine
            for machine in self.state.values()
            if all(machine[key] == given[key] for key in ("Id", "Name") if key in given)
        ]
        error = ""
        if self.trap == "denied":
            error = "You do not have the required permission to complete this task."
        elif not found and given.keys() & {"Id", "Name"}:
            error = "Hyper-V was unable to find a virtual machine."
        if error and given.get("ErrorAction") != "SilentlyContinue":
            raise ScriptError(error)
        self.failed = bool(error)
        return [] if error else found

    def where_object(self, given: dict[str, Any]) -> dict[str, Any] | None:
        machine: dict[str, Any] = given["InputObject"]
        return machine if machine[given["Property"]] == given["Value"] else None

    def start_vm(self, given: dict[str, Any]) -> None:
        given["VM"]["State"] = "Running"

    def stop_vm(self, given: dict[str, Any]) -> None:
        if not given.get("TurnOff") and self.trap == "deaf":
            raise ScriptError("The Shutdown integration component is not available.")
        given["VM"]["State"] = "Off"

    def remove_vm(self, given: dict[str, Any]) -> None:
        if given["VM"]["State"] != "Off" or not given.get("Force"):
            raise ScriptError("The operation cannot be performed in the current state.")
        del self.state[given["VM"]["Id"]]


if __name__ == "__main__":
    words = sys.argv[1:]
    chosen = words.pop(0).partition("=")[2] if words[0].startswith("--trap=") else ""
    file, *options, text = words
    assert options == ["-NoProfile", "-NonInteractive", "-Command"], options
    assert text.split("\n")[: len(PROLOGUE)] == PROLOGUE
    body = "\n".join(text.split("\n")[len(PROLOGUE) :])
    if chosen == "chatty":
        print("WARNING: a {new} version is available\n")
    if LOOK.fullmatch(body):
        print(json.dumps({"module": chosen != "absent", "allowed": True, "registered": chosen != "unknown"}))
        sys.exit(0)
    FILE = Path(file)
    LOCK = FILE.with_suffix(".lock").open("a")  # to the end of the process
    host = Host({}, chosen)
    host.acquire()
    try:
        for statement in statements(body):
            host.run(statement)
    except ScriptError as error:
        print(f"{error}\nAt line:1 char:1", file=sys.stderr)
        host.failed = True
    finally:
        host.release()
    print("\n".join(host.output))
    sys.exit(host.failed)
