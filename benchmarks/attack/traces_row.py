"""Traces that are damaged: all are shown, and some are given to the tuner."""

from __future__ import annotations

import copy
import json
import random
import shutil
from pathlib import Path
from typing import ClassVar

import numpy as np
import optuna

from benchmarks.attack.damage import damaged_bytes, damaged_text
from benchmarks.attack.guarded import SECONDS, guarded
from benchmarks.attack.row import Row
from benchmarks.attack.sandbox import command, files_of
from benchmarks.attack.tiny import save_tiny_model
from benchmarks.attack.tiny_traces import save, save_folder, tiny_trace
from traces import TraceFolder, show
from traces.summary import summarise
from tuning import optimize

# Of what is still a trace, this share is drawn too, which takes seconds; all of it is summarised.
_DRAWN = 0.05


class Traces(Row):
    """One trace of a folder of four is damaged: its header, an array, or its bytes."""

    name: ClassVar[str] = "damaged traces: shown"
    n: ClassVar[int] = 4_500
    seconds: ClassVar[float] = SECONDS

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._model = str(save_tiny_model(folder / "model"))
        save_folder(folder / "whole", self._model)

    def case(self, rng: random.Random) -> str | None:
        box = self.folder / "box"
        shutil.rmtree(box, ignore_errors=True)
        traces = shutil.copytree(self.folder / "whole", box / "traces")
        told = _damage(traces / "code-000.safetensors", self._model, rng)
        before = files_of(self.folder)
        _, wrong = guarded(lambda: self.attacked(traces, box / "out", rng), self.seconds)
        shutil.rmtree(box / "out", ignore_errors=True)
        if not wrong and (changed := files_of(self.folder).items() ^ before.items()) - self.may_change(changed):
            wrong = f"files outside of --out: {sorted(changed)[:3]}"
        return wrong and f"{wrong} | {told[:300]}"

    def attacked(self, traces: Path, out: Path, rng: random.Random) -> None:
        """Read, summarised, and drawn."""
        for file in TraceFolder(traces):
            file.map()
        summarise(file.load() for file in TraceFolder(traces))
        if rng.random() < _DRAWN:
            command(show.main, traces, "--out", out)

    def may_change(self, changed: set[tuple[str, int]]) -> set[tuple[str, int]]:
        """Files that may be written outside of `--out`."""
        return set()


class TunedTraces(Traces):
    """The same, given to the tuner."""

    name: ClassVar[str] = "damaged traces: tuned on"
    n: ClassVar[int] = 1_000
    # What is still a trace is tuned on, and its report drawn.
    seconds: ClassVar[float] = 120

    def attacked(self, traces: Path, out: Path, rng: random.Random) -> None:
        options = ("--families", "fixed_stride", "--trials", 1, "--candidates", 1)
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        if wrong := command(optimize.main, "--traces", traces, "--out", out, *options):
            raise RuntimeError(wrong)

    def may_change(self, changed: set[tuple[str, int]]) -> set[tuple[str, int]]:
        return {one for one in changed if one[0].endswith("traces/sensitivity.json")}


def _damage(path: Path, model: str, rng: random.Random) -> str:
    arrays, header = tiny_trace("code-000", "code", model, 2)
    kind = rng.random()
    if kind < 0.6:
        text = damaged_text(header, rng).decode("utf-8", "replace")
        save(path, arrays, text)
        return text
    if kind < 0.8:
        name = rng.choice(list(arrays))
        arrays[name] = _damaged_array(arrays[name], rng)
        if rng.random() < 0.1:
            del arrays[name]
        save(path, arrays, json.dumps(copy.deepcopy(header)))
        return f"array {name}"
    path.write_bytes(damaged_bytes(path.read_bytes(), rng, rng.choice((8, 200, 2000, None))))
    return "bytes"


def _damaged_array(array: np.ndarray, rng: random.Random) -> np.ndarray:
    match rng.randrange(5):
        case 0:
            return np.nan_to_num(array).astype(
                rng.choice((np.float64, np.float16, np.int64, np.uint8, np.bool_)), casting="unsafe"
            )
        case 1:
            return array[:-1] if rng.random() < 0.5 else array[None]
        case 2:
            return np.full_like(array, rng.choice((-1, 0, 1, 2, 255, 100_000)))
        case 3 if array.dtype == np.float32:
            return np.full_like(array, rng.choice((np.nan, np.inf, -np.inf, 3e38)))
        case _:
            changed = array.copy()
            changed.flat[rng.randrange(array.size)] = rng.choice((-7, 7, 2**30))
            return changed
