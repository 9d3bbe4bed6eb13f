"""What only a GPU can show: graphs, the absence of waiting, memory, compiled functions, real sizes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    RefreshKeys,
    Selection,
    StepPolicy,
)
from recycler.decode.cuda.engine import CudaEngine
from recycler.decode.cuda.machine import Machine
from recycler.decode.engine_run import EngineRun
from recycler.decode.receipt import Receipt
from recycler.decode.recycled import recycled

pytestmark = pytest.mark.gpu

Make = Callable[..., Any]
LOGISTIC = LearnedLogistic(
    ("age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"), (0.1, 3.0, 0.2, 1.0, 0.5), -6.0
)
BUDGET = BudgetConstrained(CosineThreshold(0.99), 0.2)
POLICIES = [FixedStride(4), BUDGET, LOGISTIC, RefreshKeys(BUDGET)]
SELECTION = Selection.unpooled(256)


@pytest.fixture(scope="module")
def models() -> Iterator[Callable[[torch.dtype], PreTrainedModel]]:
    """Four layers in the shape of Llama-3.1-8B's, random weights."""
    made: dict[torch.dtype, PreTrainedModel] = {}

    def make(dtype: torch.dtype) -> PreTrainedModel:
        if dtype not in made:
            torch.manual_seed(0)
            config = LlamaConfig(
                vocab_size=8192,
                hidden_size=4096,
                intermediate_size=4096,
                num_hidden_layers=4,
                num_attention_heads=32,
                num_key_value_heads=8,
                head_dim=128,
                max_position_embeddings=65536,
                bos_token_id=None,
                eos_token_id=None,
            )
            with torch.device("cuda"):
                made[dtype] = LlamaForCausalLM(config).to(dtype).eval().requires_grad_(False)
        return made[dtype]

    yield make
    made.clear()


def generate(
    model: PreTrainedModel, policy: StepPolicy | None, n_tokens: int = 3001, rows: int = 2, n_new: int = 24
) -> tuple[list[list[int]], Receipt | None]:
    tokens = torch.randint(0, 8192, (rows, n_tokens), generator=torch.Generator().manual_seed(1)).cuda()
    mask = torch.ones_like(tokens)
    # Left padding of the last row.
    if rows > 1:
        mask[-1, :17] = 0
    how = {"attention_mask": mask, "max_new_tokens": n_new, "do_sample": False, "pad_token_id": 0}
    if policy is None:
        return model.generate(tokens, **how)[:, n_tokens:].tolist(), None
    with recycled(model, policy, SELECTION) as session:
        found = model.generate(tokens, **how)[:, n_tokens:].tolist()
    return found, session.receipt()


def test_always_full_gives_the_tokens_of_stock_generate(models: Make) -> None:
    model = models(torch.float32)
    found, receipt = generate(model, AlwaysFull())
    assert receipt.engine == "cuda"
    assert found == generate(model, None)[0]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_and_compiled_steps_are_those_of_the_kernels_one_by_one(
    models: Make, monkeypatch: pytest.MonkeyPatch, policy: StepPolicy, dtype: torch.dtype
) -> None:
    model = models(dtype)
    captured = generate(model, policy)
    machine = Machine(**(vars(CudaEngine(model)._machine) | {"captures": False}))
    monkeypatch.setattr("recycler.decode.engines.engine_for", lambda model: CudaEngine(model, machine))
    one_by_one = generate(model, policy)
    assert captured[0] == one_by_one[0]
    assert captured[1].full_steps.tolist() == one_by_one[1].full_steps.tolist()
    assert 0 < captured[1].full_share < 1


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.kind)
def test_a_step_waits_for_nothing(models: Make, monkeypatch: pytest.MonkeyPatch, policy: StepPolicy) -> None:
    steps = []
    stock = EngineRun.step

    def step(self: EngineRun, call: Any) -> Any:
        steps.append(None)
        # The first two compile and capture; transformers itself waits between steps.
        if len(steps) > 2:
            torch.cuda.set_sync_debug_mode("error")
        try:
            return stock(self, call)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(EngineRun, "step", step)
    generate(models(torch.bfloat16), policy)
    assert len(steps) == 23


def test_memory_beyond_the_dense_cache_is_a_twentieth_of_it(models: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, n_tokens = models(torch.bfloat16), 4, 32000
    cache_bytes = 2 * 4 * 8 * 128 * 2 * rows * n_tokens
    at_begin: list[int] = []
    stock = EngineRun.__init__

    def begin(self: EngineRun, *args: Any) -> None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        at_begin.append(torch.cuda.memory_allocated())
        stock(self, *args)

    # Compilers and libraries take memory of their own, once.
    generate(model, LOGISTIC, n_tokens, rows)
    monkeypatch.setattr(EngineRun, "__init__", begin)
    generate(model, LOGISTIC, n_tokens, rows)
    assert torch.cuda.max_memory_allocated() - at_begin[0] <= 0.05 * cache_bytes


@pytest.mark.parametrize("chunk_tokens", [64, 2048], ids=["captured anew", "captured once"])
def test_a_graph_survives_the_growth_of_the_cache(
    models: Make, monkeypatch: pytest.MonkeyPatch, chunk_tokens: int
) -> None:
    model = models(torch.float32)
    machine = Machine(**(vars(CudaEngine(model)._machine) | {"chunk_tokens": chunk_tokens}))
    monkeypatch.setattr("recycler.decode.engines.engine_for", lambda model: CudaEngine(model, machine))
    # The cache grows every 64 tokens.
    found, _ = generate(model, AlwaysFull(), 300, n_new=300)
    assert found == generate(model, None, 300, n_new=300)[0]


def test_long_sets_of_long_caches_are_those_of_the_plain_path(models: Make) -> None:
    # In float32 stock attention computes all logits of the prompt at once: 60 GB.
    model, n_tokens = models(torch.float32), 12_000
    found, receipt = generate(model, FixedStride(3), n_tokens, 1, n_new=8)
    tokens = torch.randint(0, 8192, (1, n_tokens), generator=torch.Generator().manual_seed(1)).cuda()
    with recycled(model, FixedStride(3), SELECTION, fast=False) as session:
        plain = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=8, do_sample=False)
    assert found == plain[:, n_tokens:].tolist()
    assert receipt.tokens_read.tolist() == session.receipt().tokens_read.tolist()
