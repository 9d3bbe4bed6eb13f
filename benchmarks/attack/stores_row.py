"""What is kept between runs, damaged: stores, sensitivities, size losses, studies."""

from __future__ import annotations

import contextlib
import io
import json
import random
import warnings
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import optuna

from benchmarks.attack.damage import damaged_bytes, damaged_text
from benchmarks.attack.guarded import guarded
from benchmarks.attack.row import Row
from benchmarks.attack.tiny import tiny_model
from recycler.measure.store import Store
from recycler.model.loading import LoadedModel
from traces.sensitivity import Sensitivity
from traces.size_losses import SetLosses, SizeLosses
from tuning.search.study_file import study_storage
from tuning.search.trial_digest import is_as_written, trial_attributes

_MODEL = {"id": "tiny", "layers": 2, "kv_heads": 2}


class Stores(Row):
    """A damaged file is refused or computed anew; what it gives is never something else than was kept."""

    name: ClassVar[str] = "damaged stores and studies: read"
    n: ClassVar[int] = 1_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._loaded = LoadedModel(tiny_model(), None, "tiny")  # type: ignore[arg-type]
        self._rng = np.random.default_rng(0)
        self._kept = {"numbers": self._rng.random((5, 7)), "text": np.array("as it was")}
        self._table = {"a": self._rng.random((2, 2))}
        self._lost = {"a": SetLosses(*self._rng.random((2, 1, 6, 2, 2), dtype=np.float32))}
        optuna.logging.set_verbosity(optuna.logging.ERROR)

    def case(self, rng: random.Random) -> str | None:
        for file in self.folder.glob("*"):
            file.unlink()
        attack = rng.choice((self._store, self._sensitivity, self._size_losses, self._study))
        found, wrong = guarded(lambda: attack(rng))
        return (wrong and f"{attack.__name__}: {wrong}") or (found and f"{attack.__name__}: {found}")

    def _store(self, rng: random.Random) -> str | None:
        store = Store(self.folder)
        store.get(self._loaded, {}, lambda: self._kept)
        (path,) = self.folder.glob("*.npz")
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
        return _different(store.get(self._loaded, {}, lambda: self._kept), self._kept)

    def _sensitivity(self, rng: random.Random) -> str | None:
        path = Sensitivity(_MODEL, {"k": 40}, 6, self._table, {"a": "x"}).write(self.folder)
        path.write_bytes(damaged_text(json.loads(path.read_text()), rng))
        read = Sensitivity.read(self.folder)
        return read and _different(read.kl, self._table)

    def _size_losses(self, rng: random.Random) -> str | None:
        path = SizeLosses(_MODEL, {"k": 40}, (40,), self._lost).write(self.folder)
        path.write_bytes(damaged_bytes(path.read_bytes(), rng))
        read = SizeLosses.read(self.folder)
        return read and _different(
            {name: np.stack(of) for name, of in read.lost.items()},
            {name: np.stack(of) for name, of in self._lost.items()},
        )

    def _study(self, rng: random.Random) -> str | None:
        path = self.folder / "study.log"
        study = optuna.create_study(storage=study_storage(path), study_name="one")
        for number in range(3):
            trial = study.ask()
            for name, value in trial_attributes(trial.params, number / 7, number / 9).items():
                trial.set_user_attr(name, value)
            study.tell(trial, number / 7)
        # At the end, as a killed process leaves it, or anywhere.
        content = path.read_bytes()
        torn = content[: rng.randrange(len(content))]
        path.write_bytes(torn if rng.random() < 0.5 else damaged_bytes(content, rng))
        with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            study = optuna.create_study(storage=study_storage(path), study_name="one", load_if_exists=True)
            known = study.get_trials(states=(optuna.trial.TrialState.COMPLETE,))
            study.tell(study.ask(), 5.0)
        believed = {(trial.value, trial.user_attrs["full_share"]) for trial in known if is_as_written(trial)}
        return None if believed <= {(number / 7, number / 9) for number in range(3)} else f"{believed} is believed"


def _different(found: Any, kept: Any) -> str | None:
    if found.keys() != kept.keys():
        return f"{sorted(found)} came back for {sorted(kept)}"
    same = all(np.array_equal(found[name], kept[name]) for name in kept)
    return None if same else "other numbers came back than were kept"
