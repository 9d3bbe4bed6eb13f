"""Commands that are killed at any moment and begun again."""

from __future__ import annotations

import random
import shutil
from functools import partial
from pathlib import Path
from typing import ClassVar

from benchmarks.attack.child import KILLED, fork
from benchmarks.attack.row import Row
from benchmarks.attack.runs import COMMANDS, make_ready, pick, results, run, run_again, unfinished


class Kills(Row):
    """Killed by signal 9 once to three times, then run to its end: what it leaves is what an uninterrupted run does."""

    name: ClassVar[str] = "kill -9 during record, optimize, evaluate and export, then resumed"
    n: ClassVar[int] = 200

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._model = make_ready(folder)
        self._whole, self._seconds = {}, {}
        for command in COMMANDS:
            out = folder / command
            ended = fork(partial(run, command, self._model, out), folder / "log")
            if ended.code:
                raise RuntimeError(f"{command} ended with {ended.code}: {ended.last}")
            self._whole[command], self._seconds[command] = results(command, out), ended.seconds

    def case(self, rng: random.Random) -> str | None:
        command, out, log = pick(rng), self.folder / "fresh" / "out", self.folder / "log"
        shutil.rmtree(out.parent, ignore_errors=True)
        moments = [rng.uniform(0.02, 1) * self._seconds[command] for _ in range(rng.choice((1, 1, 2, 3)))]
        at = f"{command} killed after {', '.join(f'{moment:.2f} s' for moment in moments)}"
        for moment in moments:
            ended = fork(partial(run_again, command, self._model, out), log, kill_after=moment)
            if ended.code not in (0, KILLED):
                return f"{at}: ended with {ended.code}: {ended.last}"
            if wrong := unfinished(out):
                return f"{at}: {wrong[0]} is half a file"
        ended = fork(partial(run_again, command, self._model, out), log)
        if ended.code:
            return f"{at}: resumed, it ended with {ended.code}: {ended.last}"
        if results(command, out) != self._whole[command]:
            return f"{at}: resumed, it left something else than an uninterrupted run"
        return None
