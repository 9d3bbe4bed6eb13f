"""What a step's kernels take on a GPU, and how they are best launched."""

from __future__ import annotations

from collections import defaultdict
from typing import Any
from unittest.mock import patch

import torch
from decode_bench import Case
from gpu_timings import FULL, NEVER, TENTH, Sizes, TimedModel
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

from recycler.decode import engines
from recycler.decode.cuda.engine import CudaEngine
from recycler.decode.cuda.machine import Machine

# Between two kernels of a graph it is a microsecond or two.
_WAIT_US = 15.0


def kernels_of_steps(timed: TimedModel, batch: int, context: int) -> list[dict[str, Any]]:
    """The kernels of a step, of all units full, of none and of a tenth."""
    return [profiled(timed, case, batch, context) for case in (FULL, NEVER, TENTH)]


def profiled(timed: TimedModel, case: Case, batch: int, context: int) -> dict[str, Any]:
    """Microseconds per step of each kernel, and of what lies between them."""
    on_gpu = timed.device.type == "cuda"
    profiler = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
    timed.bench.time(case, context, batch, profiler=profiler)
    steps = timed.sizes.steps
    spans = [
        (event.name, event.time_range.start, event.time_range.end)
        for event in profiler.events() or ()
        if not on_gpu or event.device_type == torch.autograd.DeviceType.CUDA
    ]
    by_name: dict[str, list[float]] = defaultdict(list)
    for name, start, end in spans:
        by_name[name].append(end - start)
    busy, reached, waits = 0.0, 0.0, 0.0
    for _, start, end in sorted(spans, key=lambda span: span[1]):
        if busy and start - reached > _WAIT_US:
            waits += start - reached
        busy += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    most = sorted(by_name.items(), key=lambda item: -sum(item[1]))[:24]
    return {
        "case": case.name,
        "batch": batch,
        "context_tokens": context,
        "us_per_step": round((reached - min((start for _, start, _ in spans), default=0.0)) / steps, 1),
        "busy_us_per_step": round(busy / steps, 1),
        "waits_for_host_us_per_step": round(waits / steps, 1),
        "kernels": [
            {"kernel": name[:90], "per_step": round(len(us) / steps, 2), "us_each": round(sum(us) / len(us), 2),
             "us_per_step": round(sum(us) / steps, 1)}
            for name, us in most
        ],
    }  # fmt: skip


def tune_walk(timed: TimedModel) -> list[dict[str, Any]]:
    """Ways to launch the attention, each in real steps at the longest context: all units full, and none."""
    batch, context = timed.sizes.cases[0]
    usual = engines.engine_for(timed.model)._machine
    found = []
    for tile_bytes, warps, stages in (
        (16384, 4, 3),
        (16384, 4, 2),
        (16384, 4, 4),
        (16384, 8, 3),
        (8192, 4, 3),
        (8192, 4, 4),
        (32768, 4, 2),
        (32768, 8, 3),
    ):
        machine = Machine(**vars(usual) | {"tile_bytes": tile_bytes, "walk_warps": warps, "walk_stages": stages})
        row: dict[str, Any] = {"tile_bytes": tile_bytes, "warps": warps, "stages": stages}
        with patch.object(engines, "engine_for", lambda model, machine=machine: CudaEngine(model, machine)):
            try:
                for case in (FULL, NEVER):
                    timed.bench.time(case, context, batch)
                    kernels = profiled(timed, case, batch, context)["kernels"]
                    row |= {
                        f"{name} us, {case.name}": one["us_each"]
                        for one in kernels
                        for name in ("walk", "merge")
                        if one["kernel"] == name
                    }
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:200]
        found.append(row)
    return found


def attention_calls(sizes: Sizes, device: torch.device) -> list[dict[str, Any]]:
    """One layer's attention by torch's own calls, for one token per row, beside what reading it takes."""
    dtype = getattr(torch, sizes.dtype)
    found = []
    for batch, context in sizes.cases[:2]:
        query = torch.randn((batch, 32, 1, 128), dtype=dtype, device=device)
        key, value = (torch.randn((batch, 8, context, 128), dtype=dtype, device=device) for _ in range(2))
        read_gb = (key.nbytes + value.nbytes) / 1e9

        def call(q: Any = query, k: Any = key, v: Any = value) -> Any:
            return scaled_dot_product_attention(q, k, v, enable_gqa=True)

        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION):
            row: dict[str, Any] = {"batch": batch, "context_tokens": context, "call": backend.name, "read_gb": read_gb}
            try:
                with sdpa_kernel(backend):
                    ms = _median_ms(call, device)
                row |= {"us": round(1e3 * ms, 1), "gb_per_s": round(read_gb / ms * 1e3, 1)}
            except Exception as error:
                row["error"] = f"{type(error).__name__}: {error}"[:160]
            found.append(row)
        try:
            from flash_attn import flash_attn_with_kvcache

            q, k, v = (part.transpose(1, 2) for part in (query, key, value))
            ms = _median_ms(lambda q=q, k=k, v=v: flash_attn_with_kvcache(q, k, v), device)
            found.append({"batch": batch, "context_tokens": context, "call": "flash_attn_with_kvcache", "us": 1e3 * ms})
        except ImportError:
            found.append({"call": "flash_attn_with_kvcache", "error": "flash-attn is not installed"})
    return found


def _median_ms(call: Any, device: torch.device) -> float:
    if device.type != "cuda":
        call()
        return float("nan")
    return float(do_bench(call, warmup=5, rep=40, return_mode="median"))
