"""Results kept on disk under all that they were computed from, so that an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from policies.shown import sentence
from recycler.model.loading import LoadedModel
from recycler.model.versions import versions
from traces.reporting.arrays_file import read_arrays, write_arrays

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
            except ValueError as error:
                warnings.warn(sentence(f"{path} is damaged or foreign ({error}): computing it anew."), stacklevel=2)
        found = compute()
        write_arrays(path, {_IDENTITY: np.array(identity), **found})
        return found


def digest_of_tokens(tokens: np.ndarray) -> str:
    """The hash of a text in tokens, for `depends_on`."""
    return hashlib.sha256(np.ascontiguousarray(tokens, dtype=np.int64).tobytes()).hexdigest()


def _read(path: Path, identity: str) -> Arrays:
    arrays = read_arrays(path)
    if str(arrays.pop(_IDENTITY, None)) != identity:
        raise ValueError("it was computed from something else")
    return arrays
