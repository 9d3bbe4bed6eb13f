"""Three processes that search one study, one of which is killed."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import optuna

from benchmarks.attack.child import KILLED, fork, start, wait
from benchmarks.attack.row import Row
from benchmarks.attack.tiny_traces import save, tiny_trace
from policies import FixedStride
from traces import TraceFile
from tuning.divide.tuning_data import TuningData
from tuning.families import FAMILIES
from tuning.replay.trace_batch import TraceBatch
from tuning.search.shared_storage import shared_storage
from tuning.search.study import search_family

_N_TRIALS = 12


class Workers(Row):
    """The two that are left end with all trials, in SQLite and in a journal."""

    name: ClassVar[str] = "three workers on one study, one killed"
    n: ClassVar[int] = 40

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._n_cases = 0

    def case(self, rng: random.Random) -> str | None:
        for file in self.folder.glob("*"):
            file.unlink()
        arrays, header = tiny_trace("one", "prose", "tiny", 0)
        save(self.folder / "one.safetensors", arrays, json.dumps(header))
        self._n_cases += 1
        storage = ("sqlite", "journal")[self._n_cases % 2] + f":///{self.folder}/study"
        # In a child: compiled replay has threads, which a fork does not copy.
        children = [
            start(lambda seed=seed: self._search(storage, seed), self.folder / f"log{seed}") for seed in range(3)
        ]
        time.sleep(rng.uniform(0.2, 4))
        killed = wait(children[0], 0)
        codes = [wait(child, 120) for child in children[1:]]
        logs = [(self.folder / f"log{seed}").read_text().strip().splitlines()[-1:] for seed in (1, 2)]
        if killed not in (0, KILLED) or codes != [0, 0]:
            return f"{storage.partition(':')[0]}: workers ended with {killed} (killed), {codes}: {logs}"
        ended = fork(lambda: _check(storage), self.folder / "log")
        return None if ended.code == 0 else f"the study of {storage} ended with {ended.last}"

    def _search(self, storage: str, seed: int) -> None:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        data = TuningData(TraceBatch([TraceFile(self.folder / "one.safetensors")]), 0.3, np.ones((2, 2)))
        family, how = FAMILIES["fixed_stride"], {"n_trials": _N_TRIALS, "n_candidates": 1, "study_name": "one"}
        search = search_family(family, data, seed=seed, storage=storage, **how)  # type: ignore[arg-type]
        assert isinstance(search.candidates[0].policy, FixedStride) or search.candidates


def _check(storage: str) -> None:
    trials = optuna.load_study(study_name="one", storage=shared_storage(storage)).get_trials()
    n_complete = sum(trial.state == optuna.trial.TrialState.COMPLETE for trial in trials)
    if n_complete < _N_TRIALS:
        raise RuntimeError(f"{n_complete} complete trials of {_N_TRIALS}")
