"""YAML to plain JSON data, with the place of everything in it.

This is YAML 1.2's core schema, not PyYAML's YAML 1.1: only `true` and `false` (in their three spellings) are
booleans, so that `on`, `off`, `yes` and `no` are texts; there are no sexagesimals, dates or merge keys. The
parser's events are turned into nodes here, which is where the limits are kept: a hostile file costs bounded
memory and time, and whatever is wrong with a file ends as `InvalidFile`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn

import yaml

from kenaz_engine.spec.faults import Fault, InvalidFile, Place

MAX_BYTES = 1 << 20
MAX_NODES = 20_000
"""Values in a document, each alias counted as all that it stands for."""
MAX_DEPTH = 64
MAX_FAULTS = 100
"""More faults than these are only counted."""

Path = tuple[str | int, ...]
"""Where a value is in a document: keys and indexes from the root."""

_LOADER: type[yaml.SafeLoader] = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

# What YAML does not allow, the line breaks of YAML 1.1 that no editor counts as such, and the byte order
# mark, which may only be the first character.
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff\ufeff\ufffe\uffff]")
_BREAK = re.compile(r"\r\n|\r|\n")
_SURROGATE = re.compile("[\ud800-\udfff]")

_NULL = re.compile(r"|~|null|Null|NULL")
_BOOLEAN = re.compile(r"true|True|TRUE|false|False|FALSE")
_INTEGER = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")

_MISSING = re.compile(r"expected ',' or '(.)'")

_TAGS = "tag:yaml.org,2002:"
_TAG_TYPES: Mapping[str, type] = {
    "null": type(None),
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "map": dict,
    "seq": list,
}

_PLAIN_NAME = re.compile(r"[A-Za-z0-9_-]+")


def dotted(path: Path) -> str:
    """A path as people read it: `spec.tools.allow[0]`, `states.running.on["vm.exited"]`."""
    text = ""
    for step in path:
        if isinstance(step, int):
            text += f"[{step}]"
        elif _PLAIN_NAME.fullmatch(step):
            text += f".{step}" if text else step
        else:
            text += f'["{shorten(step)}"]'
    return text


def shorten(text: str, limit: int = 40) -> str:
    """A text of a file, fit for a message: on one line, and not longer than `limit` characters."""
    if len(text) > limit:
        text = f"{text[:limit]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


@dataclass(slots=True)
class Node:
    """A value of a document and where it is written.

    `written` is the text of a scalar without quotes, None for any other. `members` and `keys` are those of a
    mapping, `items` those of a sequence. `size` counts the values in it, `height` how deep they nest.
    """

    place: Place
    value: Any = None
    written: str | None = None
    members: dict[str, Node] | None = None
    keys: dict[str, Place] = field(default_factory=dict)
    items: list[Node] | None = None
    size: int = 1
    height: int = 1

    def data(self) -> Any:
        """The value as plain JSON data. Nothing in it is shared, also where the file uses aliases."""
        if self.members is not None:
            return {key: node.data() for key, node in self.members.items()}
        if self.items is not None:
            return [node.data() for node in self.items]
        return self.value

    def child(self, step: str | int) -> Node | None:
        """The member of that name, or the item of that number, if there is one."""
        if isinstance(step, str):
            return self.members.get(step) if self.members is not None else None
        return self.items[step] if self.items is not None and step < len(self.items) else None

    def moved(self, place: Place) -> Node:
        """The same value, as if it were written at `place`."""
        return Node(
            place, self.value, self.written, self.members, self.keys, self.items, self.size, self.height
        )


@dataclass(frozen=True, slots=True)
class Document:
    """A document: its data and, by path, the places of them."""

    file: str
    root: Node

    @property
    def data(self) -> Any:
        """The document as dict, list, str, int, float, bool and None; a fresh copy each time."""
        return self.root.data()

    def node(self, path: Path) -> Node | None:
        """What is at `path`, if anything is."""
        node: Node | None = self.root
        for step in path:
            if node is None:
                return None
            node = node.child(step)
        return node

    def get(self, path: Path) -> Any:
        """The data at `path`; None where there are none."""
        node = self.node(path)
        return None if node is None else node.data()

    def place(self, path: Path = ()) -> Place:
        """The place of the value at `path`; where there is none, that of the nearest value around it."""
        node = self.root
        for step in path:
            inner = node.child(step)
            if inner is None:
                break
            node = inner
        return node.place

    def key_place(self, path: Path) -> Place:
        """The place of the key that the value at `path` has; for the items of a list, that of the value."""
        parent = self.node(path[:-1]) if path else None
        if parent is not None and isinstance(path[-1], str) and path[-1] in parent.keys:
            return parent.keys[path[-1]]
        return self.place(path)

    def written(self, path: Path) -> str | None:
        """The unquoted text of the scalar at `path`, before it was taken for a number or the like."""
        node = self.node(path)
        return None if node is None else node.written

    def replace(self, path: Path, value: Any, place: Place) -> Document | None:
        """This document with `value` at `path`, all of it at `place`; mappings on the way are made.

        None where something on the way is no mapping.
        """
        root = _replaced(self.root, path, value, place)
        return None if root is None else Document(self.file, root)

    def without(self, paths: Collection[str]) -> Document:
        """This document without the members and items at those dotted paths."""
        return Document(self.file, _without(self.root, (), paths))


def from_data(data: Any, place_of: Callable[[Path], Place], file: str = "") -> Document:
    """A document of data that come from elsewhere: JSON, a command line."""
    return Document(file, _node_of(data, (), place_of))


def _node_of(data: Any, path: Path, place_of: Callable[[Path], Place]) -> Node:
    node = Node(place_of(path), data)
    if isinstance(data, Mapping):
        node.members = {str(key): _node_of(value, (*path, str(key)), place_of) for key, value in data.items()}
        node.keys = {key: member.place for key, member in node.members.items()}
    elif isinstance(data, list | tuple):
        node.items = [_node_of(value, (*path, index), place_of) for index, value in enumerate(data)]
    return node


def _replaced(node: Node | None, path: Path, value: Any, place: Place) -> Node | None:
    if not path:
        return _node_of(value, (), lambda _: place)
    if node is None:
        node = Node(place, members={})
    step = path[0]
    if node.members is None or not isinstance(step, str):
        return None
    inner = _replaced(node.members.get(step), path[1:], value, place)
    if inner is None:
        return None
    copy = node.moved(node.place)
    copy.members = {**node.members, step: inner}
    copy.keys = {**node.keys, step: node.keys.get(step, place)}
    return copy


def _without(node: Node, path: Path, paths: Collection[str]) -> Node:
    copy = node.moved(node.place)
    if node.members is not None:
        kept = {key: inner for key, inner in node.members.items() if dotted((*path, key)) not in paths}
        copy.members = {key: _without(inner, (*path, key), paths) for key, inner in kept.items()}
    elif node.items is not None:
        copy.items = [
            _without(inner, (*path, index), paths)
            for index, inner in enumerate(node.items)
            if dotted((*path, index)) not in paths
        ]
    return copy


def untold(faults: Iterable[Fault], told: list[Fault]) -> list[Fault]:
    """Those faults at whose place nothing has been told yet: the first fault of a value causes the others."""
    places = {fault.place for fault in told}
    return [fault for fault in faults if fault.place not in places]


def refuse(faults: list[Fault]) -> NoReturn:
    """Raises InvalidFile with the faults, in order."""
    raise InvalidFile(in_order(faults))


def in_order(faults: Iterable[Fault]) -> list[Fault]:
    """The faults in the file's order, `--set` and the like last, and not too many to be read."""
    # A file's faults carry lines; what has none is an override, or concerns the file as a whole.
    ordered = sorted(dict.fromkeys(faults), key=lambda fault: (not fault.place.line, fault))
    if len(ordered) > MAX_FAULTS:
        more = Fault(ordered[-1].place, "", f"{len(ordered) - MAX_FAULTS} more faults are not shown")
        ordered = [*ordered[:MAX_FAULTS], more]
    return ordered


