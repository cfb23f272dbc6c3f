"""Characters that cannot be seen, or that do something to a terminal or a page, and what is shown for each."""

HIDDEN = (
    0x00AD,
    0x061C,
    *range(0x200B, 0x200D),
    0x200E,
    0x200F,
    *range(0x2028, 0x202F),
    *range(0x2060, 0x2070),
    0xFEFF,
)
"""Soft hyphen, zero widths, separators and directions; not the joiner of emoji, U+200D."""
PLAIN = "\n\t "
"""White space that each view shows in its own way."""

CONTROLS: dict[int, str] = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in PLAIN},
    0x7F: "␡",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
    **{code: f"\\u{code:04x}" for code in HIDDEN},
}
"""For `str.translate`."""
