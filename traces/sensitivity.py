"""How much the model's predictions depend on each unit being refreshed."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from policies.shown import sentence, shown
from policies.strict_json import read_json
from traces.reporting.whole_file import write_text

FILE_NAME = "sensitivity.json"
FORMAT = "recycled-attention-sensitivity/2"
# Tables of some thousand units for some thousand prompts.
_MOST_BYTES = 2**28


@dataclass(frozen=True)
class Sensitivity:
    """Damage done by each unit alone, measured in closed loop; a companion of a folder of traces.

    Attributes:
        model: As in the traces.
        selection: As in the traces.
        n_steps: Decode steps over which it was measured.
        kl: Per prompt name, float64 `(layers, kv_heads)`: mean KL(full || ablated) in nats per step when this unit
            alone keeps the set that prefill chose and all others run full.
        measured_on: Per prompt name, a digest of all that its table depends on besides; what is not named is not known.
    """

    model: Mapping[str, Any]
    selection: Mapping[str, Any]
    n_steps: int
    kl: Mapping[str, np.ndarray]
    measured_on: Mapping[str, str] = field(default_factory=dict)

    def write(self, folder: Path | str) -> Path:
        """Write it into a folder of traces: beside its place first, then renamed."""
        path = Path(folder) / FILE_NAME
        values = {
            "format": FORMAT,
            "model": dict(self.model),
            "selection": dict(self.selection),
            "n_steps": self.n_steps,
            "kl": {name: np.asarray(table).tolist() for name, table in self.kl.items()},
            "measured_on": dict(self.measured_on),
        }
        write_text(path, json.dumps(values | {"digest": _digest(values)}))
        return path

    @classmethod
    def read(cls, folder: Path | str) -> Sensitivity | None:
        """Read that of a folder; None if it has none, or a damaged, edited or foreign one, of which it warns."""
        path = Path(folder) / FILE_NAME
        if not path.exists():
            return None
        try:
            return cls._of(read_json(path, _MOST_BYTES))
        except (AttributeError, KeyError, OSError, OverflowError, TypeError, ValueError) as error:
            warnings.warn(sentence(f"{path} is no sensitivity file ({error}): measuring it anew."), stacklevel=2)
            return None

    @classmethod
    def _of(cls, values: Any) -> Sensitivity:
        digest = values.pop("digest", None)
        if values["format"] != FORMAT:
            raise ValueError(f"its format is {shown(values['format'])}, not {FORMAT!r}")
        if digest != _digest(values):
            raise ValueError("its numbers are not those that were written")
        units = int(values["model"]["layers"]), int(values["model"]["kv_heads"])
        kl = {name: np.asarray(table, dtype=np.float64) for name, table in values["kl"].items()}
        if any(table.shape != units for table in kl.values()):
            raise ValueError(f"its tables do not have the model's {units[0]} layers x {units[1]} KV heads")
        return cls(
            dict(values["model"]), dict(values["selection"]), int(values["n_steps"]), kl, dict(values["measured_on"])
        )


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
