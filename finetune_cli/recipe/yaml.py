"""YAML 1.2 text to plain data in which every key and value knows its place; odd or hostile text becomes problems."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

import yaml

from finetune_cli.errors import Problem
from finetune_cli.recipe import scalars

MAX_BYTES = 1_000_000
MAX_DEPTH = 50
MAX_NODES = 100_000

UNPRINTABLE = re.compile("[^\t\n\r\x20-\x7e\x85\xa0-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
NEVER = re.compile("[\x00\ud800-\udfff]")
"""Characters that no value may hold, however they are escaped: neither a path nor UTF-8 can."""

SWITCHES = ("lora", "quantization")
"""Sections whose being there is what switches something on, so that nothing behind the name may mean either."""

CORE = "tag:yaml.org,2002:"
TAGS = {"int": int, "float": float, "bool": bool, "null": type(None)}
PLAIN_WORDS = {
    "mapping values are not allowed in this context": "unexpected `:`; put text with a colon in quotes",
    "could not find expected ':'": "expected `key: value`",
    "did not find expected key": "expected a key; check the indentation of this line and the one above",
    "did not find expected '-' indicator": "expected `- `; check the indentation of this line and the one above",
    "did not find expected alphabetic or numeric character": "put text with a leading * or & in quotes",
    "found character that cannot start any token": "a value cannot start with this character; put it in quotes",
}


@dataclass(frozen=True, slots=True)
class Place:
    """Lines and columns count from 1; 0 where the place has none, such as a command-line option."""

    file: str
    line: int = 0
    column: int = 0


@dataclass(frozen=True, slots=True)
class Node:
    """A value with its place, and the place of its key where it has one."""

    value: Any
    """None, bool, int, float, str, list[Node] or dict[str, Node]."""
    place: Place
    key: Place | None = None

    def plain(self) -> Any:
        if isinstance(self.value, dict):
            return {key: node.plain() for key, node in self.value.items()}
        return [node.plain() for node in self.value] if isinstance(self.value, list) else self.value


def problem(place: Place, message: str, key: str = "") -> Problem:
    return Problem(key, message, place.file, place.line, place.column)


def decode(raw: bytes, file: str) -> tuple[str, list[Problem]]:
    """The text of a file, without a byte order mark."""
    if len(raw) > MAX_BYTES:
        return "", [problem(Place(file, 1, 1), f"the file is larger than {MAX_BYTES:,} bytes; is it a recipe?")]
    try:
        return raw.decode("utf-8-sig"), []
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode("utf-8", "replace")
        return "", [problem(_place(before, len(before), file), "the file is not UTF-8 text; save it as UTF-8")]


def parse(text: str, file: str) -> tuple[Node | None, list[Problem]]:
    """The value of a YAML text and all that is wrong with it; no value where it cannot be read at all."""
    odd = UNPRINTABLE.search(text)
    if odd:
        place = _place(text, odd.start(), file)
        return None, [problem(place, f"the control character U+{ord(odd[0]):04X} is not allowed")]
    composer = _Composer(text, file)
    try:
        return composer.document(), composer.problems
    except _Broken as broken:
        return None, [*composer.problems, broken.problem]
    except yaml.MarkedYAMLError as error:
        return None, [*composer.problems, _syntax(error, text, file)]
    except (yaml.YAMLError, ValueError, OverflowError):  # PyYAML's own loader lets Python's errors through
        return None, [*composer.problems, problem(Place(file, 1, 1), "not valid YAML")]


def _place(text: str, index: int, file: str) -> Place:
    line = text.count("\n", 0, index) + 1
    return Place(file, line, index - (text.rfind("\n", 0, index) + 1) + 1)


def _syntax(error: yaml.MarkedYAMLError, text: str, file: str) -> Problem:
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return problem(Place(file, 1, 1), f"not valid YAML: {error.problem}")
    lines = text.splitlines()
    line = lines[mark.line] if mark.line < len(lines) else ""
    if line[mark.column : mark.column + 1] == "\t":
        message = "a tab; YAML is indented with spaces"
    else:
        what = re.sub(r"^found character '.*' that", "found character that", error.problem or "")
        message = f"not valid YAML: {PLAIN_WORDS.get(what, what)}"
    return problem(Place(file, mark.line + 1, mark.column + 1), message)


class _Broken(Exception):
    """The rest of the text is not worth reading."""

    def __init__(self, found: Problem) -> None:
        self.problem = found


class _Composer:
    """Builds the nodes of one document from events; depth and number are bounded as it reads."""

    def __init__(self, text: str, file: str) -> None:
        self.file = file
        self.events: Iterator[Any] = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self.problems: list[Problem] = []
        self.anchors: dict[str, tuple[Node, int, int] | None] = {}
        """Name -> node, its number of nodes and its height; None while it is being read."""
        self.count = 0

    def document(self) -> Node:
        next(self.events)
        if isinstance(next(self.events), yaml.StreamEndEvent):
            raise _Broken(problem(Place(self.file, 1, 1), "the file is empty"))
        node, _ = self._node(next(self.events), 0)
        next(self.events)
        after = next(self.events)
        if not isinstance(after, yaml.StreamEndEvent):
            self._break(after, "a second document starts here; a recipe is one document")
        return node

    def _at(self, event: Any) -> Place:
        return Place(self.file, event.start_mark.line + 1, event.start_mark.column + 1)

    def _report(self, event: Any, message: str) -> None:
        self.problems.append(problem(self._at(event), message))

    def _break(self, event: Any, message: str) -> NoReturn:
        raise _Broken(problem(self._at(event), message))

    def _bound(self, event: Any, *, nodes: int, depth: int) -> None:
        self.count += nodes
        if self.count > MAX_NODES:
            self._break(event, f"more than {MAX_NODES:,} values (an alias counts as all that it stands for)")
        if depth > MAX_DEPTH:
            self._break(event, f"nested deeper than {MAX_DEPTH} levels")

    def _node(self, event: Any, depth: int) -> tuple[Node, int]:
        """The node that starts with this event, and its height."""
        if isinstance(event, yaml.AliasEvent):
            return self._alias(event, depth)
        before = self.count
        self._bound(event, nodes=1, depth=depth)
        if event.anchor:
            self.anchors[event.anchor] = None
        height = 0
        value: Any
        if isinstance(event, yaml.ScalarEvent):
            value = self._scalar(event)
        elif isinstance(event, yaml.SequenceStartEvent):
            self._check_tag(event, "seq")
            value, height = self._list(depth)
        else:
            self._check_tag(event, "map")
            value, height = self._mapping(depth)
        node = Node(value, self._at(event))
        if event.anchor:
            self.anchors[event.anchor] = (node, self.count - before, height)
        return node, height

    def _alias(self, event: Any, depth: int) -> tuple[Node, int]:
        if event.anchor not in self.anchors:
            self._break(event, "an alias to an anchor that is not defined above; put text with a leading * in quotes")
        known = self.anchors[event.anchor]
        if known is None:
            self._break(event, "an alias inside the value that it stands for")
        node, nodes, height = known
        self._bound(event, nodes=nodes, depth=depth + height)
        return node, height

    def _list(self, depth: int) -> tuple[list[Node], int]:
        items = []
        height = 0
        while not isinstance(event := next(self.events), yaml.SequenceEndEvent):
            node, below = self._node(event, depth + 1)
            items.append(node)
            height = max(height, below + 1)
        return items, height

    def _mapping(self, depth: int) -> tuple[dict[str, Node], int]:
        items: dict[str, Node] = {}
        height = 0
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            key, _ = self._node(event, depth + 1)
            inner = next(self.events)
            node, below = self._node(inner, depth + 1)
            height = max(height, below + 1)
            if depth == 0 and key.value in SWITCHES and node.value is None and getattr(inner, "value", None) == "":
                said = f"is empty: write `{key.value}: {{}}` for its defaults, or `{key.value}: null` for none"
                self.problems.append(problem(self._at(event), said, key.value))
            if self._usable(event, key, items):
                items[key.value] = Node(node.value, node.place, self._at(event))
        return items, height

    def _usable(self, event: Any, key: Node, items: dict[str, Node]) -> bool:
        if not isinstance(key.value, str):
            self._report(event, "a key is text; put it in quotes if it is meant")
        elif key.value == "<<" and getattr(event, "implicit", (False,))[0]:
            self._report(event, "merge keys are not read; put the shared part in a file and name it with `extends:`")
        elif key.value in items:
            first = items[key.value].key or items[key.value].place
            name = repr(key.value[:60])[1:-1]
            self._report(event, f"duplicate key {name}; it is on line {first.line} already")
        else:
            return True
        return False

    def _check_tag(self, event: Any, core: str) -> None:
        if event.tag not in (None, "!", CORE + core):
            self._report(event, "tags are not read; take it off")

    def _scalar(self, event: Any) -> Any:
        """The value by the YAML 1.2 core schema: `2e-5` is a number, `no` is text."""
        if NEVER.search(event.value):
            self._report(event, "the characters U+0000 and U+D800 to U+DFFF are not allowed")
            return NEVER.sub("?", event.value)
        tag = event.tag.removeprefix(CORE) if event.tag else ""
        if tag in TAGS:
            value = self._plain(event)
            if tag == "float" and type(value) is int:
                return float(value)
            if type(value) is not TAGS[tag]:
                self._report(event, f"the value is not of the type that its tag !!{tag} says")
            return value
        if tag not in ("", "!", "str"):
            self._report(event, "tags are not read; take it off")
        return self._plain(event) if event.implicit[0] and not tag else event.value

    def _plain(self, event: Any) -> Any:
        value, wrong = scalars.read(event.value)
        if wrong:
            self._report(event, wrong)
        return value
