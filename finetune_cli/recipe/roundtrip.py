"""A YAML text in which keys can be renamed and moved while comments, order and quoting stay as they are."""

import io
import re
from collections.abc import Callable, Iterator
from typing import Any

STEP = re.compile(r"[^.\[\]]+|\[\d*\]")
Key = Any
"""Text in a mapping, a place in a list."""


class Unsure(Exception):
    """Why a key is left as it is, for people."""


class Document:
    """A text and its ruamel.yaml tree. A comment belongs to the key before it on its line, or to what follows it."""

    def __init__(self, text: str) -> None:
        from ruamel.yaml import YAML
        from ruamel.yaml.error import YAMLError
        from ruamel.yaml.nodes import ScalarNode
        from ruamel.yaml.resolver import VersionedResolver

        class AllText(VersionedResolver):
            """Plain scalars are text: 2e-5, ~ and True are written back as they were."""

            def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
                return super().resolve(kind, "text" if kind is ScalarNode and implicit[0] else value, implicit)

        self.yaml = YAML()
        self.yaml.Resolver = AllText
        self.yaml.preserve_quotes = True
        self.yaml.width = 10**6
        widths = indents(text)
        self.step = widths["mapping"]
        self.yaml.indent(**widths)
        try:
            self.root = self.yaml.load(text)
        except YAMLError as error:
            raise Unsure("the file cannot be read by ruamel.yaml") from error

    def text(self) -> str:
        stream = io.StringIO()
        self.yaml.dump(self.root, stream)
        return stream.getvalue()

    def move(self, line: int, column: int, target: str, *, shorthand: Callable[[str], str]) -> None:
        """The key that stands at this place becomes `target`, a dotted key. Raises Unsure."""
        source, key = self.find(line, column)
        *above, leaf = STEP.findall(target)
        parent = self.root
        for n, step in enumerate(above):
            if step.startswith("["):
                parent = item_of(parent, step)
            elif [*above, leaf][n + 1].startswith("["):
                parent = parent.get(step)
            else:
                parent = self.section(parent, step, source, key, shorthand(step))
        if leaf in parent:
            raise Unsure(f"{target} is written already; keep one")
        if parent is source:
            rename(parent, key, leaf)
        else:
            shift(source, key, self.depth(parent) - self.depth(source))
            transfer(source, key, parent, leaf)
            self.drop_empty(source)
        shift(*self.line_of(parent, leaf), len(leaf) - len(key))

    def write(self, line: int, column: int, value: str) -> None:
        """Another scalar for the key that stands at this place. Raises Unsure."""
        source, key = self.find(line, column)
        shift(*self.line_of(source, key), len(value) - len(str(source[key])))
        source[key] = value

    def find(self, line: int, column: int) -> tuple[Any, str]:
        for mapping in mappings(self.root):
            for key in mapping:
                if mapping.lc.data.get(key, ())[:2] == [line - 1, column - 1]:
                    return mapping, key
        raise Unsure("the key comes from an anchor or another file")

    def section(self, parent: Any, step: str, source: Any, key: str, bare: str) -> Any:
        """The mapping at a step of the target, made where there is none yet. `bare`: the field that a value in place of
        a mapping stands for."""
        from ruamel.yaml.comments import CommentedMap, CommentedSeq

        if parent is None:
            raise Unsure("there is no list yet that it could be an item of")
        if step not in parent:
            where = list(parent).index(key) if parent is source else len(parent)
            parent.insert(where, step, CommentedMap())
        elif not isinstance(parent[step], CommentedMap):
            if not bare or (isinstance(parent[step], CommentedSeq) and not parent[step].fa.flow_style()):
                raise Unsure(f"{step} is written in another form; write it in full first")
            full = CommentedMap({bare: parent[step]})
            shift(parent, step, self.step + len(bare) - len(step))
            if step in parent.ca.items:
                full.ca.items[bare] = parent.ca.items.pop(step)
            parent[step] = full
        return parent[step]

    def depth(self, mapping: Any) -> int:
        """The column that the keys of a mapping start in."""
        if mapping is self.root:
            return 0
        return int(mapping.lc.col) if mapping.lc.col is not None else self.step

    def line_of(self, mapping: Any, key: str) -> tuple[Any, str]:
        """The key that a comment after this one belongs to: the outermost that is written on one line."""
        for outer in mappings(self.root) if mapping.fa.flow_style() else ():
            for name, value in outer.items():
                if value is mapping:
                    return self.line_of(outer, name)
        return mapping, key

    def drop_empty(self, emptied: Any) -> None:
        """A section whose only key has moved away."""
        for mapping in list(mappings(self.root)):
            for key, value in list(mapping.items()):
                if value is emptied and not value:
                    cut = cut_tail(mapping, key)
                    take_out(mapping, key, cut)


