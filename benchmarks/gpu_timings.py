"""Timings that `benchmarks/gpu.py` asks for: the engine, stock `generate`, recording."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from decode_bench import Bench, Case, Timed, Traffic, best_read_gb_per_s
from decode_subject import cosine_under
from record import beside_prefill
from shapes import random_model

from policies import (
    AlwaysFull,
    FixedStride,
    NeverFull,
    Ranking,
    Selection,
)
from recycler.prompts import Prompt

_PROMPT_TOKENS = 2048
# Weights, a cache, what stock `generate` copies of it and what compilers keep.
_CACHES_IN_MEMORY = 1.2


FULL, NEVER = Case("engine, every unit full", AlwaysFull()), Case("engine, never full", NeverFull())
TENTH = Case("engine, cosine under a budget of 0.1", cosine_under(0.1))
STOCK = (
    Case("generate"),
    Case("generate, static cache", static=True, compiled=False),
    Case("generate, static cache, compiled", static=True),
)


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        shape: Of the model, in `SHAPES`.
        dtype: Of its weights.
        k: Tokens of a set.
        steps: Per case and round; a multiple of 20, so that both budgets come out even.
        rounds: Through all cases; medians are reported.
        static_stock: Whether stock `generate` is timed with static caches too.
        cases: Rows and tokens of context, what is worth most first.
        record_tokens: Prompt of a recording.
        record_steps: Its steps.
    """

    shape: str
    dtype: str
    k: int
    steps: int
    rounds: int
    cases: tuple[tuple[int, int], ...]
    record_tokens: int
    record_steps: int
    static_stock: bool = True

    @classmethod
    def for_gpu(cls, device: torch.device) -> Sizes:
        """An 8B model, at 64K the largest batch up to 8 that fits this GPU."""
        memory_bytes = torch.cuda.get_device_properties(device).total_memory
        weight_bytes, row_bytes = 16.1e9, 65_536 * 131_072
        batch = min(8, int((memory_bytes - weight_bytes) / (_CACHES_IN_MEMORY * row_bytes)))
        cases = ((1, 131_072), (batch, 65_536), (1, 32_768), (1, 4096))
        return cls("llama-3.1-8b", "bfloat16", 2048, 40, 3, cases, 32_768, 512)

    @classmethod
    def rehearsed(cls) -> Sizes:
        """A tiny model for Triton's interpreter."""
        return cls("tiny", "float32", 40, 2, 1, ((1, 50), (2, 44)), 48, 8)


class TimedModel:
    """A model with random weights, and the ways to decode with it.

    Args:
        sizes: What is measured.
        device: Where.
    """

    def __init__(self, sizes: Sizes, device: torch.device) -> None:
        self.sizes, self.device = sizes, device

    @cached_property
    def model(self) -> Any:
        """The model, made when it is first asked for."""
        return random_model(self.sizes.shape, self.sizes.dtype, self.device)

    @cached_property
    def bench(self) -> Bench:
        """Decodes after random tokens, repeated to the context."""
        return self.bench_of(self.sizes.steps)

    def bench_of(self, steps: int) -> Bench:
        """The same with another number of steps."""
        drawn = torch.randint(self.model.config.vocab_size, (1, _PROMPT_TOKENS), device=self.device)
        n_tokens = min(_PROMPT_TOKENS, min(context for _, context in self.sizes.cases))
        return Bench(self.model, drawn[:, :n_tokens], self.sizes.k, steps)

    @cached_property
    def gb_per_s(self) -> float:
        """What reading memory reaches."""
        return best_read_gb_per_s(self.device)

    @cached_property
    def traffic(self) -> Traffic:
        """What a step reads."""
        return Traffic.of(self.model)

    def rows(self, batch: int, context: int) -> list[dict[str, Any]]:
        """The engine and stock `generate` in turns; what does not fit in memory says so."""
        decayed = Selection(self.sizes.k, ranking=Ranking.DECAYED)
        cases = (
            FULL,
            NEVER,
            TENTH,
            Case("engine, cosine under a budget of 0.1, decayed sets", TENTH.policy, selection=decayed),
            Case("engine, cosine under a budget of 0.05", cosine_under(0.05)),
            Case("engine, stride 10", FixedStride(10)),
            *(case for case in STOCK if self.sizes.static_stock or not case.static),
        )
        small = Case("engine, every unit full, context k", AlwaysFull())
        timed: dict[str, list[Timed]] = {case.name: [] for case in (*cases, small)}
        lost: dict[str, str] = {}
        # On a GPU kernels are compiled in a turn before the first.
        for turn in range(0 if self.device.type == "cuda" else 1, self.sizes.rounds + 1):
            for case in (small, *cases):
                if case.name in lost:
                    continue
                try:
                    one = self._time(case, self.sizes.k if case is small else context, batch)
                except Exception as error:
                    # Minutes of a GPU: what else there is to measure goes on.
                    lost[case.name] = f"{type(error).__name__}: {error}"[:300]
                else:
                    timed[case.name] += [one] * (turn > 0)
        found = [self._row(name, timed, batch, context) for name in timed if name not in lost]
        return [
            *found,
            *({"case": name, "context_tokens": context, "batch": batch, "error": why} for name, why in lost.items()),
        ]

    def _time(self, case: Case, context: int, batch: int) -> Timed:
        try:
            return self.bench.time(case, context, batch)
        except torch.OutOfMemoryError:
            # Graphs that torch captured keep the static caches that they were captured on.
            torch.compiler.reset()
            gc.collect()
            torch.cuda.empty_cache()
        return self.bench.time(case, context, batch)

    def _row(self, name: str, timed: dict[str, list[Timed]], batch: int, context: int) -> dict[str, Any]:
        runs = timed[name]
        full, small = timed[FULL.name], timed["engine, every unit full, context k"]
        step_ms = float(np.median([run.step_ms for run in runs]))
        stocks = [timed[case.name] for case in STOCK if timed.get(case.name)]
        best_stock = [min(run.step_ms for run in of_round) for of_round in zip(*stocks, strict=True)]
        ideal = [
            (run.full_share * a.step_ms + (1 - run.full_share) * b.step_ms) / run.step_ms
            for run, a, b in zip(runs, full, small, strict=True)
        ]
        return {
            "case": name,
            "engine": runs[0].engine,
            "batch": batch,
            "context_tokens": context,
            "full_share": round(float(runs[0].full_share), 4),
            "step_ms": round(step_ms, 3),
            "of_rounds_ms": [round(run.step_ms, 3) for run in runs],
            "floor_ms": round(self.traffic.floor_ms(runs[0].tokens_read, batch, self.gb_per_s), 3),
            "ideal_share": round(float(np.median(ideal)), 3) if runs[0].engine != "transformers" else None,
            "vs_best_stock": round(float(np.median([s / r.step_ms for s, r in zip(best_stock, runs, strict=True)])), 3)
            if best_stock
            else None,
            "peak_gb": round(max(run.peak_bytes for run in runs) / 1e9, 2),
        }


def recording(timed: TimedModel) -> dict[str, Any]:
    """Recording beside the prefill of the same tokens."""
    sizes = timed.sizes
    drawn = np.random.default_rng(0).integers(
        timed.model.config.vocab_size, size=sizes.record_tokens + sizes.record_steps
    )
    prompt = Prompt("random", "random", drawn.astype(np.int32), sizes.record_tokens, "drawn at random", "none")
    return beside_prefill(
        timed.model, prompt, k=sizes.k, max_age=min(64, sizes.record_steps), memory_mib=16_384, repeats=2
    )
