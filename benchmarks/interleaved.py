"""`python benchmarks/interleaved.py`: requests at once on one default model, each compared with itself alone.

Stock requests and recycled ones, with policies, lengths and ways of their own, in threads and in tasks that take their
steps in turn. Every token is compared; the exit code is not 0 if one differs.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from machine import machine_name
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from policies import FixedStride, NeverFull, Selection
from recycler.decode.recycled import recycled
from recycler.model.loading import load_model
from recycler.model.versions import versions
from recycler.prompts import default_prompts
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text

_RESULTS = Path(__file__).parents[1] / "docs/results"
_SELECTION = Selection(128)


@dataclass(frozen=True)
class _Request:
    """Somebody's call of the model.

    Attributes:
        way: What it is called in the report.
        tokens: int64 `(1, tokens)`: the prompt.
        n_new: Tokens to write.
        recycling: Arguments of `recycled`, after the model; None for a stock request.
        options: Its options.
    """

    way: str
    tokens: torch.Tensor
    n_new: int
    recycling: tuple[Any, ...] | None
    options: dict[str, Any] = field(default_factory=dict)

    def session(self, model: PreTrainedModel) -> Any:
        return nullcontext() if self.recycling is None else recycled(model, *self.recycling, **self.options)

    def generate(self, model: PreTrainedModel) -> list[int]:
        """What stock `generate` writes."""
        length = {"max_new_tokens": self.n_new, "min_new_tokens": self.n_new}
        with self.session(model):
            found = model.generate(self.tokens, attention_mask=torch.ones_like(self.tokens), do_sample=False, **length)
        written: list[int] = found[0, self.tokens.shape[1] :].tolist()
        return written

    async def step_by_step(self, model: PreTrainedModel) -> list[int]:
        """The likeliest tokens, and after each of them the other tasks go on."""
        with self.session(model), torch.inference_mode():
            cache, fed, written = DynamicCache(config=model.config), self.tokens, []
            for _ in range(self.n_new):
                fed = model(fed, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1:].argmax(-1)
                written.append(int(fed))
                await asyncio.sleep(0)
        return written


def _requests(tokenizer: Any, policy: Path, n: int, rng: random.Random) -> list[_Request]:
    ways: tuple[tuple[str, tuple[Any, ...] | None, dict[str, Any]], ...] = (
        ("stock", None, {}),
        ("tuned", (policy,), {"horizon_steps": 512}),
        ("stride 10", (FixedStride(10), _SELECTION), {}),
        ("stock", None, {}),
        ("tuned, exact", (policy,), {"exact": True}),
        ("tuned, audited", (policy,), {"audit": 16}),
        ("never full, plain path", (NeverFull(), _SELECTION), {"fast": False}),
    )
    prompts = default_prompts(tokenizer, n_per_kind=2, first_index=0, context_tokens=1000, n_steps=8)
    requests = []
    for i in range(n):
        tokens = torch.from_numpy(prompts[rng.randrange(len(prompts))].tokens[: rng.randint(200, 1000)].astype("int64"))
        way, recycling, options = ways[i % len(ways)]
        requests.append(_Request(way, tokens[None], rng.randint(24, 48), recycling, options))
    return requests


def main(
    policy: Annotated[Path, typer.Option(help="Policy file.")] = _RESULTS / "policy-budget-0.1-512-steps.json",
    n: Annotated[int, typer.Option(help="Requests, half of them in threads.", min=2)] = 100,
    at_once: Annotated[int, typer.Option(help="How many at the same time.", min=2)] = 16,
    seed: Annotated[int, typer.Option(help="Of prompts and lengths.")] = 0,
    out: Annotated[Path, typer.Option(help="JSON to write.")] = _RESULTS / "interleaved.json",
) -> dict[str, Any]:
    """Run each request alone, then all of them mixed."""
    loaded = load_model(None)
    model, began = loaded.model, time.perf_counter()
    requests = _requests(loaded.tokenizer, policy, n, random.Random(seed))
    in_threads, in_tasks = requests[: n // 2], requests[n // 2 :]

    def tasks(some: list[_Request]) -> list[list[int]]:
        async def gather() -> list[list[int]]:
            return list(await asyncio.gather(*(request.step_by_step(model) for request in some)))

        return asyncio.run(gather())

    def each(what: str, some: list[Any], run: Callable[[Any], Any]) -> list[Any]:
        return [run(one) for one in tqdm(some, desc=what, unit="run")]

    alone = each("alone", in_threads, lambda request: request.generate(model))
    alone += each("alone, step by step", in_tasks, lambda request: tasks([request])[0])
    alone_s, began = time.perf_counter() - began, time.perf_counter()
    with ThreadPoolExecutor(at_once) as threads:
        running = threads.map(lambda request: request.generate(model), in_threads)
        together = list(tqdm(running, total=len(in_threads), desc="threads", unit="run"))
    groups = [in_tasks[i : i + at_once] for i in range(0, len(in_tasks), at_once)]
    for group in tqdm(groups, desc="tasks", unit="group"):
        together += tasks(group)
    differing = [i for i in range(n) if together[i] != alone[i]]
    ways = sorted({request.way for request in requests})
    result = {
        "model": loaded.id,
        "machine": machine_name(),
        "versions": versions(),
        "requests": n,
        "at_once": at_once,
        "tokens_written": sum(map(len, alone)),
        "by_way": {way: sum(request.way == way for request in requests) for way in ways},
        # Of prompts, lengths and policies as different as these; else equal texts would show little.
        "different_texts": len({tuple(text) for text in alone}),
        "alone_s": round(alone_s, 1),
        "together_s": round(time.perf_counter() - began, 1),
        "differing": [
            {"request": i, "way": requests[i].way, "in": "threads" if i < n // 2 else "tasks"} for i in differing
        ],
    }
    write_text(out, json.dumps(result, indent=1) + "\n")
    print(f"{n} requests, {at_once} at once: {len(differing)} differ from themselves alone.")
    if differing:
        raise typer.Exit(1)
    return {name: result[name] for name in ("requests", "at_once", "tokens_written", "alone_s", "together_s")}


if __name__ == "__main__":
    run_command(main)
