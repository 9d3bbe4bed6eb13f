"""How much the model's predictions depend on each unit being refreshed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from traces.reporting.whole_file import write_text

FILE_NAME = "sensitivity.json"
FORMAT = "recycled-attention-sensitivity/1"


@dataclass(frozen=True)
class Sensitivity:
    """Damage done by each unit alone, measured in closed loop; a companion of a folder of traces.

    Attributes:
        model: As in the traces.
        selection: As in the traces.
        n_steps: Decode steps over which it was measured.
        kl: Per prompt name, float64 `(layers, kv_heads)`: mean KL(full || ablated) in nats per step when this unit
            alone keeps the set that prefill chose and all others run full.
    """

    model: Mapping[str, Any]
    selection: Mapping[str, Any]
    n_steps: int
    kl: Mapping[str, np.ndarray]

    def write(self, folder: Path | str) -> Path:
        """Write it into a folder of traces: beside its place first, then renamed."""
        path = Path(folder) / FILE_NAME
        values = {
            "format": FORMAT,
            "model": dict(self.model),
            "selection": dict(self.selection),
            "n_steps": self.n_steps,
            "kl": {name: np.asarray(table).tolist() for name, table in self.kl.items()},
        }
        write_text(path, json.dumps(values))
        return path

    @classmethod
    def read(cls, folder: Path | str) -> Sensitivity | None:
        """Read that of a folder; None if it has none.

        Raises:
            ValueError: If the file is damaged or foreign.
        """
        path = Path(folder) / FILE_NAME
        if not path.exists():
            return None
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            if values["format"] != FORMAT:
                raise ValueError(f"its format is {values['format']!r}, not {FORMAT!r}")
            units = int(values["model"]["layers"]), int(values["model"]["kv_heads"])
            kl = {name: np.asarray(table, dtype=np.float64) for name, table in values["kl"].items()}
            if any(table.shape != units for table in kl.values()):
                raise ValueError(f"its tables do not have the model's {units[0]} layers x {units[1]} KV heads")
            return cls(values["model"], values["selection"], int(values["n_steps"]), kl)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no sensitivity file ({error}): remove it and measure again.") from error
