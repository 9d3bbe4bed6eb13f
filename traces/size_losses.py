"""How much sets of several sizes miss as they grow older: what sizes per unit are chosen by."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from policies.shown import sentence, shown
from policies.strict_json import parse_json
from traces.reporting.arrays_file import read_arrays, write_arrays

FILE_NAME = "size_losses.npz"
FORMAT = "recycled-attention-size-losses/3"


class SetLosses(NamedTuple):
    """What sets of several sizes miss on one prompt, shares of attention in [0, 1].

    Attributes:
        by_age: float32 `(sizes, max_age, layers, kv_heads)`: mean over the steps that have a set of that age; NaN where
            none has.
        since_prompt: float32 `(sizes, steps, layers, kv_heads)`: what the prompt's own set misses at each step.
    """

    by_age: np.ndarray
    since_prompt: np.ndarray


@dataclass(frozen=True)
class SizeLosses:
    """Lost mass by size of the sets, along the path of full attention; a companion of a folder of traces.

    Attributes:
        model: As in the traces.
        selection: As in the traces, with `k` and without `unit_k`.
        sizes: Tokens of the sets, rising; `k` is one of them.
        lost: By prompt name.
    """

    model: Mapping[str, Any]
    selection: Mapping[str, Any]
    sizes: tuple[int, ...]
    lost: Mapping[str, SetLosses]

    def write(self, folder: Path | str) -> Path:
        """Write it into a folder of traces: beside its place first, then renamed."""
        path = Path(folder) / FILE_NAME
        header = {
            "format": FORMAT,
            "model": dict(self.model),
            "selection": dict(self.selection),
            "sizes": list(self.sizes),
        }
        arrays: dict[str, Any] = {"header": np.array(json.dumps(header))}
        for name, lost in self.lost.items():
            arrays |= {f"{field}: {name}": array for field, array in lost._asdict().items()}
        write_arrays(path, arrays)
        return path

    @classmethod
    def read(cls, folder: Path | str) -> SizeLosses | None:
        """Read that of a folder; None if it has none, or a damaged, edited or foreign one, of which it warns."""
        path = Path(folder) / FILE_NAME
        if not path.exists():
            return None
        try:
            return cls._of(read_arrays(path))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            warnings.warn(sentence(f"{path} is no file of size losses ({error}): measuring them anew."), stacklevel=2)
            return None

    @classmethod
    def _of(cls, arrays: Mapping[str, np.ndarray]) -> SizeLosses:
        header = parse_json(str(arrays["header"]))
        names = [name.removeprefix("by_age: ") for name in arrays if name.startswith("by_age: ")]
        lost = {name: SetLosses(arrays[f"by_age: {name}"], arrays[f"since_prompt: {name}"]) for name in names}
        if header["format"] != FORMAT:
            raise ValueError(f"its format is {shown(header['format'])}, not {FORMAT!r}")
        units = int(header["model"]["layers"]), int(header["model"]["kv_heads"])
        sizes = tuple(int(size) for size in header["sizes"])
        tables = [table for of_prompt in lost.values() for table in of_prompt]
        if any(table.shape[0] != len(sizes) or table.shape[2:] != units for table in tables):
            raise ValueError(f"its tables are not of {len(sizes)} sizes, {units[0]} layers and {units[1]} KV heads")
        return cls(dict(header["model"]), dict(header["selection"]), sizes, lost)