def decode(source: bytes, file: str) -> str:
    """The text of a file. Raises InvalidFile when it is longer than 1 MiB or not UTF-8."""
    if len(source) > MAX_BYTES:
        raise InvalidFile([Fault(Place(file), "", "is longer than 1 MiB")])
    try:
        return source.decode("utf-8")
    except UnicodeDecodeError as error:
        before = source[: error.start].decode("utf-8")
        fault = Fault(_place(before, len(before), file), "", "is not UTF-8 text", "save the file as UTF-8")
        raise InvalidFile([fault]) from None


def parse(source: str | bytes, file: str, faults: list[Fault] | None = None) -> Document:
    """The document in `source`, which comes from `file` (a name for messages; nothing is read).

    Raises InvalidFile. When `faults` is given, what is wrong but leaves a tree to look at (a duplicate key,
    an unknown tag) is appended there instead, so that it can be told together with what is found later.
    """
    # Surrogates cannot be encoded; they count as some bytes here and are refused just below.
    size = len(source) if isinstance(source, bytes) else len(source.encode("utf-8", "surrogatepass"))
    if size > MAX_BYTES:
        raise InvalidFile([Fault(Place(file), "", "is longer than 1 MiB")])
    text = (decode(source, file) if isinstance(source, bytes) else source).removeprefix("\ufeff")
    if forbidden := [*_forbidden(text, file)]:
        refuse(forbidden)
    builder = _Builder(text, file)
    try:
        root = builder.build()
    except _Stopped:
        refuse(builder.faults)
    if faults is None and builder.faults:
        refuse(builder.faults)
    if faults is not None:
        faults.extend(builder.faults)
    return Document(file, root)


