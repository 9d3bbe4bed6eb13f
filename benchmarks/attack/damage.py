"""Damaging what somebody else might hand over."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

# Texts of JSON, some of which no parser gives back as it was.
_ABSURD_TEXTS = (
    *(
        "NaN",
        "Infinity",
        "-Infinity",
        "1e999",
        "-1e999",
        "1e-400",
        "1" + "0" * 400,
        "-1" + "0" * 5000,
        "9007199254740993",
    ),
    *("-0.0", "1e308", "5e-324", "1e15", "1e16", "0.1e1", "00", "+1", ".5", "0x10", "true", "null", "[]", "{}", '""'),
    *('"\\ud800"', '"\\u0000"', '"/etc/passwd"', '"../../up"', '"' + "x" * 5000 + '"', "[" * 2000, "[" * 50 + "]" * 50),
    *('{"kind": "always_full"}', '{"a": ' * 40 + "1" + "}" * 40, "[[1, 2], [3, 4]]", "[[1], [2, 3]]", "[[]]"),
)
_ABSURD_VALUES = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        0.5,
        1.5,
        -0.0,
        1e308,
        -1e308,
        5e-324,
        2**31,
        2**53,
        2**53 + 1,
        2**64,
        10**18,
        10**400,
    ),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "nan", "../up", "/tmp/up", "\ud800", "\x00", "x" * 100_000),
    *([], [[]], [1], [[1, 2], [3, 4]], [[1], [2, 3]], [["a"]], {}, {"kind": "nope"}, {"kind": ["a"]}, [0] * 300_000),
    {"kind": "fixed_stride", "stride": 10**30},
)


def damaged_text(values: Any, rng: random.Random) -> bytes:
    """A file of JSON with one to three damages, in its structure, its numbers or its bytes."""
    values = copy.deepcopy(values)
    texts: list[str] = []
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        if rng.random() < 0.3:
            texts.append(rng.choice(_ABSURD_TEXTS))
            _change(values, rng, f"@{len(texts) - 1}@")
        else:
            values = damaged_values(values, rng)
    content = json.dumps(values, indent=rng.choice((None, 1)))
    for number, text in enumerate(texts):
        content = content.replace(f'"@{number}@"', text)
    encoded = content.encode("utf-8", "surrogatepass")
    return damaged_bytes(encoded, rng) if rng.random() < 0.25 else encoded


def damaged_values(values: Any, rng: random.Random) -> Any:
    """JSON values with one damage in their structure; `values` may be changed in place."""
    places = list(_places(values))
    if not places or rng.random() < 0.02:
        return copy.deepcopy(rng.choice(_ABSURD_VALUES))
    inside, key = rng.choice(places)
    match rng.randrange(8):
        case 0:
            del inside[key]
        case 1 if isinstance(inside, dict):
            inside[rng.choice(("extra", "kind", "k", "x" * 5000, "", "\ud800"))] = inside[key]
        case 2:
            deep = inside[key]
            for _ in range(rng.choice((1, 3, 31, 200))):
                deep = rng.choice(([deep], {"kind": "max_age", "max_age": 3, "policy": deep}))
            inside[key] = deep
        case 3:
            other, other_key = rng.choice(places)
            inside[key] = copy.deepcopy(other[other_key])
        case 4 if isinstance(inside[key], (int, float)) and not isinstance(inside[key], bool):
            inside[key] = inside[key] * rng.choice((-1, 0, 0.5, 2, 1000, 1e-3, 1e9)) + rng.choice((0, 1, -1))
        case 5 if isinstance(inside[key], list):
            inside[key] = rng.choice((inside[key] * 2, inside[key][:-1], inside[key][::-1], [inside[key]]))
        case _:
            inside[key] = copy.deepcopy(rng.choice(_ABSURD_VALUES))
    return values


def damaged_bytes(content: bytes, rng: random.Random, within: int | None = None) -> bytes:
    """Some bytes changed, cut, doubled or put in, in the first `within` of them."""
    changed, end = bytearray(content), min(within or len(content), len(content))
    for _ in range(rng.choice((1, 1, 2, 8))):
        place = rng.randrange(max(end, 1))
        match rng.randrange(5):
            case 0 | 1:
                changed[place : place + 1] = bytes([rng.randrange(256)])
            case 2:
                del changed[place : place + rng.choice((1, 1, 16, len(changed)))]
            case 3:
                changed[place:place] = changed[place : place + rng.choice((1, 16, 256))]
            case 4:
                changed[place:place] = rng.choice(
                    (b"\x00", b"\xff\xfe", b"[" * 3000, b"9" * 500, b'"', b"\xf0\x9f", b"-")
                )
    return bytes(changed)


def _change(values: Any, rng: random.Random, value: Any) -> None:
    if places := list(_places(values)):
        inside, key = rng.choice(places)
        inside[key] = value


def _places(values: Any) -> Iterator[tuple[Any, Any]]:
    """All places of values inside of others, each as often as it is near the root."""
    level = [values] if isinstance(values, (dict, list)) else []
    for depth in range(6):
        inner = []
        for inside in level:
            keys = list(inside) if isinstance(inside, dict) else range(min(len(inside), 20))
            for key in keys:
                yield from [(inside, key)] * max(1, 4 - depth)
                if isinstance(inside[key], (dict, list)):
                    inner.append(inside[key])
        level = inner
