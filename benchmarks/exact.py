"""`python benchmarks/exact.py`: what exact decoding gains, on the default model with the exported policy.

First how many tokens a verification gives, by kind of held-out text in the model's own words, and whether the text is
stock `generate`'s, token by token. Then milliseconds per token, in turns, beside the same engine with every unit full,
which is what is exact without drafts. A round of n drafts costs n recycled steps and one reading of weights and cache
for n + 1 queries; what that may take is the best rate at which the machine multiplies matrices, printed first.
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
from decode_bench import Bench, Case
from decode_subject import Subject, subject_of
from machine import machine_name
from tqdm import tqdm

from policies import AlwaysFull
from policies.stops import ConfidentDrafts, FixedDrafts, StopRule
from recycler import default_prompts, load_model, recycled
from recycler.model.versions import versions
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_OUT = Path(__file__).parents[1] / "docs/results/exact.json"
# Of two logits that are nearer to each other than this, sums of another order may choose the other.
_TIE = 1e-4


def main(
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens where drafts are counted.", min=64)] = 1536,
    new_tokens: Annotated[int, typer.Option(help="Tokens of each text.", min=2)] = 128,
    per_kind: Annotated[int, typer.Option(help="Texts of each kind.", min=1)] = 2,
    first_index: Annotated[int, typer.Option(help="Of the prompts; make optimize takes the first ones.", min=0)] = 20,
    shapes: Annotated[str, typer.Option(help="Timed: batch x context, by commas.")] = "1x2000,1x8000,4x8000,1x32000",
    rules: Annotated[
        str, typer.Option(help="Rounds: n drafts, or a least survival below 1, by commas.")
    ] = "4,8,0.2,0.4",
    k: Annotated[int, typer.Option(help="Tokens of a set where time is taken.", min=40)] = 512,
    steps: Annotated[int, typer.Option(help="Steps per case and round.", min=8)] = 96,
    rounds: Annotated[int, typer.Option(help="Rounds through all cases.", min=1)] = 3,
    out: Annotated[Path, typer.Option(help="JSON with all figures.")] = _OUT,
) -> dict[str, Any]:
    """Count accepted drafts, compare texts, and time."""
    chosen = {
        name: FixedDrafts(int(name)) if float(name) >= 1 else ConfidentDrafts(float(name), 16)
        for name in rules.split(",")
    }
    of_shapes = [tuple(int(number) for number in shape.split("x")) for shape in shapes.split(",")]
    subject = subject_of(None, None, "float32", None, None)
    result: dict[str, Any] = {
        "machine": machine_name(torch.device("cpu")),
        "versions": versions(),
        "best_gflops": round(_best_gflops(), 1),
        "context_tokens": context_tokens,
        "new_tokens": new_tokens,
        "k": k,
    }
    print(f"matrices are multiplied at {result['best_gflops']} GFLOP/s", flush=True)
    sizes = {"n_per_kind": per_kind, "context_tokens": context_tokens, "n_steps": new_tokens}
    result["texts"] = _count(subject, chosen, sizes, first_index)
    write_text(out, json.dumps(result, indent=1))
    result["times"] = []
    for batch, context in of_shapes:
        result["times"] += _time(subject, chosen, batch, context, k, steps, rounds)
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


def _count(
    subject: Subject, rules: Mapping[str, StopRule], sizes: Mapping[str, int], first_index: int
) -> list[dict[str, Any]]:
    """Tokens per verification by kind and rule, and how texts compare with stock `generate`'s."""
    loaded = load_model(None)
    prompts = default_prompts(loaded.tokenizer, **sizes, first_index=first_index)  # type: ignore[arg-type]
    rows = []
    for prompt in tqdm(prompts, "texts"):
        tokens = torch.as_tensor(prompt.tokens.astype("int64"))[None, : sizes["context_tokens"]]
        how = {
            "max_new_tokens": sizes["n_steps"],
            "do_sample": False,
            "pad_token_id": 0,
            "return_dict_in_generate": True,
        }
        asked = {"attention_mask": torch.ones_like(tokens), "output_logits": True, **how}
        stock = loaded.model.generate(tokens, **asked)  # type: ignore[operator]
        row: dict[str, Any] = {"kind": prompt.kind, "name": prompt.name}
        for name, rule in rules.items():
            assert subject.selection is not None
            with recycled(loaded.model, subject.policy, subject.selection, exact=rule) as session:
                ours = loaded.model.generate(tokens, **asked)  # type: ignore[operator]
            counted = session.receipt().rounds
            assert counted is not None
            row[name] = {
                "tokens_per_round": counted.tokens_per_round,
                "rounds": counted.n_rounds,
                "drafts": counted.n_drafts,
                "accepted": counted.n_accepted,
                "equal": _equal(ours, stock, tokens.shape[1]),
            }
        rows.append(row)
    for kind in dict.fromkeys(row["kind"] for row in rows):
        means = {
            name: statistics.fmean(r[name]["tokens_per_round"] for r in rows if r["kind"] == kind) for name in rules
        }
        print(kind, {name: round(mean, 2) for name, mean in means.items()}, flush=True)
    print("equal to stock", all(row[name]["equal"] != "different" for row in rows for name in rules), flush=True)
    return rows


def _equal(ours: Any, stock: Any, n_prompt: int) -> str:
    """Whether two texts are equal, or equal up to a tie, or different."""
    if torch.equal(ours.sequences, stock.sequences):
        return "equal"
    n = min(ours.sequences.shape[1], stock.sequences.shape[1])
    first = int((ours.sequences[0, :n] != stock.sequences[0, :n]).int().argmax()) - n_prompt
    best = stock.logits[first][0].topk(2).values
    return f"equal up to a tie at {first}" if best[0] - best[1] < _TIE else "different"


def _time(
    subject: Subject, rules: Mapping[str, StopRule], batch: int, context: int, k: int, steps: int, rounds: int
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
        row = {
            "batch": batch,
            "context_tokens": context,
            "case": case.name,
            "step_ms": round(statistics.median(one.step_ms for one in timed[case.name]), 2),
            "times_full": round(statistics.median(full.step_ms / one.step_ms for full, one in pairs), 3),
            "tokens_per_round": timed[case.name][0].tokens_per_round,
        }
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    run_command(main)
