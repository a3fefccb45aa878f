"""A session file, overrides and defaults, resolved into frozen values that the rest can trust."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import PurePath
from typing import Any

from kenaz_engine.spec import schema, yamlfile
from kenaz_engine.spec.dialects import dialect_faults
from kenaz_engine.spec.faults import Fault, InvalidFile, Place
from kenaz_engine.spec.units import format_duration, format_size, parse_duration, parse_size
from kenaz_engine.spec.yamlfile import Document, Path, dotted, shorten

_ID = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")
_ID_ALPHABET = "abcdefghijklmnopqrstuvwxyz234567"
_STEP = re.compile(r"[A-Za-z0-9_-]+")

_TOOL = re.compile(r"[A-Za-z0-9_:/*-]+(\.[A-Za-z0-9_:/*-]+)*")
_IMAGE_NAME = re.compile(
    r"[a-z0-9]+([._-][a-z0-9]+)*(:[A-Za-z0-9_][A-Za-z0-9._-]{0,127}|@sha256:[0-9a-f]{64})?"
)
_DIGEST_AT_END = re.compile(r"@sha256:[0-9a-f]{64}$")

_VARIABLE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """The machine; `memory` and `disk` are in bytes."""

    cpus: int
    memory: int
    arch: str
    disk: int
    display: str


@dataclass(frozen=True, slots=True)
class WorkbenchSpec:
    """What the guest loads. Values of `env` are secrets: they go to the guest and nowhere else."""

    build: str
    env: Mapping[str, str] = field(repr=False)
    args: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ToolsSpec:
    """Patterns of tools; `deny` goes before `allow`, and what neither names is denied."""

    allow: tuple[str, ...]
    deny: tuple[str, ...]
    timeout: float


@dataclass(frozen=True, slots=True)
class LimitsSpec:
    """What a guest may take: `frame` in bytes, `handshake` in seconds."""

    frame: int
    depth: int
    handshake: float
    invocations: int


@dataclass(frozen=True, slots=True)
class ChannelSpec:
    """How guest and launcher talk."""

    transport: str
    framing: str
    dial: str
    approvals: str
    port: int
    grace: float
    limits: LimitsSpec


@dataclass(frozen=True, slots=True)
class ResolvedSession:
    """Everything that a session file says, with its defaults filled in.

    `timeouts` are seconds by state. `origins` tells by dotted path what each value came from:
    `file:line:column`, `default`, `--set`, `environment NAME`, `--session-id` or `random`. `secrets` are the
    dotted paths that hold values of the launcher's environment. `file` is the session file's name.
    """

    id: str
    name: str
    labels: Mapping[str, str]
    lifecycle: str
    driver: str
    image: str
    machine: MachineSpec
    workbench: WorkbenchSpec
    tools: ToolsSpec
    network: str
    channel: ChannelSpec
    timeouts: Mapping[str, float]
    driver_options: Mapping[str, Mapping[str, Any]]
    origins: Mapping[str, str]
    secrets: frozenset[str]
    file: str
    document: Document = field(repr=False, compare=False)

    def place(self, *path: str | int) -> Place:
        """Where a value stands, for faults found later: `place("spec", "timeouts", "booting")`.

        For what is a default, the place of what is around it.
        """
        return self.document.place(path)

    def fault(self, path: Path, message: str, hint: str = "") -> Fault:
        """A fault of the value at `path`."""
        return Fault(self.document.place(path), dotted(path), message, hint)

    def check_driver_options(self, driver: str, options_schema: schema.JsonSchema) -> list[Fault]:
        """What a driver's own schema does not allow of `driverOptions`."""
        path = ("spec", "driverOptions", driver)
        return schema.check(self.document, options_schema, at=path) if self.document.node(path) else []

    def beside(self, path: str) -> str:
        """A path of the file, which is relative to it, as the launcher can open it."""
        return str(PurePath(self.file).parent / path)


class InvalidSession(InvalidFile):
    """A session's file was refused. `rest` is the session without what is wrong with it, for those who know
    of further faults; None where too much is wrong to tell."""

    def __init__(self, faults: list[Fault], rest: ResolvedSession | None) -> None:
        super().__init__(faults)
        self.rest = rest


