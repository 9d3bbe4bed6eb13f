"""Names that were read from a file and become the names of files."""

from __future__ import annotations

import re
from typing import Any

from policies.shown import shown

# Of a file's name, with room for an ending.
MOST_CHARACTERS = 200


def check_plain_name(name: Any) -> None:
    """Refuse what is no plain file name: a path would be written wherever it leads.

    Raises:
        ValueError: If it is not letters, digits, '.', '_' or '-', begins with none of the first two, or is longer than
            200 characters.
    """
    if (
        not isinstance(name, str)
        or len(name) > MOST_CHARACTERS
        or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name)
    ):
        raise ValueError(
            f"the prompt name {shown(name)} must be at most {MOST_CHARACTERS} letters, digits, '.', '_' or '-', the "
            "first a letter or digit"
        )
