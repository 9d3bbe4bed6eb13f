"""`python benchmarks/decode.py`: tokens per second against the context, next to the memory floor and stock `generate`.

Floor: (weights + keys and values read) / bandwidth, the bandwidth being what a sum over 1 GiB reaches. Ideal time of a
policy: its full share x time of the same engine with every unit full + the rest x time of the same engine at a context
of k tokens. Both are printed first, by context; a row's shares are of the same round.

The cache is a real prompt's of 2,048 tokens, repeated to the context: times depend on its size and not on its values,
and a prefill of 32,000 tokens takes minutes. Positions beyond the model's range are meant.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import torch
import typer
from decode_picture import draw
from llama import LlamaTimes
from machine import machine_name
from rich.console import Console
from rich.table import Table
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, PreTrainedModel, StaticCache

from policies import AlwaysFull, BudgetConstrained, FixedStride, NeverFull, PolicyFile, Selection, StepPolicy
from recycler import Receipt, Session, default_prompts, load_model, model_shape, recycled
from recycler.prefill import prefill
from recycler.recorder import versions
from traces.command import run_command

_PROMPT_TOKENS = 2048
_TUNED = Path(__file__).parents[1] / "docs/results/policy-budget-0.1.json"


@dataclass(frozen=True)
class Case:
    """A way to decode.

    Attributes:
        name: In the table.
        policy: None for stock `generate`.
        static: Whether stock `generate` has a static cache.
    """

    name: str
    policy: StepPolicy | None = None
    static: bool = False


@dataclass(frozen=True)
class Timed:
    """Steps of one round.

    Attributes:
        step_ms: Mean time of a step.
        engine: What ran them.
        full_share: Share of unit-steps that ran full, a keys-only refresh counted half.
        tokens_read: What a unit read of the cache in a step, in tokens, mean.
    """

    step_ms: float
    engine: str
    full_share: float
    tokens_read: float


class _Clock(LogitsProcessor):
    """Notes when logits come by, and what was done before the third; a streamer works for one row only."""

    def __init__(self, session: Session | None) -> None:
        self.times: list[float] = []
        self.before: Receipt | None = None
        self._session = session

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.is_cuda:
            torch.cuda.synchronize()
        if len(self.times) == 2 and self._session is not None:
            self.before = self._session.receipt()
        self.times.append(time.perf_counter())
        return scores


class Bench:
    """A model and the caches that cases decode after."""

    def __init__(self, model: PreTrainedModel, tokens: torch.Tensor, k: int, steps: int) -> None:
        self._model, self._tokens, self._k, self._steps = model, tokens, k, steps
        self._first = prefill(model, tokens)

    def time(self, case: Case, context_tokens: int, batch: int) -> Timed:
        """Decode after a context; the first two steps, which make room, do not count."""
        n_prompt = context_tokens - 1
        cache = self._static(n_prompt, batch) if case.static else self._dynamic(n_prompt, batch)
        repeats = -(-context_tokens // self._tokens.shape[1])
        tokens = self._tokens.repeat(batch, repeats)[:, :context_tokens]
        how = nullcontext() if case.policy is None else self._session(case)
        n_new = self._steps + 3
        with torch.inference_mode(), how as session:
            clock = _Clock(session)
            self._model.generate(  # type: ignore[operator]
                tokens,
                attention_mask=torch.ones_like(tokens),
                past_key_values=cache,
                max_new_tokens=n_new,
                min_new_tokens=n_new,
                do_sample=False,
                logits_processor=LogitsProcessorList([clock]),
                pad_token_id=0,
            )
        step_ms = (clock.times[-1] - clock.times[2]) / self._steps * 1e3
        if session is None or clock.before is None:
            return Timed(step_ms, "transformers", 1.0, context_tokens + self._steps / 2)
        before, after = clock.before, session.receipt()
        unit_steps = (after.row_steps - before.row_steps) * after.full_steps.size
        full_share = (_full_counts(after) - _full_counts(before)) / unit_steps
        return Timed(step_ms, after.engine, full_share, (after.tokens_read - before.tokens_read).sum() / unit_steps)

    def _session(self, case: Case) -> Any:
        assert case.policy is not None
        return recycled(self._model, case.policy, Selection(self._k))

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
    from recycler.cpu.decisions import DecisionsByProgram
    from recycler.cpu.engine import CpuDecoding

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
            (DecisionsByProgram, "begin_step", "books"),
            (DecisionsByProgram, "decide", "books"),
            (CpuDecoding, "_end_step", "books"),
            (CpuDecoding, "step", "steps"),
        ):
            patches.enter_context(patch.object(owner, name, timed(getattr(owner, name), of)))
        bench.time(case, context_tokens, 1)
    return seconds["books"] / seconds["steps"]


def read_gb_per_s(device: torch.device) -> float:
    """What reading memory reaches: the best of ten sums over 1 GiB."""
    numbers = torch.ones(1 << 28, device=device)
    best = float("inf")
    for _ in range(10):
        began = time.perf_counter()
        numbers.sum().item()
        best = min(best, time.perf_counter() - began)
    return numbers.numel() * numbers.element_size() / best / 1e9


def staggered(layers: int, kv_heads: int, stride: int) -> FixedStride:
    """The same stride for every unit, each at a time of its own."""
    phases = tuple(
        tuple(float((layer * kv_heads + head) * 7 % stride) for head in range(kv_heads)) for layer in range(layers)
    )
    return FixedStride(stride, phases)


@contextmanager
def _progress(console: Console, text: str) -> Iterator[None]:
    with console.status(text):
        yield


def main(
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded model.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    contexts: Annotated[str, typer.Option(help="Tokens of context, by commas.")] = "2000,8000,32000",
    batches: Annotated[str, typer.Option(help="Rows, by commas; above 1 only at 8,000 tokens and less.")] = "1,4",
    k: Annotated[int, typer.Option(help="Tokens of a set.", min=40)] = 512,
    policy: Annotated[Path, typer.Option(help="A tuned policy to time.")] = _TUNED,
    steps: Annotated[int, typer.Option(help="Steps per case and round, a multiple of 10.", min=10)] = 40,
    rounds: Annotated[int, typer.Option(help="Rounds, each through all cases; medians are reported.", min=1)] = 5,
    threads: Annotated[int | None, typer.Option(help="Threads; default: torch's own choice.", min=1)] = None,
    llama: Annotated[Path | None, typer.Option(help="JSON of benchmarks/llama.py, for the same table.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where to draw tokens/s against context, a PNG file.")] = None,
) -> dict[str, Any]:
    """Time decoding, all cases in turns."""
    if steps % 10:
        raise ValueError(f"--steps must be a multiple of 10, so that strides of 10 come out even, not {steps}.")
    if threads is not None:
        torch.set_num_threads(threads)
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 140)
    loaded = load_model(model, dtype=dtype, device=device)
    shape, where = model_shape(loaded.model), loaded.model.device
    tuned = PolicyFile.read(policy).policy
    cases = [
        Case("generate"),
        Case("generate, static cache", static=True),
        Case("engine, every unit full", AlwaysFull()),
        Case("engine, stride 10", FixedStride(10)),
        Case("engine, stride 10, units in turn", staggered(*shape.units, 10)),
        Case("engine, tuned policy", tuned),
        # What deciding costs: asked like the tuned policy, and never full.
        Case("engine, tuned policy, never full", BudgetConstrained(tuned, 0.0)),
        Case("engine, never full", NeverFull()),
    ]
    weights = sum(p.numel() * p.element_size() for p in {id(p): p for p in loaded.model.parameters()}.values())
    gb_per_s = read_gb_per_s(where)
    token_bytes = 2 * shape.layers * shape.kv_heads * shape.head_dim * loaded.model.dtype.itemsize
    console.print(f"{loaded.id}, {dtype} on {where}, {torch.get_num_threads()} threads, {machine_name()}")
    console.print(
        f"weights {weights / 1e6:.0f} MB, {token_bytes} bytes per token of cache, reading {gb_per_s:.1f} GB/s"
    )
    prompt = default_prompts(
        loaded.tokenizer, n_per_kind=1, context_tokens=_PROMPT_TOKENS, n_steps=1, kinds=["technical"]
    )[0]
    tokens = torch.as_tensor(prompt.tokens[:_PROMPT_TOKENS].astype("int64"), device=where)[None]
    bench = Bench(loaded.model, tokens, k, steps)

    def floor_ms(n_tokens: float, batch: int) -> float:
        return (weights + batch * n_tokens * token_bytes) / gb_per_s / 1e6

    rows: list[dict[str, Any]] = []
    for batch in _numbers(batches, "--batches"):
        for context in _numbers(contexts, "--contexts"):
            if batch > 1 and context > 8000:
                continue
            floors = {name: floor_ms(n, batch) for name, n in (("full", context), ("recycled", min(k, context)))}
            ideal = 0.1 * floors["full"] + 0.9 * floors["recycled"]
            console.print(
                f"\ncontext {context:,}, batch {batch}: floor {floors['full']:.1f} ms full, "
                f"{floors['recycled']:.1f} ms recycled, {ideal:.1f} ms at a tenth full"
            )
            rows += _time_cases(console, bench, cases, context, batch, k, rounds, floor_ms)
            for row in rows[-len(cases) - 1 :]:
                row |= {"device": where.type, "dtype": dtype}
    books = None
    if where.type == "cpu":
        never_full = next(case for case in cases if case.name == "engine, tuned policy, never full")
        books = round(bookkeeping_share(bench, never_full, 8000), 4)
        console.print(f"decisions and bookkeeping: {books:.1%} of a recycled step of the tuned policy")
    if llama is not None:
        rows += LlamaTimes.read(llama).rows(rows)
    _print(console, rows)
    if picture is not None:
        draw(rows, picture, f"{loaded.id}, {dtype}, {torch.get_num_threads()} threads, {machine_name()}")
    return {
        "model": loaded.id,
        "machine": machine_name(),
        "threads": torch.get_num_threads(),
        "read_gb_per_s": round(gb_per_s, 2),
        "weight_bytes": weights,
        "cache_bytes_per_token": token_bytes,
        "bookkeeping_share": books,
        "steps": steps,
        "rounds": rounds,
        "versions": versions(),
        "rows": rows,
    }


def _time_cases(
    console: Console,
    bench: Bench,
    cases: list[Case],
    context: int,
    batch: int,
    k: int,
    rounds: int,
    floor_ms: Callable[[float, int], float],
) -> list[dict[str, Any]]:
    """All cases in turns, and every unit full at a context of k; medians over rounds of what each round gives."""
    at_k = Case("engine, every unit full, context k", AlwaysFull())
    timed: dict[str, list[Timed]] = {case.name: [] for case in (*cases, at_k)}
    for case in (*cases, at_k):
        with _progress(console, f"warm-up: {case.name}"):  # Kernels are compiled in it.
            bench.time(case, k, batch)
    for turn in range(1, rounds + 1):
        for case in (*cases, at_k):
            with _progress(console, f"round {turn} of {rounds}: {case.name}"):
                timed[case.name].append(bench.time(case, k if case is at_k else context, batch))
    rows = []
    for case in (*cases, at_k):
        tokens = context if case is not at_k else k
        share, read = timed[case.name][0].full_share, timed[case.name][0].tokens_read
        references = zip(timed["engine, every unit full"], timed[at_k.name], strict=True)
        ideal_ms = [share * full.step_ms + (1 - share) * small.step_ms for full, small in references]
        ideal = [best / one.step_ms for best, one in zip(ideal_ms, timed[case.name], strict=True)]
        against = [stock.step_ms / one.step_ms for one, stock in zip(timed[case.name], timed["generate"], strict=True)]
        step_ms = statistics.median(one.step_ms for one in timed[case.name])
        rows.append(
            {
                "engine": timed[case.name][0].engine,
                "case": case.name,
                "context_tokens": tokens,
                "beside_context_tokens": context,
                "batch": batch,
                "k": k,
                "full_share": round(float(share), 4),
                "step_ms": round(step_ms, 3),
                "tokens_per_s": round(1e3 * batch / step_ms, 2),
                "ideal_share": round(statistics.median(ideal), 4) if case.policy is not None else None,
                "floor_share": round(floor_ms(read, batch) / step_ms, 4),
                "vs_generate": round(statistics.median(against), 3) if case is not at_k else None,
            }
        )
    return rows


def _print(console: Console, rows: list[dict[str, Any]]) -> None:
    table = Table()
    names = ("case", "context_tokens", "batch", "full_share", "step_ms", "tokens_per_s")
    for name in (*names, "ideal_share", "floor_share", "vs_generate"):
        table.add_column(name.replace("_", " "), justify="left" if name == "case" else "right")
    for row in rows:
        shares = (row["ideal_share"], row["floor_share"], row["vs_generate"])
        table.add_row(*(str(row[name]) for name in names), *("-" if x is None else f"{x:.2f}" for x in shares))
    console.print(table)


def _numbers(text: str, option: str) -> list[int]:
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ValueError(f"{option} takes whole numbers by commas, such as 2000,8000, not {text!r}.") from error
    if min(numbers) < 1:
        raise ValueError(f"{option} takes numbers from 1 on, not {min(numbers)}.")
    return numbers


if __name__ == "__main__":
    run_command(main)
