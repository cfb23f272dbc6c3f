"""The YAML reader: YAML 1.2 scalars, places, and text that would break a reader."""

import pytest
import yaml as pyyaml

from finetune_cli.recipe import scalars
from finetune_cli.recipe.yaml import MAX_NODES, Node, parse


def value(text: str) -> object:
    node, problems = parse(f"a: {text}", "f")
    assert node is not None
    assert problems == []
    return node.value["a"].value


def wrong(text: str) -> list[str]:
    return [str(problem) for problem in parse(text, "f")[1]]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2e-5", 2e-5), ("1.", 1.0), (".5", 0.5), ("1e5", 1e5), ("-3", -3), ("007", 7), ("0o17", 15), ("0x1F", 31),
        ("no", "no"), ("yes", "yes"), ("on", "on"), ("off", "off"), ("true", True), ("FALSE", False), ("True", True),
        ("null", None), ("~", None), ("", None), ("'1'", "1"), ("1_000", "1_000"), ("12:30", "12:30"), ("0b1", "0b1"),
        ("2024-01-01", "2024-01-01"), ("!!str 5", "5"), ("!!float 3", 3.0), ("! 5", "5"), ("|\n  5", "5"),
    ],
)  # fmt: skip
def test_core_scalars(text: str, expected: object) -> None:
    found = value(text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: 1e999", "f:1:4  the number is too large; put it in quotes if it is text"),
        ("a: " + "9" * 5000, "f:1:4  a number of 5000 digits; put it in quotes if it is text"),
        ("a: .inf", "f:1:4  a number must be finite; put it in quotes if it is text"),
        ("a: -.INF", "f:1:4  a number must be finite; put it in quotes if it is text"),
        ("a: .nan", "f:1:4  a number must be finite; put it in quotes if it is text"),
        ("a: 1\nb: 2\na: 3", "f:3:1  duplicate key a; it is on line 1 already"),
        ("a: 1\n1: 2", "f:2:1  a key is text; put it in quotes if it is meant"),
        ("? [x]\n: 2", "f:1:3  a key is text; put it in quotes if it is meant"),
        ("a: !!python/name:os.system x", "f:1:4  tags are not read; take it off"),
        ("a: !!set {x}", "f:1:4  tags are not read; take it off"),
        ("a: !!int x", "f:1:4  the value is not of the type that its tag !!int says"),
        ('a: "\\0"', "f:1:4  the characters U+0000 and U+D800 to U+DFFF are not allowed"),
        ("", "f:1:1  the file is empty"),
        ("# only a comment", "f:1:1  the file is empty"),
        ("a: 1\n---\nb: 2", "f:2:1  a second document starts here; a recipe is one document"),
        ("a:\n\tb: 1", "f:2:1  a tab; YAML is indented with spaces"),
        ("a: b: c", "f:1:5  not valid YAML: unexpected `:`; put text with a colon in quotes"),
        ("a: \x07", "f:1:4  the control character U+0007 is not allowed"),
        ("é: 1\nb: \x00", "f:2:4  the control character U+0000 is not allowed"),
        ("a: &x [1, *x]", "f:1:11  an alias inside the value that it stands for"),
        ("a: *.py", "f:1:5  not valid YAML: put text with a leading * or & in quotes"),
        ("a: *x",
         "f:1:4  an alias to an anchor that is not defined above; put text with a leading * in quotes"),
        ("a: &x {b: 1}\nc: {<<: *x}",
         "f:2:5  merge keys are not read; put the shared part in a file and name it with `extends:`"),
    ],
)  # fmt: skip
def test_problems(text: str, expected: str) -> None:
    assert wrong(text) == [expected]


def test_deep_nesting_is_bounded() -> None:
    assert wrong("a: " + "[" * 100_000) == ["f:1:54  nested deeper than 50 levels"]
    chain = "a0: &a0 " + "[" * 40 + "]" * 40 + "\n"
    chain += "".join(f"a{n}: &a{n} {'[' * 40}*a{n - 1}{']' * 40}\n" for n in range(1, 60))
    assert wrong(chain) == ["f:2:49  nested deeper than 50 levels"]


def test_aliases_count_as_what_they_stand_for() -> None:
    laughs = "a0: &a0 [lol]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12))
    (line,) = wrong(laughs)
    assert line.endswith(f"more than {MAX_NODES:,} values (an alias counts as all that it stands for)")


def test_every_key_and_value_has_its_place() -> None:
    node, _ = parse("a:\n  - é: 1\n    b: 'x'\n", "f")
    assert node is not None
    b: Node = node.value["a"].value[0].value["b"]
    assert (b.key and (b.key.line, b.key.column), (b.place.line, b.place.column)) == ((3, 5), (3, 8))


def test_without_libyaml_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(pyyaml, "CSafeLoader")
    assert value("{b: [2e-5, no]}") is not None
    assert wrong("a:\n\tb: 1") == ["f:2:1  a tab; YAML is indented with spaces"]
    assert wrong("%YAML " + "9" * 5000 + ".1\n---\na: 1") == ["f:1:1  not valid YAML"]
    assert wrong('a: "\\Uffffffff"') == ["f:1:1  not valid YAML"]


def test_dump_is_read_back_as_the_same() -> None:
    data = {"a": ["1e5", "0o17", "no", "", "null", 2e-5, 1e300, None, True, "x: y", "é"], "b": {"c": "1.", "d": {}}}
    node, problems = parse(scalars.dump(data), "f")
    assert node is not None
    assert problems == []
    assert node.plain() == data
    assert pyyaml.safe_load(scalars.dump({"a": ["1e5", "no"]})) == {"a": ["1e5", "no"]}
