"""How what lies on disk differs from what is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any


def differences(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """`k 48 instead of 50, window ...` for all that differs; empty if nothing does. Values are plain JSON."""
    return ", ".join(
        f"{name} {json.dumps(theirs.get(name))} instead of {json.dumps(ours.get(name))}"
        for name in dict.fromkeys((*ours, *theirs))
        if json.dumps(theirs.get(name)) != json.dumps(ours.get(name))
    )
