"""The page of previewed rows: one file, everything from a row escaped, nothing but our own script runs."""

import hashlib
import re
from base64 import b64encode
from html.parser import HTMLParser

import pytest

from finetune_cli.data.sheets import Bin, Block, Sheet
from finetune_cli.data.turns import Piece, Turn
from finetune_cli.errors import MachineError
from finetune_cli.use.preview_html import page, write

EVIL = "</pre></details><script>alert(1)</script><img src=x onerror=alert(2)>&amp; \"'"


def sheet(row=0, text="one two", **facts):
    turn = Turn(facts.pop("role", "user"), [Piece(text, (1, 2), 0, "trained", True), Piece("\n\tx ", (3,), 2, "cut")])
    return Sheet(
        row, facts.pop("place", "a.jsonl:1"), blocks=[Block("completion", [turn])], tokens=3, trained=2, **facts
    )


class Reader(HTMLParser):
    """Elements, their attributes, and the text of the tokens."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.tokens, self.inside = [], [], "", False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        self.inside = self.inside or tag == "pre"

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "pre"

    def handle_data(self, data):
        self.tokens += data if self.inside else ""


def test_all_that_comes_from_a_row_is_escaped():
    evil = sheet(
        text=EVIL, role=EVIL, place=EVIL, dropped=EVIL, warnings=[(EVIL, EVIL)], differences=[EVIL],
    )  # fmt: skip
    read = Reader(page([evil, Sheet(1, EVIL, error=EVIL)], title=EVIL, packed=EVIL))
    assert read.tags.count("script") == 1
    assert "img" not in read.tags
    assert not [name for name, _ in read.attributes if name.startswith("on")]
    assert read.tokens == EVIL + "\n\tx "


def test_one_file_and_one_script_that_may_run():
    text = page([sheet()], title="recipe.yaml")
    assert not re.search(r"(src|href|action)=[\"']?(?!#)|url\(|@import|https?:", text)
    (script,) = re.findall(r"<script>(.*)</script>", text, re.S)
    digest = b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'" in text


def test_characters_that_cannot_be_seen_are_shown():
    read = Reader(page([sheet(text="a\u202eb\x1b\u200b🙂")], title=""))
    assert read.tokens.startswith("a\\u202eb␛\\u200b🙂")


def test_what_is_said_of_rows():
    bins = [Bin(4, [(7, 0), (8, 1)], 90, 100)]
    sheets = [
        sheet(0, bins=bins, prompts=1), sheet(7, part=0, parts=2), 
        sheet(7, part=1, parts=2, dropped="overlength: 9 tokens"),
        sheet(9, warnings=[("control_token", "message 0")]), Sheet(10, "a.jsonl:11", error="malformed: no"),
    ]  # fmt: skip
    text = page(sheets, title="recipe.yaml", packed="packing: 5 rows")
    for said in (
        "<b>4</b> rows", "<b>12</b> tokens", "<b>8</b> trained (67%)", "<b>2</b> not trained on",
        "<b>1</b> with warnings",
        "packing: 5 rows", "bin 4, 90 of 100 tokens (90.0%)", 'with rows <a href="#row-7-0">7</a>, 8 part 1',
        "dropped as overlength: 9 tokens", "control_token: message 0", "malformed: no", "token 0, id 1 2",
    ):  # fmt: skip
        assert said in text, said
    assert [value.split() for name, value in Reader(text).attributes if name == "data-is"] == [
        [], ["split"], ["dropped", "split"], ["odd"], ["broken"],
    ]  # fmt: skip


def test_the_first_of_many_rows_are_unfolded():
    opened = [Reader(page([sheet(i) for i in range(n)], title="")).attributes.count(("open", None)) for n in (20, 200)]
    assert opened == [20, 10]


def test_a_page_that_cannot_be_written(tmp_path):
    with pytest.raises(MachineError, match="cannot be written"):
        write(tmp_path, [], title="")
    write(tmp_path / "a.html", [], title="no rows")
    assert (tmp_path / "a.html").read_text().startswith("<!doctype html>")
