"""Results kept on disk under all that they were computed from, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import warnings
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recycler.model.loading import LoadedModel
from recycler.model.versions import versions
from traces.reporting.whole_file import whole_file

Arrays = Mapping[str, np.ndarray]
# In a result's file, beside its arrays.
_IDENTITY = "identity"


@dataclass(frozen=True)
class Store:
    """A folder of results, one file for each identity.

    Attributes:
        folder: Made when the first result is kept. Deleting it only costs time.
    """

    folder: Path

    def get(self, loaded: LoadedModel, depends_on: Mapping[str, Any], compute: Callable[[], Arrays]) -> Arrays:
        """Compute a result, or read what an equal computation gave.

        Computations are equal if the model's name, precision and weights, package versions and `depends_on` are. A file
        that is damaged, or is not what its name says, is computed anew, with a warning.

        Args:
            loaded: The model.
            depends_on: All else that the result depends on, as JSON values.
            compute: Gives arrays, none of them named "identity".
        """
        identity = json.dumps(
            {
                "model": loaded.id,
                "dtype": str(loaded.model.dtype),
                "weights": loaded.weights_digest,
                "versions": versions(),
                **depends_on,
            },
            sort_keys=True,
        )
        path = self.folder / f"{hashlib.sha256(identity.encode()).hexdigest()[:32]}.npz"
        if path.exists():
            try:
                return _read(path, identity)
            except (OSError, EOFError, KeyError, ValueError, zipfile.BadZipFile, zlib.error) as error:
                warnings.warn(f"{path} is damaged or foreign ({error}): computing it anew.", stacklevel=2)
        found = compute()
        arrays: dict[str, Any] = {_IDENTITY: np.array(identity), **found}
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, **arrays)
        return found


def digest_of_tokens(tokens: np.ndarray) -> str:
    """The hash of a text in tokens, for `depends_on`."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int64).tobytes()).hexdigest()


def _read(path: Path, identity: str) -> Arrays:
    with path.open("rb") as file, np.load(file) as arrays:
        if str(arrays[_IDENTITY]) != identity:
            raise ValueError("it was computed from something else")
        return {name: arrays[name] for name in arrays.files if name != _IDENTITY}
