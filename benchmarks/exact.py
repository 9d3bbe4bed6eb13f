"""`python benchmarks/exact.py`: what exact decoding gains, on the default model with the exported policy or another.

Milliseconds per token, in turns, beside the same engine with every unit full, which is what is exact without drafts. A
round of n drafts costs n recycled steps and one reading of weights and cache for n + 1 queries. The floor of a step is
its reading at the best rate of this machine's memory, that of a verification its reading or its arithmetic, whichever
is longer, at the best rate at which it multiplies matrices; both rates are printed first. That of a draft is as if no
unit looked again. A long context is a shorter text repeated (`--prompt-tokens`): times depend on its size. Whether
texts are full attention's, and how many tokens a verification gives, is told by `benchmarks/exact_texts.py`.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from decode_bench import Bench, Case, Timed, Traffic, best_read_gb_per_s
from decode_subject import Subject, subject_of
from machine import machine_name
from tqdm import tqdm

from policies import AlwaysFull
from policies.stops import ConfidentDrafts, FixedDrafts, StopRule
from recycler.model.shape import model_shape
from recycler.model.versions import versions
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_OUT = Path(__file__).parents[1] / "docs/results/exact.json"


def main(
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded model.")] = None,
    policy: Annotated[Path | None, typer.Option(help="Policy file; default: the exported one.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Text that fills the cache, again and again.", min=512)] = 2048,
    shapes: Annotated[str, typer.Option(help="Timed: batch x context, by commas.")] = "1x2000,1x8000,4x8000,1x32000",
    rules: Annotated[
        str, typer.Option(help="Rounds: n drafts, or a least survival below 1, by commas.")
    ] = "4,8,0.2,0.4",
    k: Annotated[int, typer.Option(help="Tokens of a set where time is taken.", min=40)] = 512,
    steps: Annotated[int, typer.Option(help="Steps per case and round.", min=8)] = 96,
    rounds: Annotated[int, typer.Option(help="Rounds through all cases.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="JSON with all figures.")] = _OUT,
) -> dict[str, Any]:
    """Time exact decoding."""
    chosen = {
        name: FixedDrafts(int(name)) if float(name) >= 1 else ConfidentDrafts(float(name), 16)
        for name in rules.split(",")
    }
    of_shapes = [tuple(int(number) for number in shape.split("x")) for shape in shapes.split(",")]
    subject = subject_of(model, None, "float32", None, policy, prompt_tokens)
    if out.exists() and (of := json.loads(out.read_text(encoding="utf-8")).get("model")) != subject.name:
        raise ValueError(f"{out} is of {of}, not of {subject.name}: give another --out.")
    result: dict[str, Any] = {
        "model": subject.name,
        "machine": machine_name(torch.device("cpu")),
        "versions": versions(),
        "best_gflops": round(_best_gflops(), 1),
        "read_gb_per_s": round(best_read_gb_per_s(torch.device("cpu")), 1),
        "k": k,
        "prompt_tokens": prompt_tokens,
        "steps": steps,
        "rounds": rounds,
    }
    print(
        f"matrices are multiplied at {result['best_gflops']} GFLOP/s, memory is read at {result['read_gb_per_s']} GB/s",
        flush=True,
    )
    floor = _Floor(subject, result["best_gflops"], result["read_gb_per_s"])
    result["times"] = []
    for batch, context in of_shapes:
        result["times"] += _time(subject, chosen, floor, batch, context, k, steps, rounds)
        write_text(out, json.dumps(result, indent=1))
    return {"out": str(out)}


def _best_gflops() -> float:
    """The best of a few products of two matrices that fit into the last cache, in float32."""
    n, times = 1024, []
    matrix = torch.randn(n, n)
    for _ in range(12):
        began = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - began)
    return 2 * n**3 / min(times) / 1e9


class _Floor:
    """What no engine on this machine could be faster than."""

    def __init__(self, subject: Subject, gflops: float, gb_per_s: float) -> None:
        self._traffic, self._gflops, self._gb_per_s = Traffic.of(subject.model), gflops, gb_per_s
        self._shape = model_shape(subject.model)
        self._n_weights = self._traffic.weight_bytes / subject.model.dtype.itemsize

    def step_ms(self, n_tokens: float, batch: int) -> float:
        """Of a step that reads so much of the cache."""
        return self._traffic.floor_ms(n_tokens, batch, self._gb_per_s)

    def verification_ms(self, n_tokens: float, batch: int, n_queries: float) -> float:
        """Of one reading for several queries: each is a product with all weights, and with keys and values of all."""
        per_token = 4 * self._shape.layers * self._shape.query_heads * self._shape.head_dim
        gflop = batch * n_queries * (2 * self._n_weights + per_token * n_tokens) / 1e9
        return max(self.step_ms(n_tokens, batch), 1e3 * gflop / self._gflops)

    def token_ms(self, case: Case, one: Timed, n_tokens: float, batch: int) -> float:
        """Of a token of a case, at the drafts that held where there are rounds."""
        if case.exact is None or one.drafts_per_round is None or one.tokens_per_round is None:
            return self.step_ms(float(one.tokens_read), batch)
        assert case.selection is not None
        drafts_ms = one.drafts_per_round * self.step_ms(case.selection.k, batch)
        return (drafts_ms + self.verification_ms(n_tokens, batch, one.drafts_per_round + 1)) / one.tokens_per_round


def _time(
    subject: Subject,
    rules: Mapping[str, StopRule],
    floor: _Floor,
    batch: int,
    context: int,
    k: int,
    steps: int,
    rounds: int,
) -> Sequence[dict[str, Any]]:
    assert subject.selection is not None
    selection = subject.selection.at_k(k)
    cases = [
        Case("every unit full", AlwaysFull()),
        Case("tuned policy", subject.policy, selection=selection),
        *(Case(f"exact, {name}", subject.policy, selection=selection, exact=rule) for name, rule in rules.items()),
    ]
    bench = Bench(subject.model, subject.tokens, k, steps)
    timed: dict[str, list[Any]] = {case.name: [] for case in cases}
    for _ in tqdm(range(rounds), f"{batch} x {context} tokens"):
        for case in cases:
            timed[case.name].append(bench.time(case, context, batch))
    rows = []
    for case in cases:
        pairs = zip(timed[cases[0].name], timed[case.name], strict=True)
        one = timed[case.name][0]
        row = {
            "batch": batch,
            "context_tokens": context,
            "case": case.name,
            "step_ms": round(statistics.median(one.step_ms for one in timed[case.name]), 2),
            "times_full": round(statistics.median(full.step_ms / one.step_ms for full, one in pairs), 3),
            "floor_ms": round(floor.token_ms(case, one, context + steps / 2, batch), 2),
            "tokens_per_round": one.tokens_per_round,
            "drafts_per_round": one.drafts_per_round,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    run_command(main)