def load_session(
    text: str | bytes,
    file: str,
    *,
    overrides: Sequence[str] = (),
    session_id: str | None = None,
    environment: Mapping[str, str],
    randomness: Callable[[int], bytes] = os.urandom,
) -> ResolvedSession:
    """The session that `text` describes, which came from `file`.

    `overrides` are those of `--set`, `path=value` with a value in YAML; `environment` is what `${env:NAME}`
    is looked up in; `randomness` gives as many bytes as it is asked for, for the id. Raises InvalidFile, and
    InvalidSession where the file could be read, with every fault that could be found.
    """
    faults: list[Fault] = []
    document = yamlfile.parse(text, file, faults)
    if wrong := schema.check_kind(document, "Session"):
        yamlfile.refuse([*faults, *wrong])
    shape = schema.shipped("Session")
    document, overridden = _override(document, overrides, shape, faults)
    faults += yamlfile.untold(schema.check(document, shape), faults)
    faults += yamlfile.untold(_meaning_faults(document), faults)
    environments = _Environment(environment, document, faults)
    environments.find(document.data, shape, ())
    origins = dict.fromkeys(overridden, "--set") | environments.origins
    if session_id is not None and not _ID.fullmatch(session_id):
        message = f"`{shorten(session_id)}` is not an id of 1 to 63 lower-case letters, digits and hyphens"
        faults.append(Fault(Place("--session-id"), "", message))
    if faults:
        raise InvalidSession(yamlfile.in_order(faults), _rest(document, faults, shape))
    return _resolved(document, shape, origins, environments.values, session_id, randomness)


def describe(session: ResolvedSession) -> dict[str, Any]:
    """The session as plain JSON data, fit to be printed and recorded: the environment by its names only."""
    machine, channel = session.machine, session.channel
    limits = channel.limits
    return {
        "id": session.id,
        "name": session.name,
        "labels": dict(session.labels),
        "lifecycle": session.lifecycle,
        "driver": session.driver,
        "image": session.image,
        "machine": {
            "cpus": machine.cpus,
            "memory": format_size(machine.memory),
            "arch": machine.arch,
            "disk": format_size(machine.disk),
            "display": machine.display,
        },
        "workbench": {
            "build": session.workbench.build,
            "env": sorted(session.workbench.env),
            "args": list(session.workbench.args),
        },
        "tools": {
            "allow": list(session.tools.allow),
            "deny": list(session.tools.deny),
            "timeout": format_duration(session.tools.timeout),
        },
        "network": session.network,
        "channel": {
            "transport": channel.transport,
            "framing": channel.framing,
            "dial": channel.dial,
            "approvals": channel.approvals,
            "port": channel.port,
            "grace": format_duration(channel.grace),
            "limits": {
                "frame": format_size(limits.frame),
                "depth": limits.depth,
                "handshake": format_duration(limits.handshake),
                "invocations": limits.invocations,
            },
        },
        "timeouts": {state: format_duration(seconds) for state, seconds in session.timeouts.items()},
        "driverOptions": {driver: dict(options) for driver, options in session.driver_options.items()},
    }


# --- overrides ----------------------------------------------------------------------------------------------


def _override(
    document: Document, overrides: Sequence[str], shape: schema.JsonSchema, faults: list[Fault]
) -> tuple[Document, list[str]]:
    """The document with the overrides in it, and the dotted paths that they set."""
    overridden = []
    for override in overrides:
        target, equals, value = override.partition("=")
        # The value stays out of messages: it may be a secret.
        place = Place(f"--set {shorten(target, 200)}")
        path = tuple(target.split("."))
        if not equals or not all(_STEP.fullmatch(step) for step in path):
            faults.append(Fault(place, "", "is not of the form path=value", "--set spec.machine.cpus=4"))
            continue
        target_shape = shape
        for index, step in enumerate(path):
            inner = _inner(target_shape, step)
            if inner is None:
                hint = schema.suggestion(step, target_shape.get("properties", {}))
                faults.append(Fault(place, dotted(path[: index + 1]), "this key is unknown", hint))
                break
            target_shape = inner
        else:
            try:
                data = _override_value(value, target_shape, place)
            except InvalidFile as invalid:
                faults += [Fault(place, dotted(path), wrong.message, wrong.hint) for wrong in invalid.faults]
                continue
            changed = document.replace(path, data, place)
            if changed is not None:  # else what is on the way is a fault by itself
                document = changed
                overridden += [dotted(leaf) for leaf in _leaves(data, path)]
    return document, overridden


def _override_value(value: str, shape: schema.JsonSchema, place: Place) -> Any:
    """The value of an override: YAML, but a text needs no quotes where only a text makes sense."""
    if shape.get("x-kenaz-env") or not value.strip():
        return value
    node = yamlfile.parse(value, place.file).root
    return node.written if shape.get("type") == "string" and node.written is not None else node.data()


def _inner(shape: schema.JsonSchema, step: str | int) -> schema.JsonSchema | None:
    """The schema of a member; None when there can be none of that name."""
    if step in shape.get("properties", {}):
        inner: schema.JsonSchema = shape["properties"][step]
        return inner
    more = shape.get("additionalProperties", shape.get("type") == "object")
    if isinstance(more, Mapping):
        return more
    return {"type": "object"} if more else None


