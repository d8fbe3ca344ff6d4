"""Text for a terminal, in which no character does anything but appear."""

from __future__ import annotations

import unicodedata

INVISIBLE = ("Cc", "Cf", "Co", "Cs", "Cn", "Zl", "Zp")
"""Unicode categories of characters that are shown by their numbers."""


def visible(text: str) -> str:
    """Return `text` with every character that a terminal would act on, or not show, by its number; lines stay."""
    return "".join(
        char
        if char == "\n" or (char >= " " and unicodedata.category(char) not in INVISIBLE)
        else f"<U+{ord(char):04X}>"
        for char in text
    )
