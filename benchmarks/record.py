"""`python benchmarks/record.py`: what recording a trace costs, next to the prefill of the same tokens.

The floor is that prefill: a recording has to run it once. The target is at most twice the floor, with memory beyond the
prefill's own below `--memory-mib`. `--device cuda` takes a model with random weights in the shape of Llama-3.1-8B and
32,768 tokens, and says "not measured" where there is no GPU.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any

import numpy as np
import torch
import typer
from machine import machine_name, not_measured
from shapes import random_model
from transformers import PreTrainedModel

from policies import Selection
from recycler import default_prompts, load_model, record_trace
from recycler.model.versions import versions
from recycler.prompts import Prompt
from traces.reporting.command import run_command


def main(
    model: Annotated[str | None, typer.Option(help="Hugging Face id or folder; default: the embedded model.")] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights in this shape: llama-3.1-8b (the default on cuda) or tiny.")
    ] = None,
    dtype: Annotated[str | None, typer.Option(help="float32 (cpu), bfloat16 (cuda), float16 or float64.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: cuda if there is one, else cpu.")] = None,
    context_tokens: Annotated[int | None, typer.Option(help="Prompt tokens: 4096 (cpu), 32768 (cuda).")] = None,
    steps: Annotated[int, typer.Option(help="Decode steps.", min=1)] = 512,
    max_age: Annotated[int, typer.Option(help="Oldest set, in steps.", min=1)] = 64,
    k: Annotated[int | None, typer.Option(help="Tokens of a set: 128 (cpu), 2048 (cuda).")] = None,
    memory_mib: Annotated[
        int | None, typer.Option(help="Memory for recording, in MiB: 1024 (cpu), 16384 (cuda).", min=1)
    ] = None,
    repeats: Annotated[int, typer.Option(help="Runs of each, alternating; medians are reported.", min=1)] = 3,
) -> dict[str, Any]:
    """Time prefill and recording of the same text, alternating."""
    if (nothing := not_measured(device)) is not None:
        return nothing
    on_gpu = (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")
    context_tokens = context_tokens or (32768 if on_gpu else 4096)
    k, memory_mib = k or (2048 if on_gpu else 128), memory_mib or (16384 if on_gpu else 1024)
    dtype = dtype or ("bfloat16" if on_gpu else "float32")
    if on_gpu and model is None:
        shape = shape or "llama-3.1-8b"
    if shape is not None:
        name = f"random weights in the shape of {shape}"
        measured = random_model(shape, dtype, torch.device(device or ("cuda" if on_gpu else "cpu")))
        drawn = np.random.default_rng(0).integers(measured.config.vocab_size, size=context_tokens + steps)
        prompt = Prompt("random", "random", drawn.astype(np.int32), context_tokens, "drawn at random", "none")
    else:
        loaded = load_model(model, dtype=dtype, device=device)
        name, measured = loaded.id, loaded.model
        prompt = default_prompts(
            loaded.tokenizer, n_per_kind=1, context_tokens=context_tokens, n_steps=steps, kinds=["technical"]
        )[0]
    machine = machine_name(measured.device)
    print(f"{name}, {dtype} on {measured.device}, {torch.get_num_threads()} threads, {machine}")
    print(f"{context_tokens} prompt tokens, {steps} steps, ages up to {max_age}, k = {k}; target: at most 2 x prefill")
    times = beside_prefill(measured, prompt, k=k, max_age=max_age, memory_mib=memory_mib, repeats=repeats)
    print(f"prefill {times['prefill_s']:.2f} s, recording {times['record_s']:.2f} s: {times['ratio']:.2f} x")
    if on_gpu:
        print(f"memory beyond the prefill's own: {times['beyond_prefill_mib']} MiB of {memory_mib} MiB allowed")
    return {
        "model": name,
        "machine": machine,
        "measured": True,
        "device": str(measured.device),
        "dtype": dtype,
        "threads": torch.get_num_threads(),
        "context_tokens": context_tokens,
        "steps": steps,
        "max_age": max_age,
        "k": k,
        "memory_mib": memory_mib,
        **times,
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "versions": versions(),
    }


def beside_prefill(
    model: PreTrainedModel, prompt: Prompt, *, k: int, max_age: int, memory_mib: int, repeats: int
) -> dict[str, Any]:
    """Medians of prefill and recording of the same tokens, alternating; and what recording takes of a GPU's memory."""
    on_gpu = model.device.type == "cuda"
    tokens = torch.as_tensor(prompt.tokens.astype("int64"), device=model.device)[None]

    def prefill() -> None:
        with torch.inference_mode():
            model(tokens, use_cache=True, logits_to_keep=1)

    def record() -> None:
        record_trace(model, prompt, Selection.unpooled(k), max_age=max_age, memory_mib=memory_mib)

    def run(what: Callable[[], None]) -> tuple[float, int]:
        """Seconds, and on a GPU the most memory in use, in bytes."""
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        what()
        if on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter() - began, torch.cuda.max_memory_allocated() if on_gpu else 0

    run(prefill)
    if on_gpu:
        run(record)
    pairs = [(run(prefill), run(record)) for _ in range(repeats)]
    prefill_s, record_s = (statistics.median(one[0] for one in runs) for runs in zip(*pairs, strict=True))
    prefill_bytes, record_bytes = (max(one[1] for one in runs) for runs in zip(*pairs, strict=True))
    return {
        "prefill_s": round(prefill_s, 3),
        "record_s": round(record_s, 3),
        "ratio": round(record_s / prefill_s, 3),
        "beyond_prefill_mib": round(max(0, record_bytes - prefill_bytes) / 2**20) if on_gpu else None,
    }


if __name__ == "__main__":
    run_command(main)