def _leaves(data: Any, path: Path) -> Iterator[Path]:
    """The paths of everything in `data` that is no mapping with something in it."""
    if isinstance(data, dict) and data:
        for key, value in data.items():
            yield from _leaves(value, (*path, key))
    else:
        yield path


# --- meaning ------------------------------------------------------------------------------------------------


def _meaning_faults(document: Document) -> Iterator[Fault]:
    """What a schema cannot say. Looks only at values of the right type; the rest are faults already."""
    image = document.get(("spec", "image"))
    if isinstance(image, str) and image and (wrong := _image_fault(image)):
        yield Fault(document.place(("spec", "image")), "spec.image", *wrong)
    yield from _tool_faults(document)
    yield from dialect_faults(document)


def _image_fault(image: str) -> tuple[str, str] | None:
    """Message and hint when `image` is no reference to an image."""
    if image.startswith("https://"):
        if _DIGEST_AT_END.search(image):
            return None
        return "an image from the network needs its digest", "append @sha256: and 64 hexadecimal digits"
    if "://" in image:
        return f"`{shorten(image)}` cannot be fetched", "only https:// is"
    if "/" in image or _IMAGE_NAME.fullmatch(image):
        return None
    hint = "name[:tag], name@sha256:..., https://...@sha256:..., or a path with a slash in it"
    return f"`{shorten(image)}` is not an image", hint


def _tool_faults(document: Document) -> Iterator[Fault]:
    patterns: dict[str, list[tuple[str, Path]]] = {}
    for kind in ("allow", "deny"):
        path = ("spec", "tools", kind)
        found: list[tuple[str, Path]] = []
        stated = document.get(path)
        for index, pattern in enumerate(stated if isinstance(stated, list) else ()):
            if not isinstance(pattern, str):
                continue
            here: Path = (*path, index)
            shown = f"`{shorten(pattern)}`" if pattern else "an empty pattern"
            if not _TOOL.fullmatch(pattern):
                hint = "names joined by dots, `*` for any characters, like fs.*"
                yield Fault(document.place(here), dotted(here), f"{shown} can match no tool", hint)
            elif pattern in (other for other, _ in found):
                yield Fault(document.place(here), dotted(here), f"{shown} is stated twice", "take one out")
            else:
                found.append((pattern, here))
        patterns[kind] = found
    for allowed, here in patterns["allow"]:
        denied = next((other for other, _ in patterns["deny"] if _covers(other, allowed)), None)
        if denied is not None:
            message = f"`{shorten(allowed)}` allows nothing, as `{shorten(denied)}` is denied"
            yield Fault(document.place(here), dotted(here), message, "take one of them out")


def _covers(wide: str, narrow: str) -> bool:
    """Whether every tool that `narrow` matches is matched by `wide`.

    Read as a name, `narrow` has a `*` only where a `*` of `wide` can swallow it.
    """
    return fnmatchcase(narrow, wide)


# --- the environment ----------------------------------------------------------------------------------------


class _Environment:
    """Finds every `${env:NAME}` of a document and looks it up where the schema allows one."""

    def __init__(self, environment: Mapping[str, str], document: Document, faults: list[Fault]) -> None:
        self._environment = environment
        self._document = document
        self._faults = faults
        self.values: dict[Path, str] = {}
        self.origins: dict[str, str] = {}

    def find(self, data: Any, shape: schema.JsonSchema, path: Path) -> None:
        if isinstance(data, dict):
            for key, value in data.items():
                self.find(value, _inner(shape, key) or {}, (*path, key))
        elif isinstance(data, list):
            for index, value in enumerate(data):
                self.find(value, shape.get("items", {}), (*path, index))
        elif isinstance(data, str) and "${env:" in data:
            if shape.get("x-kenaz-env"):
                self._replace(data, path)
            else:
                self._fault(path, "`${env:...}` is not replaced here", "only in spec.workbench.env")

    def _replace(self, text: str, path: Path) -> None:
        names = _VARIABLE.findall(text)
        if "${env:" in _VARIABLE.sub("", text):
            self._fault(path, "a `${env:` does not end properly", "write ${env:NAME}")
        for name in dict.fromkeys(names):
            value = self._environment.get(name)
            if value is None:
                self._fault(path, f"the variable {shorten(name)} is not set", "export it first")
            elif not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                self._fault(path, f"the variable {shorten(name)} is not UTF-8")
        self.values[path] = _VARIABLE.sub(lambda match: self._environment.get(match[1], ""), text)
        self.origins[dotted(path)] = f"environment {', '.join(dict.fromkeys(names))}"

    def _fault(self, path: Path, message: str, hint: str = "") -> None:
        self._faults.append(Fault(self._document.place(path), dotted(path), message, hint))