def _place(text: str, index: int, file: str) -> Place:
    """The place of the character at `index`."""
    line, start = 1, 0
    for match in _BREAK.finditer(text, 0, index):
        line, start = line + 1, match.end()
    return Place(file, line, index - start + 1)


def _forbidden(text: str, file: str) -> Iterator[Fault]:
    for count, match in enumerate(_FORBIDDEN.finditer(text)):
        if count == 10:  # most likely no text file at all
            return
        name = f"U+{ord(match[0]):04X}"
        hint = f'in double quotes, "\\u{ord(match[0]):04x}" stands for it'
        if match[0] == "\0" or _SURROGATE.match(match[0]):
            hint = "save the file as UTF-8 text"
        yield Fault(
            _place(text, match.start(), file), "", f"the character {name} cannot be in a YAML file", hint
        )


class _Stopped(Exception):
    """No more of the document can be read; the faults say why."""


class _Open:
    """A mapping or sequence whose end has not come yet. `key` waits for its value; its name is None when it
    was refused and the value goes the same way."""

    __slots__ = ("anchor", "key", "node", "tag")

    def __init__(self, node: Node, anchor: str | None, tag: str | None) -> None:
        self.node = node
        self.anchor = anchor
        self.tag = tag
        self.key: tuple[str | None, Place] | None = None


