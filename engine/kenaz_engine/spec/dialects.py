"""What a session's file may say together of its channel, its network and its tools."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from kenaz_engine.spec.faults import Fault
from kenaz_engine.spec.yamlfile import Document, Path, dotted, shorten

_CONNECTOR = re.compile(r"[a-z][a-z0-9-]{0,63}\.\*")
_CHANNEL = ("spec", "channel")

_NO_VSOCK = "today's harness-vm listens on TCP alone, not on AF_VSOCK"
_NOT_DIALLED = {
    "vsock": _NO_VSOCK,
    "vhost-user-vsock": _NO_VSOCK,
    "vfkit": _NO_VSOCK,
    "hyperv": _NO_VSOCK,
    "virtio-serial": "nobody dials a virtio-serial port: it is one stream, and today's harness-vm opens none",
    "unix": "today's harness-vm listens on TCP alone, not on a UNIX socket",
}
"""Why a guest cannot be dialled over that transport."""


def dialect_faults(document: Document) -> Iterator[Fault]:
    """Values that exclude each other. Those of a wrong type are faults already."""

    def said(default: str, *path: str) -> Any:
        stated = document.get(path)
        return default if stated is None else stated

    def fault(path: Path, message: str, hint: str) -> Fault:
        return Fault(document.place(path), dotted(path), message, hint)

    framing = said("length-prefixed", *_CHANNEL, "framing")
    dialled = said("guest", *_CHANNEL, "dial") == "host"
    transport = said("auto", *_CHANNEL, "transport")
    if framing == "ndjson" and not dialled:
        message = "guests that dial speak length-prefixed"
        yield fault((*_CHANNEL, "framing"), message, "add dial: host, or take ndjson out")
    elif framing == "length-prefixed" and dialled:
        message = "guests that are dialled speak ndjson"
        yield fault((*_CHANNEL, "dial"), message, "add framing: ndjson, or take dial: host out")
    if dialled and transport != "tcp":
        where = (*_CHANNEL, "transport" if document.node((*_CHANNEL, "transport")) else "dial")
        message = _NOT_DIALLED.get(transport, "today's harness-vm listens on TCP alone")
        yield fault(where, message, "transport: tcp, and network: nat")
    if transport == "tcp":
        where = (*_CHANNEL, "transport")
        if not dialled:
            yield fault(where, "over tcp the guest is dialled", "add dial: host and framing: ndjson")
        if said("none", "spec", "network") != "nat":
            message = "tcp needs a network in the guest"
            yield fault(where, message, "network: nat, with which the guest reaches whatever this host does")
    if said("none", *_CHANNEL, "approvals") == "harness" and not dialled:
        message = "only guests that are dialled ask for approvals"
        yield fault((*_CHANNEL, "approvals"), message, "take it out, or add dial: host")
    if dialled:
        yield from _tool_faults(document)


def _tool_faults(document: Document) -> Iterator[Fault]:
    """Such a guest names no tools on the channel: it is told at boot which connectors it may use, whole. A
    policy that says more could not be held."""
    for kind in ("allow", "deny"):
        stated = document.get(("spec", "tools", kind))
        for index, pattern in enumerate(stated if isinstance(stated, list) else ()):
            here: Path = ("spec", "tools", kind, index)
            if not isinstance(pattern, str) or (kind == "allow" and _CONNECTOR.fullmatch(pattern)):
                continue
            if kind == "deny":
                message = "a guest that is dialled cannot be denied single tools"
                hint = "take it out; what allow does not name is denied"
            else:
                message = f"`{shorten(pattern)}` is no whole connector, and this guest knows nothing smaller"
                hint = "an id of a-z, 0-9 and hyphens, then .*, like fs.*"
            yield Fault(document.place(here), dotted(here), message, hint)