def item_of(parent: Any, step: str) -> Any:
    """The item of a list at `[2]`, or at `[]` the only one; an item may stand without its list."""
    place = int(step[1:-1]) if step[1:-1] else 0
    if isinstance(parent, list):
        certain = len(parent) > place and (step[1:-1] or len(parent) == 1)
        parent = parent[place] if certain else None
    if not isinstance(parent, dict):
        raise Unsure("it is not certain which item of the list is meant, or the item is a bare path")
    return parent


def shift(mapping: Any, key: str, columns: int) -> None:
    """Keep the gap before a comment on the line of a key whose line grows."""
    token = (mapping.ca.items.get(key) or [None] * 3)[2]
    if token is not None and not token.value.startswith("\n"):
        token.start_mark.column += columns


def indents(text: str) -> dict[str, int]:
    """The indentation that a text uses: of mappings, and of lists and their dashes."""
    mapping = min((len(m[1]) for m in re.finditer(r"^( +)[^\s#-]", text, re.M)), default=2)
    found = re.search(r"^( *)[^\s#-][^\n]*:[ \t]*(?:#[^\n]*)?\n(?:[ \t]*(?:#[^\n]*)?\n)*( *)- ", text, re.M)
    offset = max(0, len(found[2]) - len(found[1])) if found else 2
    return {"mapping": mapping, "sequence": offset + 2, "offset": offset}


def mappings(value: Any) -> Iterator[Any]:
    """Every mapping of a tree, outer ones first."""
    inner: Any = ()
    if isinstance(value, dict):
        yield value
        inner = value.values()
    elif isinstance(value, list):
        inner = value
    for child in inner:
        yield from mappings(child)


def rename(mapping: Any, old: str, new: str) -> None:
    where, value, comments = list(mapping).index(old), mapping[old], mapping.ca.items.pop(old, None)
    del mapping[old]
    mapping.insert(where, new, value)
    if comments is not None:
        mapping.ca.items[new] = comments


def transfer(source: Any, key: str, target: Any, name: str) -> None:
    """The key goes to the end of another mapping; lines of comment that follow it stay where they are."""
    tail = cut_tail(source, key)
    value, comments = source[key], source.ca.items.pop(key, None)
    take_out(source, key, tail)
    last = list(target)[-1] if target else None
    below = cut_tail(target, last) if last is not None else ""
    target[name] = value
    if comments is not None:
        target.ca.items[name] = comments
    add_tail(target, name, below)


def take_out(mapping: Any, key: str, tail: str) -> None:
    """Remove a key; what followed it now follows the key before it."""
    keys = list(mapping)
    at = keys.index(key)
    del mapping[key]
    mapping.ca.items.pop(key, None)
    if not tail:
        return
    if at:
        add_tail(mapping, keys[at - 1], tail)
    elif len(keys) > 1:
        from ruamel.yaml.error import CommentMark
        from ruamel.yaml.tokens import CommentToken

        before = mapping.ca.items.setdefault(keys[1], [None, None, None, None])
        before[1] = [CommentToken(tail, CommentMark(0), None), *(before[1] or [])]


def end_of(mapping: Any, key: Key) -> tuple[Any, Key, int]:
    """(container, key, slot) whose comment ends the value of a key: its last block leaf's."""
    container, last = mapping, key
    while isinstance(value := container[last], dict | list) and value and not value.fa.flow_style():  # type: ignore[union-attr]
        container, last = value, (list(value)[-1] if isinstance(value, dict) else len(value) - 1)
    return container, last, 2 if isinstance(container, dict) else 0


def cut_tail(mapping: Any, key: Key) -> str:
    """Take off, and return, the lines of comment after the value of a key; a comment on its last line stays."""
    container, last, slot = end_of(mapping, key)
    token = (container.ca.items.get(last) or [None] * 4)[slot]
    if token is None:
        return ""
    own, _, tail = token.value.partition("\n")
    if own:
        token.value = own + "\n"
    else:
        container.ca.items[last][slot] = None
        if not any(container.ca.items[last]):
            del container.ca.items[last]
    return str(tail)


def add_tail(mapping: Any, key: Key, tail: str) -> None:
    """Lines of comment after the value of a key."""
    from ruamel.yaml.error import CommentMark
    from ruamel.yaml.tokens import CommentToken

    if not tail:
        return
    container, last, slot = end_of(mapping, key)
    tokens = container.ca.items.setdefault(last, [None, None, None, None] if slot == 2 else [None, None])
    if tokens[slot] is None:
        tokens[slot] = CommentToken("\n" + tail, CommentMark(0), None)
    else:
        tokens[slot].value = tokens[slot].value.rstrip("\n") + "\n" + tail
