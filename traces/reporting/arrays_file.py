"""Arrays kept in a file between runs, read only if they are what was written."""

from __future__ import annotations

import hashlib
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from policies.strict_json import check_plain_file
from traces.reporting.whole_file import whole_file

# Of a file, unpacked: a few bytes may claim to be any number.
_MOST_BYTES = 2**31
# In the file, beside its arrays.
_DIGEST = "digest"


def write_arrays(path: Path | str, arrays: Mapping[str, Any]) -> None:
    """Write arrays and their digest into a compressed `.npz`: beside its place first, then renamed."""
    given: dict[str, Any] = {name: np.asarray(array) for name, array in arrays.items()}
    given[_DIGEST] = np.array(_digest(given))
    with whole_file(path) as partial, partial.open("wb") as file:
        np.savez_compressed(file, **given)


def read_arrays(path: Path | str) -> dict[str, np.ndarray]:
    """The arrays of a file.

    Raises:
        ValueError: If it is damaged, or its arrays are not those that were written; with a clause.
    """
    try:
        check_plain_file(path)
        with zipfile.ZipFile(path) as whole:
            if sum(entry.file_size for entry in whole.infolist()) > _MOST_BYTES:
                raise ValueError(f"it unpacks to more than {_MOST_BYTES:,} bytes")
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        if str(arrays.pop(_DIGEST)) != _digest(arrays):
            raise ValueError("its arrays are not those that were written")
    except _DAMAGES as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return arrays


# What zip, zlib and NumPy raise on bytes of any sort.
_DAMAGES = (
    OSError,
    EOFError,
    KeyError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    RuntimeError,
    MemoryError,
    SyntaxError,
    OverflowError,
    zipfile.BadZipFile,
    zlib.error,
)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = arrays[name]
        digest.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
