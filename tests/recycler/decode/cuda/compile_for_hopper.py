"""Compiles, without a GPU, every kernel that a step launches, for an H200; prints one JSON line per kernel.

Run without Triton's interpreter. Whatever the engine launches is compiled instead, for the arguments that it has.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from policies import (
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    NeverFull,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from recycler.decode import engines
from recycler.decode.cuda.engine import CudaEngine
from recycler.decode.cuda.machine import Machine
from recycler.decode.recycled import recycled
from recycler.record.ageing_on_gpu import age_in_one_kernel
from recycler.sets.recycled_set import select
from recycler.sets.scores import token_scores

LOGISTIC = LearnedLogistic(
    ("sqrt_age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"), (0.2, 1.0, 0.1, 1.0, 0.5), -1.8
)


class Hopper:
    """What Triton asks a driver about a GPU of compute capability 9.0."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def decode(policy: StepPolicy, selection: Selection, dtype: torch.dtype, rows: int, exact: bool = False) -> None:
    """One step, or one round, of one layer in the shape of Llama-3.1-8B's attention."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=128,
    )
    model = LlamaForCausalLM(config).to(dtype).eval()
    tokens = torch.randint(1, 64, (rows, 600))
    with torch.no_grad(), recycled(model, policy, selection, exact=exact):
        cache = model(tokens, use_cache=True).past_key_values
        # The second round chooses its sets by the votes of the first.
        for _ in range(3 if exact else 1):
            model(tokens[:, :1], past_key_values=cache, use_cache=True)


def age(selection: Selection) -> None:
    """Sets of a layer in that shape, as a recording ages them."""
    weights = torch.rand(8, 4, 3, 600).softmax(-1)
    chosen = select(token_scores(weights.transpose(1, 2), selection), selection, 0, 598 + torch.arange(3)[:, None])
    age_in_one_kernel(chosen, weights, 597, (1, 2))


def main() -> None:
    driver.set_active(Hopper())
    stock, compiled = JITFunction.run, {}

    def compile_only(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        kernel = stock(self, *args, grid=grid, warmup=True, **kwargs)
        compiled[id(kernel)] = (self.fn.__name__, kernel)

    JITFunction.run = compile_only
    machine = Machine(n_programs=264, captures=False, compiles=False)
    engines.engine_for = lambda model: CudaEngine(model, machine)
    decode(BudgetConstrained(LOGISTIC, 0.1), Selection.unpooled(256), torch.bfloat16, 1)
    decode(RefreshKeys(FixedStride(10)), Selection(256), torch.float32, 2)
    decode(CosineThreshold(0.5, 2.5), Selection(256, ranking="accumulated"), torch.float16, 2)
    decode(NeverFull(), Selection(256), torch.bfloat16, 2, exact=True)
    age(Selection(256))
    age(Selection(256, ranking="decayed"))
    for name, kernel in compiled.values():
        assembly = kernel.asm
        told = {
            "kernel": name,
            "cubin_bytes": len(assembly["cubin"]),
            "shared_bytes": kernel.metadata.shared,
            "fused_float64": assembly["ptx"].count("fma.rn.f64"),
            "copies_of_16_bytes": assembly["ptx"].count("cp.async.cg.shared.global"),
        }
        print(json.dumps(told))


if __name__ == "__main__":
    sys.exit(main())