class _Builder:
    """Turns the parser's events into nodes."""

    def __init__(self, text: str, file: str) -> None:
        self.faults: list[Fault] = []
        self._text = text
        self._file = file
        self._lines = _BREAK.split(text)
        self._open: list[_Open] = []
        self._anchors: dict[str, Node | None] = {}  # None while the anchored value is still open
        self._total = 0
        self._root: Node | None = None

    def build(self) -> Node:
        place = Place(self._file, 1, 1)
        try:
            for event in yaml.parse(self._text, _LOADER):
                mark = event.start_mark
                assert mark is not None  # as the parser's own events have one
                place = self._at(mark.line, mark.column)
                self._take(event, place)
        except yaml.MarkedYAMLError as error:
            self._syntax(error)
        except (ValueError, OverflowError):
            # The loader in Python trips over escapes and versions that the one in C refuses properly.
            self._stop(place, "what follows is not valid YAML")
        if self._root is None:
            self._stop(Place(self._file), "is empty")
        return self._root

    def _at(self, line: int, column: int) -> Place:
        """The place of a mark; one after the last line, as the parser in C has them, is moved to its end."""
        if line < len(self._lines):
            return Place(self._file, line + 1, column + 1)
        return Place(self._file, len(self._lines), len(self._lines[-1]) + 1)

    # --- faults -----------------------------------------------------------------------------------------

    def _path(self) -> Path:
        """The path of the value that comes next."""
        path: list[str | int] = []
        for level in self._open:
            if level.node.items is not None:
                path.append(len(level.node.items))
            elif level.key is not None and level.key[0] is not None:
                path.append(level.key[0])
        return tuple(path)

    def _fault(self, place: Place, message: str, hint: str = "") -> None:
        self.faults.append(Fault(place, dotted(self._path()), message, hint))

    def _stop(self, place: Place, message: str, hint: str = "") -> NoReturn:
        self._fault(place, message, hint)
        raise _Stopped

    def _syntax(self, error: yaml.MarkedYAMLError) -> NoReturn:
        mark = error.problem_mark or error.context_mark
        problem = error.problem or error.context or "it cannot be parsed"
        if mark is None:
            self._stop(Place(self._file), f"is not valid YAML: {problem}")
        place = self._at(mark.line, mark.column)
        character = self._lines[place.line - 1][place.column - 1 : place.column]
        if character == "\t" or "tab character" in problem:
            self._stop(place, "a tab is used for indentation", "use spaces")
        if "mapping values are not allowed" in problem:
            self._stop(place, "a second `:` makes no sense here", "quote a text that has `: ` in it")
        if "cannot start any token" in problem:
            self._stop(place, f"no value can start with `{character}`", "quote it")
        if "nesting depth" in problem:  # the parser in C looks ahead, and has a bound of its own above ours
            self._stop(place, f"more than {MAX_DEPTH} levels deep")
        if missing := _MISSING.search(problem):
            hint = "quote a text that has brackets in it"
            self._stop(place, f"a `,` or `{missing[1]}` is missing before this", hint)
        self._stop(place, f"is not valid YAML: {problem}")

    # --- events -----------------------------------------------------------------------------------------

    def _take(self, event: yaml.Event, place: Place) -> None:
        match event:
            case yaml.DocumentStartEvent():
                if self._root is not None:
                    self._stop(place, "a second document starts here", "one file holds one document")
                if event.version is not None and tuple(event.version) != (1, 2):
                    version = ".".join(str(number) for number in event.version)
                    self._fault(place, f"is declared to be YAML {version}", "it is read as YAML 1.2")
            case yaml.AliasEvent():
                self._check_indentation(place)
                self._alias(event.anchor or "", place)
            case yaml.ScalarEvent():
                self._check_indentation(place)
                self._count(1, 1, place)
                node = Node(place, self._scalar(event, place), None if event.style else event.value)
                if event.anchor is not None:
                    self._anchors[event.anchor] = node
                self._add(node)
            case yaml.MappingStartEvent() | yaml.SequenceStartEvent():
                self._check_indentation(place)
                self._count(1, 1, place)
                node = Node(place)
                if isinstance(event, yaml.MappingStartEvent):
                    node.members = {}
                else:
                    node.items = []
                if event.anchor is not None:
                    self._anchors[event.anchor] = None
                self._open.append(_Open(node, event.anchor, event.tag))
            case yaml.MappingEndEvent() | yaml.SequenceEndEvent():
                self._close()

    def _check_indentation(self, place: Place) -> None:
        """Both parsers let some tabs pass; indentation by tabs is refused wherever it is."""
        before = self._lines[place.line - 1][: place.column - 1]
        if "\t" in before and not before.strip(" \t"):
            self._fault(
                Place(self._file, place.line, before.index("\t") + 1), "a tab is used for indentation"
            )

    def _count(self, size: int, height: int, place: Place) -> None:
        self._total += size
        if self._total > MAX_NODES:
            self._stop(place, f"more than {MAX_NODES} values", "aliases count as all that they stand for")
        if len(self._open) + height > MAX_DEPTH:
            self._stop(place, f"more than {MAX_DEPTH} levels deep")

    def _alias(self, name: str, place: Place) -> None:
        if name not in self._anchors:
            self._fault(place, f"the alias `*{shorten(name)}` has no anchor before it")
            node = Node(place)
        elif (target := self._anchors[name]) is None:
            self._fault(place, f"the alias `*{shorten(name)}` is inside of what it stands for")
            node = Node(place)
        else:
            node = target.moved(place)
        self._count(node.size, node.height, place)
        self._add(node)

    def _close(self) -> None:
        level = self._open.pop()
        node = level.node
        children = [*node.members.values()] if node.members is not None else node.items or []
        node.size += sum(child.size for child in children)
        node.height += max((child.height for child in children), default=0)
        self._check_tag(level.tag, {} if node.items is None else [], node.place)
        if level.anchor is not None:
            self._anchors[level.anchor] = node
        self._add(node)

    def _add(self, node: Node) -> None:
        if not self._open:
            self._root = node
            return
        level = self._open[-1]
        parent = level.node
        if parent.items is not None:
            parent.items.append(node)
        elif level.key is None:
            level.key = (self._key(node), node.place)
        else:
            (name, place), members = level.key, parent.members or {}
            if name in members:
                first = parent.keys[name]
                self._fault(place, f"the key is stated twice, first in line {first.line}")
            elif name is not None and parent.members is not None:
                parent.members[name] = node
                parent.keys[name] = place
            level.key = None

    def _key(self, node: Node) -> str | None:
        if node.written == "<<":
            self._fault(node.place, "merge keys (`<<`) are not YAML 1.2", "state the keys themselves")
        elif isinstance(node.value, str):
            return node.value
        elif node.written is not None:
            hint = f'quote it: "{shorten(node.written)}"'
            self._fault(node.place, f"the key `{shorten(node.written)}` is not a text", hint)
        else:
            self._fault(node.place, "a key must be a text")
        return None

    # --- scalars ----------------------------------------------------------------------------------------

    def _scalar(self, event: yaml.ScalarEvent, place: Place) -> Any:
        text = event.value
        if "\0" in text or _SURROGATE.search(text):
            self._fault(place, "stands for a NUL or for half a character", "take the escape out")
            return ""
        if event.tag in ("!", f"{_TAGS}str") or (event.style and event.tag is None):
            return text
        value = self._resolved(text, place)
        self._check_tag(event.tag, value, place)
        return value

    def _check_tag(self, tag: str | None, value: Any, place: Place) -> None:
        if tag is None or tag == "!":
            return
        kind = _TAG_TYPES.get(tag.removeprefix(_TAGS)) if tag.startswith(_TAGS) else None
        name = shorten(f"!!{tag.removeprefix(_TAGS)}" if tag.startswith(_TAGS) else tag)
        if kind is None:
            self._fault(place, f"the tag `{name}` is unknown", "leave it out")
        elif type(value) is not kind:
            self._fault(place, f"this is no `{name}`", "leave the tag out")

    def _resolved(self, text: str, place: Place) -> Any:
        if _NULL.fullmatch(text):
            return None
        if _BOOLEAN.fullmatch(text):
            return text.lower() == "true"
        if _INTEGER.fullmatch(text):
            # Python refuses to parse thousands of digits, with an error of its own.
            digits = text.lstrip("+-0")
            base = {"0o": 8, "0x": 16}.get(text[:2], 10)
            number = int(text, base) if len(digits) <= 40 else 1 << 64
            if not -(1 << 63) <= number < 1 << 63:
                self._fault(place, f"{shorten(text)} does not fit into 64 bits", "quote it if it is a text")
                return 0
            return number
        if _FLOAT.fullmatch(text):
            if not math.isfinite(float(text)):
                self._fault(place, f"{shorten(text)} is too large a number", "quote it if it is a text")
                return 0.0
            return float(text)
        if _NOT_FINITE.fullmatch(text):
            self._fault(place, f"{text} is no number that can be used", "quote it if it is a text")
            return 0.0
        return text
