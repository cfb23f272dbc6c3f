"""Previewed rows on a terminal: tokens turn by turn, what is trained in green; marks where there are no colours."""

from collections.abc import Iterable, Sequence
from itertools import groupby

from rich.console import Console, Group
from rich.text import Text

from finetune_cli.data.sheets import Bin, Sheet
from finetune_cli.data.turns import Piece, Turn
from finetune_cli.data.visible import CONTROLS

SHADES = {
    "trained": ("white on #1b5e20", "white on #33803a"),
    "context": ("", "dim"),
    "cut": ("strike red", "strike dim red"),
}
"""Two shades of each, so that one token ends where the next begins."""
MARKS = {"trained": ("⟦", "⟧"), "context": ("", ""), "cut": ("⟨", "⟩")}
VISIBLE = {**CONTROLS, **str.maketrans({" ": "·", "\n": "⏎\n", "\t": "→"})}


def show(console: Console, sheets: Iterable[Sheet], *, packed: str, where: str | None) -> None:
    """Every sheet as it comes, under a legend."""
    colours, none = console.color_system is not None, True
    for sheet in sheets:
        if none:
            console.print(legend(colours=colours))
            none = False
        console.print(preview(sheet, colours=colours))
    if none:
        console.print(f"no row is {where}" if where else "no rows")
    if packed:
        console.print(Text(packed))


def legend(*, colours: bool) -> Text:
    rest = Text("· space  ⏎ new line")
    if not colours:
        return Text.assemble("⟦trained⟧  context  ⟨cut off⟩  ", rest)
    named = (("trained", SHADES["trained"][0]), ("special token", "bold magenta"), ("cut off", SHADES["cut"][0]))
    return Text("  ").join([*(Text(name, style=style) for name, style in named), rest])


def preview(sheet: Sheet, *, colours: bool = True) -> Group:
    """One row: a line of facts, its tokens turn by turn, and what is odd about it."""
    part = f", part {sheet.part} ({sheet.parts} in all)" if sheet.parts > 1 else ""
    name = (f"row {sheet.row}{part}", "bold")
    if sheet.error:
        return Group(Text.assemble(name, f"  {sheet.place}"), Text(plain(sheet.error), style="red"), Text(""))
    trained = "nothing is trained" if sheet.dropped else f"{sheet.trained} trained"
    lines = [Text.assemble(name, f"  {sheet.place}  {sheet.tokens} tokens, {trained}")]
    if sheet.dropped:
        lines.append(Text(f"dropped as {sheet.dropped}", style="red"))
    for block in sheet.blocks:
        if block.titled:
            lines.append(Text(f"{block.name}, {block.tokens} tokens", style="bold"))
        for turn in block.turns:
            lines += [Text(turn_line(turn), style="cyan"), tokens(turn.pieces, colours=colours)]
    lines += [Text(f"{name}: {plain(message)}", style="yellow") for name, message in sheet.warnings]
    lines += [Text(f"unlike inference: {plain(text)}", style="yellow") for text in sheet.differences]
    if sheet.prompts and not sheet.differences:
        lines.append(Text(f"as inference: {sheet.prompts} of {sheet.prompts} prompts token for token", style="dim"))
    lines += [Text(bin_line(one), style="dim") for one in sheet.bins]
    return Group(*lines, Text(""))


def tokens(pieces: Sequence[Piece], *, colours: bool) -> Text:
    """Tokens in a row, with white space and special tokens that can be seen."""
    text = Text()
    for state, run in groupby(enumerate(pieces), key=lambda numbered: numbered[1].state):
        opens, closes = ("", "") if colours else MARKS[state]
        text.append(opens)
        for number, piece in run:
            special = " bold magenta" if state == "context" else " bold"
            text.append(piece.text.translate(VISIBLE), style=SHADES[state][number % 2] + special * piece.special)
        text.append(closes)
    text.rstrip()
    return text


def turn_line(turn: Turn) -> str:
    counts = ", ".join(f"{n} {what}" for what, n in (("trained", turn.trained), ("cut", turn.cut)) if n)
    return f"▌{plain(turn.role)}  {turn.tokens} tokens" + (f" ({counts})" if counts else "")


def bin_line(one: Bin) -> str:
    """The bin of a packed row."""
    names = [f"{row}" + (f" part {part}" if part else "") for row, part in one.others]
    more = " ..." if len(names) > 20 else ""
    shared = f"with row{'s' * (len(names) > 1)} {', '.join(names[:20])}{more}" if names else "alone"
    return f"bin {one.number}, {one.tokens} of {one.capacity} tokens ({one.tokens / one.capacity:.1%}), {shared}"


def plain(text: str) -> str:
    """Text of a row that does nothing to the terminal."""
    return text.translate(CONTROLS)
