"""`python benchmarks/record.py`: what recording a trace costs, next to the prefill of the same tokens.

The floor is that prefill: a recording has to run it once. The target is at most twice the floor.
"""

from __future__ import annotations

import platform
import resource
import statistics
import time
from typing import Annotated, Any

import torch
import typer

from policies import Selection
from recycler import default_prompts, load_model, record_trace
from recycler.recorder import versions
from traces.command import run_command


def main(
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded model.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")] = "float32",
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    context_tokens: Annotated[int, typer.Option(help="Prompt tokens.")] = 4096,
    steps: Annotated[int, typer.Option(help="Decode steps.", min=1)] = 512,
    max_age: Annotated[int, typer.Option(help="Oldest set, in steps.", min=1)] = 64,
    k: Annotated[int, typer.Option(help="Tokens of a set.")] = 128,
    memory_mib: Annotated[int, typer.Option(help="Memory for recording, in MiB.", min=1)] = 1024,
    repeats: Annotated[int, typer.Option(help="Runs of each, alternating; medians are reported.", min=1)] = 3,
) -> dict[str, Any]:
    """Time prefill and recording of the same text, alternating."""
    loaded = load_model(model, dtype=dtype, device=device)
    prompt = default_prompts(
        loaded.tokenizer, n_per_kind=1, context_tokens=context_tokens, n_steps=steps, kinds=["technical"]
    )[0]
    tokens = torch.as_tensor(prompt.tokens.astype("int64"), device=loaded.model.device)[None]

    def synchronize() -> None:
        if loaded.model.device.type == "cuda":
            torch.cuda.synchronize()

    def prefill() -> None:
        with torch.inference_mode():
            loaded.model(tokens, use_cache=True, logits_to_keep=1)

    def record() -> None:
        record_trace(loaded.model, prompt, Selection(k), max_age=max_age, memory_mib=memory_mib)

    def seconds(run: Any) -> float:
        synchronize()
        began = time.perf_counter()
        run()
        synchronize()
        return time.perf_counter() - began

    machine = platform.processor() or platform.machine()
    print(f"{loaded.id}, {dtype} on {loaded.model.device}, {torch.get_num_threads()} threads, {machine}")
    print(f"{context_tokens} prompt tokens, {steps} steps, ages up to {max_age}, k = {k}; target: at most 2 x prefill")
    seconds(prefill)
    pairs = [(seconds(prefill), seconds(record)) for _ in range(repeats)]
    prefill_s, record_s = (statistics.median(values) for values in zip(*pairs, strict=True))
    print(f"prefill {prefill_s:.2f} s, recording {record_s:.2f} s: {record_s / prefill_s:.2f} x")
    return {
        "model": loaded.id,
        "device": str(loaded.model.device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "context_tokens": context_tokens,
        "steps": steps,
        "max_age": max_age,
        "k": k,
        "prefill_s": round(prefill_s, 3),
        "record_s": round(record_s, 3),
        "ratio": round(record_s / prefill_s, 3),
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": versions(),
    }


if __name__ == "__main__":
    run_command(main)
