"""Ways to decode, and how long their steps take."""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch.profiler import profile
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache

from policies import FixedStride, Selection, StepPolicy
from policies.stops import StopRule
from recycler import Receipt, Session, model_shape, recycled
from recycler.model.memory import read_gb_per_s, weight_bytes
from recycler.model.prefill import prefill


@dataclass(frozen=True)
class Case:
    """A way to decode.

    Attributes:
        name: In the table.
        policy: None for stock `generate`.
        static: Whether stock `generate` has a static cache.
        compiled: Whether transformers compiles its steps, which it does on a GPU where the cache is static.
        selection: How sets are chosen; None for the default one.
        audit: Steps between audits; None for none.
        audit_tokens: How many of them are repeated; None for all.
        exact: When rounds of drafts end that are verified; None for approximate decoding.
        uncounted_steps: First steps, which make room and get ready.
        fast: As in `recycled`.
    """

    name: str
    policy: StepPolicy | None = None
    static: bool = False
    compiled: bool = True
    selection: Selection | None = None
    audit: int | None = None
    audit_tokens: int | None = None
    exact: StopRule | None = None
    uncounted_steps: int = 2
    fast: bool = True


@dataclass(frozen=True)
class Timed:
    """Steps of one round.

    Attributes:
        step_ms: Mean time of a step.
        engine: What ran them.
        full_share: Share of unit-steps that ran full, a keys-only refresh counted half.
        tokens_read: What a unit read of the cache in a step, in tokens, mean.
        peak_bytes: Most memory that the cache and decoding took on a GPU in these steps; 0 elsewhere.
        tokens_per_round: Tokens that a verification gave, mean, where decoding was exact.
        drafts_per_round: Drafts that a verification read, mean, likewise.
        between_ms: Time between two tokens, of each step.
    """

    step_ms: float
    engine: str
    full_share: float
    tokens_read: float
    peak_bytes: int = 0
    tokens_per_round: float | None = None
    drafts_per_round: float | None = None
    between_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Traffic:
    """What a step reads, in bytes.

    Attributes:
        weight_bytes: Weights, but for what it leaves out.
        token_bytes: Keys and values of a token in all layers.
    """

    weight_bytes: int
    token_bytes: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> Traffic:
        """Of a model."""
        weights, units = weight_bytes(model), model_shape(model)
        assert weights is not None
        return cls(weights, 2 * units.layers * units.kv_heads * units.head_dim * model.dtype.itemsize)

    def floor_ms(self, n_tokens: float, batch: int, gb_per_s: float) -> float:
        """Time to read the weights, and of each row's cache so many tokens."""
        return (self.weight_bytes + batch * n_tokens * self.token_bytes) / gb_per_s / 1e6


class _Clock(LogitsProcessor):
    """Notes when logits come by, and what was done before those that count; a streamer works for one row only."""

    def __init__(self, session: Session | None, profiler: profile | None, uncounted_steps: int) -> None:
        self.times: list[float] = []
        self.before: Receipt | None = None
        self._session, self._profiler, self._uncounted_steps = session, profiler, uncounted_steps

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        if len(self.times) == self._uncounted_steps:
            if scores.is_cuda:
                # Reading the prompt's last token is stock attention, and takes what it takes.
                torch.cuda.reset_peak_memory_stats()
            if self._session is not None:
                self.before = self._session.receipt()
            if self._profiler is not None:
                self._profiler.start()
        self.times.append(time.perf_counter())
        return scores


