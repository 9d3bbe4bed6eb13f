"""Exact decoding on a GPU: rounds of drafts beside the same engine with every unit full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from decode_bench import Bench, Case
from gpu_kernels import profiled
from gpu_timings import FULL, TENTH, TimedModel

from policies import NeverFull
from policies.stops import FixedDrafts
from recycler.decode.rounds import Rounds

# Chance that a draft holds, given that those before it do: with it, 8 drafts give the 8.0 tokens per verification that
# the default model's own texts give with the exported policy (`docs/results/exact-texts.json`).
_HOLDS = 0.97
_STEPS = 160
_DRAFTS = (8, 4)


def exact(timed: TimedModel, batch: int, context: int) -> list[dict[str, Any]]:
    """Milliseconds per token in rounds, whose drafts hold as often as the default model's do."""
    on_gpu = timed.device.type == "cuda"
    steps = _STEPS if on_gpu else 6
    bench = timed.bench_of(steps)
    cases = [
        Case("engine, every unit full", FULL.policy),
        Case("engine, cosine under a budget of 0.1", TENTH.policy),
        *(_of_drafts(n, on_gpu) for n in (_DRAFTS if on_gpu else _DRAFTS[:1])),
    ]
    return [_row(bench, case, batch, context) for case in cases]


def kernels_of_rounds(timed: TimedModel, batch: int, context: int) -> list[dict[str, Any]]:
    """The kernels of rounds, per token."""
    with _as_often_as_recorded():
        return [profiled(timed, _of_drafts(_DRAFTS[0], timed.device.type == "cuda"), batch, context)]


def _of_drafts(n: int, on_gpu: bool) -> Case:
    return Case(
        f"exact, {n} drafts",
        NeverFull(),
        exact=FixedDrafts(n if on_gpu else 2),
        # Kernels are compiled in a first round and captured in a second.
        uncounted_steps=4 * (n + 1) if on_gpu else 2,
    )


def _row(bench: Bench, case: Case, batch: int, context: int) -> dict[str, Any]:
    with _as_often_as_recorded():
        run = bench.time(case, context, batch)
    row: dict[str, Any] = {
        "case": case.name,
        "engine": run.engine,
        "batch": batch,
        "context_tokens": context,
        "step_ms": round(run.step_ms, 3),
        "peak_gb": round(run.peak_bytes / 1e9, 2),
    }
    if run.tokens_per_round is not None:
        row |= {
            "acceptance": "simulated",
            "tokens_per_round": round(run.tokens_per_round, 2),
            "round_ms": round(run.step_ms * run.tokens_per_round, 2),
        }
    return row


@contextmanager
def _as_often_as_recorded() -> Iterator[None]:
    """Random weights agree with nothing: here verifications agree with drafts as often as a real model's."""
    accept, chance = Rounds._accept, np.random.default_rng(0)

    def accept_as_recorded(self: Rounds, drafted: list[list[int]], n: np.ndarray, logits: torch.Tensor) -> None:
        at, chosen, first = [], [], 0
        for tokens, n_tokens in zip(drafted, n.tolist(), strict=True):
            n_hold = min(int(chance.geometric(1 - _HOLDS)) - 1, n_tokens - 1)
            at += range(first, first + n_hold)
            chosen += tokens[1 : n_hold + 1]
            first += n_tokens
        if at:
            logits[torch.tensor(at), torch.tensor(chosen)] = 1e4
        accept(self, drafted, n, logits)

    with patch.object(Rounds, "_accept", accept_as_recorded):
        yield