# --- putting it together ------------------------------------------------------------------------------------


def _resolved(
    document: Document,
    shape: schema.JsonSchema,
    stated: Mapping[str, str],
    replaced: Mapping[Path, str],
    session_id: str | None,
    randomness: Callable[[int], bytes],
) -> ResolvedSession:
    """The session of a document without faults; `stated` are the origins that are not the file's."""
    origins: dict[str, str] = {}
    data = _filled(document.data, shape, (), document, origins)
    origins |= stated
    identity = _identity(data["metadata"], session_id, randomness, origins)
    return _session(data, identity, replaced, origins, document)


def _rest(document: Document, faults: Sequence[Fault], shape: schema.JsonSchema) -> ResolvedSession | None:
    """The session of the document's values that have no fault."""
    sound = document.without({fault.path for fault in faults})
    if sound.node(("metadata", "name")) is None:
        named = sound.replace(("metadata", "name"), "unnamed", sound.place())
        sound = sound if named is None else named
    if list(schema.check(sound, shape)):
        return None
    return _resolved(sound, shape, {}, {}, None, bytes)


def _filled(
    data: Any, shape: schema.JsonSchema, path: Path, document: Document, origins: dict[str, str]
) -> Any:
    """`data` with the schema's defaults in it; `origins` gets what each value came from."""
    for key, inner in shape.get("properties", {}).items() if isinstance(data, dict) else ():
        if key not in data and "default" in inner:
            # A copy, as more is filled in below; defaults are texts, numbers and empty containers.
            data[key] = type(inner["default"])(inner["default"])
    if isinstance(data, dict) and data:
        for key, value in data.items():
            data[key] = _filled(value, _inner(shape, key) or {}, (*path, key), document, origins)
    else:
        origins[dotted(path)] = str(document.place(path)) if document.node(path) else "default"
    return data


def _identity(
    metadata: Mapping[str, Any],
    session_id: str | None,
    randomness: Callable[[int], bytes],
    origins: dict[str, str],
) -> str:
    """The session's id: the caller's, else the file's, else the name and six random characters."""
    if session_id is not None:
        origins["metadata.id"] = "--session-id"
        return session_id
    if "id" in metadata:
        return str(metadata["id"])
    origins["metadata.id"] = "random"
    suffix = "".join(_ID_ALPHABET[byte & 31] for byte in randomness(6))
    return f"{metadata['name'][:56].rstrip('-')}-{suffix}"


def _session(
    data: Mapping[str, Any],
    identity: str,
    replaced: Mapping[Path, str],
    origins: dict[str, str],
    document: Document,
) -> ResolvedSession:
    metadata, spec = data["metadata"], data["spec"]
    machine, workbench, channel = spec["machine"], spec["workbench"], spec["channel"]
    limits, tools = channel["limits"], spec["tools"]
    env = {
        name: replaced.get(("spec", "workbench", "env", name), value)
        for name, value in workbench["env"].items()
    }
    return ResolvedSession(
        id=identity,
        name=metadata["name"],
        labels=metadata["labels"],
        lifecycle=spec["lifecycle"],
        driver=spec["driver"],
        image=spec["image"],
        # JSON Schema takes 2.0 for a whole number.
        machine=MachineSpec(
            cpus=int(machine["cpus"]),
            memory=parse_size(machine["memory"]),
            arch=machine["arch"],
            disk=parse_size(machine["disk"]),
            display=machine["display"],
        ),
        workbench=WorkbenchSpec(workbench["build"], env, tuple(workbench["args"])),
        tools=ToolsSpec(tuple(tools["allow"]), tuple(tools["deny"]), parse_duration(tools["timeout"])),
        network=spec["network"],
        channel=ChannelSpec(
            transport=channel["transport"],
            framing=channel["framing"],
            dial=channel["dial"],
            approvals=channel["approvals"],
            port=int(channel["port"]),
            grace=parse_duration(channel["grace"]),
            limits=LimitsSpec(
                frame=parse_size(limits["frame"]),
                depth=int(limits["depth"]),
                handshake=parse_duration(limits["handshake"]),
                invocations=int(limits["invocations"]),
            ),
        ),
        timeouts={state: parse_duration(text) for state, text in spec["timeouts"].items()},
        driver_options=spec["driverOptions"],
        origins=origins,
        secrets=frozenset(dotted(path) for path in replaced),
        file=document.file,
        document=document,
    )