class Bench:
    """A model and the caches that cases decode after."""

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor, k: int, steps: int) -> None:
        self._model, self._tokens, self._k, self._steps = model, tokens, k, steps
        self._first = prefill(model, tokens)

    def time(self, case: Case, context_tokens: int, batch: int, *, profiler: profile | None = None) -> Timed:
        """Decode after a context; steps that do not count are seen by no profiler."""
        gc.collect()
        on_gpu = self._tokens.is_cuda
        in_use_bytes = torch.cuda.memory_allocated() if on_gpu else 0
        n_prompt = context_tokens - 1
        cache = self._static(n_prompt, batch) if case.static else self._dynamic(n_prompt, batch)
        repeats = -(-context_tokens // self._tokens.shape[1])
        tokens = self._tokens.repeat(batch, repeats)[:, :context_tokens]
        how = nullcontext() if case.policy is None else self._session(case)
        n_new = self._steps + 1 + case.uncounted_steps
        with torch.inference_mode(), how as session:
            clock = _Clock(session, profiler, case.uncounted_steps)
            self._model.generate(  # type: ignore[operator]
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                max_new_tokens=n_new,
                # The last id is reserved: what would end a text goes on, as drafts do.
                eos_token_id=int(self._model.config.vocab_size) - 1,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
                pad_token_id=0,
                disable_compile=not case.compiled,
            )
        if profiler is not None:
            profiler.stop()
        counted = clock.times[case.uncounted_steps :]
        step_ms = (counted[-1] - counted[0]) / self._steps * 1e3
        between_ms = tuple(1e3 * (after - before) for before, after in itertools.pairwise(counted))
        peak = torch.cuda.max_memory_allocated() - in_use_bytes if on_gpu else 0
        if session is None or clock.before is None:
            read = context_tokens + self._steps / 2
            return Timed(step_ms, "transformers", 1.0, read, peak, between_ms=between_ms)
        before, after = clock.before, session.receipt()
        unit_steps = (after.row_steps - before.row_steps) * after.full_steps.size
        full_share = (_full_counts(after) - _full_counts(before)) / unit_steps
        read = (after.tokens_read - before.tokens_read).sum() / unit_steps
        rounds = after.rounds
        per_round = (None, None) if rounds is None else (rounds.tokens_per_round, rounds.drafts_per_round)
        return Timed(step_ms, after.engine, full_share, read, peak, *per_round, between_ms)

    def _session(self, case: Case) -> Any:
        assert case.policy is not None
        how: dict[str, Any] = {"audit": case.audit, "audit_tokens": case.audit_tokens}
        how |= {"exact": case.exact or False, "fast": case.fast}
        return recycled(self._model, case.policy, case.selection or Selection(self._k), **how)

    def _parts(self, n_tokens: int, batch: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        repeats = -(-n_tokens // self._tokens.shape[1])
        for layer in self._first.layers:
            yield tuple(  # type: ignore[misc]
                part.repeat(batch, 1, repeats, 1)[:, :, :n_tokens].contiguous() for part in (layer.keys, layer.values)
            )

    def _dynamic(self, n_tokens: int, batch: int) -> DynamicCache:
        cache = DynamicCache(config=self._model.config)
        for layer, (key, value) in enumerate(self._parts(n_tokens, batch)):
            cache.update(key, value, layer)
        return cache

    def _static(self, n_tokens: int, batch: int) -> StaticCache:
        cache = StaticCache(config=self._model.config, max_cache_len=n_tokens + self._steps + 8)
        for layer, (key, value) in enumerate(self._parts(n_tokens, batch)):
            cache.update(key, value, layer)
        return cache


def _full_counts(receipt: Receipt) -> float:
    return float(receipt.full_steps.sum() - receipt.keys_only_steps.sum() / 2)


def bookkeeping_share(bench: Bench, case: Case, context_tokens: int) -> float:
    """Share of decoding that the CPU engine spends on asking the policy and on writing down what was done."""
    from recycler.decode.cpu.decide import ProgramDecisions
    from recycler.decode.cpu.engine import CpuDecoding

    seconds = {"books": 0.0, "steps": 0.0}

    def timed(function: Callable[..., Any], of: str) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            result = function(*arguments)
            seconds[of] += time.perf_counter() - began
            return result

        return call

    with ExitStack() as patches:
        for owner, name, of in (
            (ProgramDecisions, "begin_step", "books"),
            (ProgramDecisions, "decide", "books"),
            (CpuDecoding, "_end_step", "books"),
            (CpuDecoding, "step", "steps"),
        ):
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name), of)))
        bench.time(case, context_tokens, 1)
    return seconds["books"] / seconds["steps"]


def best_read_gb_per_s(device: torch.device) -> float:
    """What reading memory reaches: the best of ten sums over 1 GiB, on a GPU over 8."""
    return read_gb_per_s(device, n_bytes=1 << (33 if device.type == "cuda" else 30), n_times=10)


def copy_gb_per_s(device: torch.device) -> float:
    """What a copy inside of a memory reaches, bytes read and written: the best of ten over 1 GiB, on a GPU over 4."""
    source = torch.ones(1 << (30 if device.type == "cuda" else 28), device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        target.copy_(source)
        target[-1].item()
        best = min(best, time.perf_counter() - began)
    return 2 * source.nbytes / best / 1e9


def staggered(layers: int, kv_heads: int, stride: int) -> FixedStride:
    """The same stride for every unit, each at a time of its own."""
    phases = tuple(
        tuple(float((layer * kv_heads + head) * 7 % stride) for head in range(kv_heads)) for layer in range(layers)
    )
    return FixedStride(stride, phases)
