"""What somebody else wrote, in a sentence that stays short whatever it is."""

from __future__ import annotations

import reprlib
from typing import Any

# Of a refusal.
MOST_CHARACTERS = 300
# Of them those that stay at the end of one that is cut: it says what is wrong.
_AT_THE_END = 120
_CUT = " ... "


def shown(value: Any, most: int = 60) -> str:
    """The `repr` of a value, of at most so many characters."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = short.maxlong = most
    try:
        text = short.repr(value)
    except (ValueError, RecursionError):
        # Python writes no whole numbers of more than some thousand digits.
        text = f"<{type(value).__name__}>"
    return text if len(text) <= most else text[: most - 3] + "..."


def sentence(text: object) -> str:
    """A refusal of at most 300 characters: of a longer one the beginning and the end."""
    whole = str(text)
    if len(whole) <= MOST_CHARACTERS:
        return whole
    return whole[: MOST_CHARACTERS - _AT_THE_END - len(_CUT)] + _CUT + whole[-_AT_THE_END:]
