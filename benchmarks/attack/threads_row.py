"""Requests in 8 threads over one model, recycled with policies of their own and stock, at the same time."""

from __future__ import annotations

import random
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

import torch

from benchmarks.attack.row import Row
from benchmarks.attack.tiny import tiny_model
from policies import AlwaysFull, CosineThreshold, FixedStride, NeverFull, Selection
from recycler.decode.recycled import recycled

_N_THREADS = 8
_HOW = (None, AlwaysFull(), NeverFull(), FixedStride(3), CosineThreshold(0.8, 2))


class Threads(Row):
    """A case is a round of 8 requests, one in each thread; what each writes alone was written down before."""

    name: ClassVar[str] = "rounds of requests in 8 threads, recycled and stock mixed"
    n: ClassVar[int] = 250

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        warnings.simplefilter("ignore")
        self._model = tiny_model()
        generator = torch.Generator().manual_seed(1)
        self._prompts = [torch.randint(1, 200, (1, 40 + n), generator=generator) for n in (0, 9, 23)]
        self._requests = [
            (how, fast, prompt)
            for how in range(len(_HOW))
            for fast in ((True, False) if _HOW[how] else (True,))
            for prompt in range(3)
        ]
        self._alone = {request: self._written(*request) for request in self._requests}

    def case(self, rng: random.Random) -> str | None:
        asked = rng.choices(self._requests, k=_N_THREADS)
        wrong: list[str] = []
        together = threading.Barrier(_N_THREADS)
        threads = [threading.Thread(target=self._ask, args=(request, together, wrong)) for request in asked]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return wrong[0] if wrong else None

    def _ask(self, request: tuple[int, bool, int], together: threading.Barrier, wrong: list[str]) -> None:
        together.wait()
        try:
            if self._written(*request) != self._alone[request]:
                wrong.append(f"{request} wrote other tokens than alone")
        except Exception as error:
            wrong.append(f"{request} raised {type(error).__name__}: {error}")

    def _written(self, how: int, fast: bool, prompt: int) -> list[int]:
        policy = _HOW[how]
        generate: Callable[..., torch.Tensor] = self._model.generate  # type: ignore[assignment]
        options = {"max_new_tokens": 8, "do_sample": False}
        if policy is None:
            return list(generate(self._prompts[prompt], **options)[0].tolist())
        with recycled(self._model, policy, Selection(40), fast=fast):
            return list(generate(self._prompts[prompt], **options)[0].tolist())
