"""Many generations in one process, with its memory watched."""

from __future__ import annotations

import gc
import random
import warnings
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.attack.row import Row
from benchmarks.attack.tiny import tiny_model
from policies import CosineThreshold, FixedStride, Selection
from recycler.decode.recycled import recycled

_ALLOWED_BYTES = 2**20
# Allocators and caches of the libraries fill up first.
_WARM_UP = 300


class Memory(Row):
    """After its first generations a process needs at most 1 MiB more, however many follow."""

    name: ClassVar[str] = "generations in one process: memory grows by at most 1 MiB"
    n: ClassVar[int] = 10_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        warnings.simplefilter("ignore")
        self._model = tiny_model()
        self._prompts = torch.randint(1, 200, (1, 60), generator=torch.Generator().manual_seed(1))
        rng = random.Random(0)
        for _ in range(_WARM_UP):
            self._generate(rng)
        self._before = _resident_bytes()

    def case(self, rng: random.Random) -> str | None:
        self._generate(rng)
        grown = _resident_bytes() - self._before
        if grown <= _ALLOWED_BYTES:
            return None
        gc.collect()
        grown = _resident_bytes() - self._before
        if grown <= _ALLOWED_BYTES:
            return None
        # Told once for every MiB.
        self._before += grown
        return f"memory grew by {grown / 2**20:.1f} MiB"

    def _generate(self, rng: random.Random) -> None:
        policy = rng.choice((FixedStride(3), CosineThreshold(0.8)))
        with recycled(self._model, policy, Selection(40), fast=rng.random() < 0.5):
            self._model.generate(self._prompts[:, : rng.randrange(45, 60)], max_new_tokens=6, do_sample=False)  # type: ignore[operator]


def _resident_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
