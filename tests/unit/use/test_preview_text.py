"""Previewed rows on a terminal."""

import io

from rich.console import Console

from finetune_cli.data.sheets import Bin, Block, Sheet
from finetune_cli.data.turns import Piece, Turn
from finetune_cli.use.preview_text import preview, show

PIECES = [
    Piece("<|im_start|>", (1,), 0, "context", True),
    Piece("user\n", (2,), 1),
    Piece("a b", (3,), 2, "trained"),
    Piece("\x1b[31m\u202e", (4,), 3, "trained"),
    Piece("\tc", (5,), 4, "cut"),
]
SHEET = Sheet(3, "a.jsonl:4", blocks=[Block("completion", [Turn("user", PIECES)])], tokens=4, trained=2, prompts=1)


def printed(*sheets, packed="", where=None, **settings):
    console = Console(file=io.StringIO(), width=200, **settings)
    show(console, sheets, packed=packed, where=where)
    return console.file.getvalue()


def test_without_colours_marks_say_what_is_trained():
    lines = printed(SHEET, packed="packing: 1 row").splitlines()
    assert lines[0].startswith("⟦trained⟧  context")
    assert lines[1] == "row 3  a.jsonl:4  4 tokens, 2 trained"
    assert lines[2] == "▌user  5 tokens (2 trained, 1 cut)"
    assert lines[3:5] == ["<|im_start|>user⏎", "⟦a·b␛[31m\\u202e⟧⟨→c⟩"]
    assert lines[5] == "as inference: 1 of 1 prompts token for token"
    assert lines[-1] == "packing: 1 row"


def test_with_colours_nothing_of_a_row_reaches_the_terminal():
    text = printed(SHEET, Sheet(4, "a.jsonl:5", error="malformed: \x1b]0;title\x07"), force_terminal=True)
    assert "\x1b[31m\u202e" not in text
    assert "\x1b]" not in text
    assert "⟦" not in text
    assert "␛[31m" in text


def test_what_is_odd_is_said():
    bins = [Bin(2, [(1, 0), (5, 1)], 90, 100), Bin(3, [], 10, 100)]
    odd = Sheet(
        0,
        "a",
        part=1,
        parts=3,
        dropped="overlength: 9 tokens",
        warnings=[("id", "what")],
        differences=["so"],
        bins=bins,
    )
    console = Console(file=io.StringIO(), width=200)
    console.print(preview(odd, colours=False))
    assert console.file.getvalue().splitlines()[:6] == [
        "row 0, part 1 (3 in all)  a  0 tokens, nothing is trained",
        "dropped as overlength: 9 tokens",
        "id: what",
        "unlike inference: so",
        "bin 2, 90 of 100 tokens (90.0%), with rows 1, 5 part 1",
        "bin 3, 10 of 100 tokens (10.0%), alone",
    ]


def test_no_rows():
    assert printed(where="split") == "no row is split\n"
    assert printed() == "no rows\n"
