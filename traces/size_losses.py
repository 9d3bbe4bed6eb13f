"""How much sets of several sizes miss as they grow older: what sizes per unit are chosen by."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from traces.reporting.whole_file import whole_file

FILE_NAME = "size_losses.npz"
FORMAT = "recycled-attention-size-losses/1"


@dataclass(frozen=True)
class SizeLosses:
    """Mean lost mass by size and age, along the path of full attention; a companion of a folder of traces.

    Attributes:
        model: As in the traces.
        selection: As in the traces, with `k` and without `unit_k`.
        sizes: Tokens of the sets, rising; `k` is one of them.
        lost: Per prompt name, float32 `(sizes, max_age, layers, kv_heads)` in [0, 1]: share of attention that a set of
            that size and age misses, mean over the steps that have one; NaN where none has.
    """

    model: Mapping[str, Any]
    selection: Mapping[str, Any]
    sizes: tuple[int, ...]
    lost: Mapping[str, np.ndarray]

    def write(self, folder: Path | str) -> Path:
        """Write it into a folder of traces: beside its place first, then renamed."""
        path = Path(folder) / FILE_NAME
        header = {
            "format": FORMAT,
            "model": dict(self.model),
            "selection": dict(self.selection),
            "sizes": list(self.sizes),
        }
        arrays: dict[str, Any] = {"header": np.array(json.dumps(header)), **self.lost}
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return path

    @classmethod
    def read(cls, folder: Path | str) -> SizeLosses | None:
        """Read that of a folder; None if it has none.

        Raises:
            ValueError: If the file is damaged or foreign.
        """
        path = Path(folder) / FILE_NAME
        if not path.exists():
            return None
        try:
            with path.open("rb") as file, np.load(file) as arrays:
                header = json.loads(str(arrays["header"]))
                lost = {name: arrays[name] for name in arrays.files if name != "header"}
            if header["format"] != FORMAT:
                raise ValueError(f"its format is {header['format']!r}, not {FORMAT!r}")
            units = int(header["model"]["layers"]), int(header["model"]["kv_heads"])
            sizes = tuple(int(size) for size in header["sizes"])
            if any(table.shape[0] != len(sizes) or table.shape[2:] != units for table in lost.values()):
                raise ValueError(f"its tables are not of {len(sizes)} sizes, {units[0]} layers and {units[1]} KV heads")
            return cls(header["model"], header["selection"], sizes, lost)
        except (OSError, EOFError, BadZipFile, AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no file of size losses ({error}): remove it and measure again.") from error
