"""The GPU engine on tiny models: the plain path's decoding, in other kernels."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    RefreshKeys,
    Selection,
    StepPolicy,
    StepSignals,
)
from recycler import Prompt, record_trace
from recycler.decode.read_prompt import read_prompt
from recycler.decode.receipt import Receipt
from recycler.decode.rows import decode_rows
from recycler.decode.session import recycled

Make = Callable[..., Any]

SELECTION = Selection(12, sinks=2, window=4, pool_backward=1, pool_forward=2)
UPDATED = Selection(9, sinks=1, window=3, group="mean", ranking="updated")
ACCUMULATED = Selection(9, sinks=1, window=3, ranking="accumulated")
SIZED = Selection(12, 2, 4, pool_forward=0, prompt_queries=4, unit_k=((6, 18), (14, 10)))
LARGE = Selection(40)
BUDGET = BudgetConstrained(MaxAge(CosineThreshold(0.9), 5), 0.4, 1)
LOGISTIC = LearnedLogistic(
    ("age", "query_drift", "step_drift", "refresh_loss", "refresh_churn"), (0.3, 1.0, 0.2, 1.0, 0.5), -1.8
)
MIXED = RefreshKeys(LOGISTIC, ((1, 0), (0, 0)))
# Left padding of the rows.
PADDING = (0, 5)
N_STEPS = 10
# Sums of another order, in float32.
ATOL = 3e-5


@dataclass
class Run:
    """What came out of some decode steps: logits `(steps, rows, vocabulary)`, and what was done."""

    tokens: list[list[int]] = field(default_factory=list)
    steps: list[Tensor] = field(default_factory=list)
    receipt: Receipt = None  # type: ignore[assignment]

    @property
    def logits(self) -> Tensor:
        return torch.stack(self.steps)


@pytest.fixture
def tiny(make_model: Make, device: torch.device) -> Iterator[Callable[..., PreTrainedModel]]:
    """Makes a tiny model whose heads are as small as a kernel takes; on the CPU again afterwards."""
    made = []

    def make(**how: Any) -> PreTrainedModel:
        model = make_model(**({"head_dim": 16, "dtype": torch.float32} | how)).to(device)
        made.append(model)
        return model

    yield make
    for model in made:
        model.to("cpu")


def decode(
    model: PreTrainedModel,
    tokens: Tensor,
    policy: StepPolicy,
    n_steps: int = N_STEPS,
    *,
    selection: Selection = SELECTION,
    fast: bool = True,
    forced: Tensor | None = None,
) -> Run:
    """Decode greedily, or along `forced`, with left padding."""
    device = model.device
    rows, n_prompt = tokens.shape
    mask = (torch.arange(n_prompt + n_steps) >= torch.tensor(PADDING[:rows])[:, None]).long().to(device)
    places = (mask.cumsum(-1) - 1).clamp(min=0)
    run, cache, given = Run(), None, tokens.to(device)
    with torch.no_grad(), recycled(model, policy, selection, fast=fast) as session:
        for step in range(n_steps):
            end = n_prompt + step
            how = {"attention_mask": mask[:, :end], "position_ids": places[:, end - given.shape[1] : end]}
            output = model(given, past_key_values=cache, use_cache=True, **how)
            cache, logits = output.past_key_values, output.logits[:, -1]
            run.steps.append(logits.cpu())
            given = logits.argmax(-1, keepdim=True) if forced is None else forced[:, step : step + 1].to(device)
            run.tokens.append(given[:, 0].tolist())
    run.receipt = session.receipt()
    return run


def assert_same_receipt(one: Receipt, other: Receipt) -> None:
    counted = ("full_steps", "keys_only_steps", "tokens_read", "tokens_dense", "reasons")
    for name in ("n_steps", "n_rows", "row_steps", *counted):
        np.testing.assert_equal(getattr(one, name), getattr(other, name), err_msg=name)


def assert_same_run(engine: Run, plain: Run) -> None:
    assert (engine.receipt.engine, plain.receipt.engine) == ("cuda", "plain")
    assert engine.tokens == plain.tokens
    assert_same_receipt(engine.receipt, plain.receipt)
    torch.testing.assert_close(engine.logits, plain.logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize(
    ("policy", "selection"),
    [
        (FixedStride(3), SELECTION),
        (BUDGET, UPDATED),
        (LOGISTIC, ACCUMULATED),
        (LOGISTIC, SIZED),
        (MIXED, SELECTION),
        (RefreshKeys(BUDGET), SIZED),
        (RefreshKeys(LOGISTIC), UPDATED),
        (LayerCosine(0.9, 2), LARGE),
        (NeverFull(), SELECTION),
    ],
    ids=lambda value: value.kind if isinstance(value, StepPolicy) else "",
)
def test_the_engine_decodes_as_the_plain_path_does(
    tiny: Make, make_tokens: Make, on_engine: Make, policy: StepPolicy, selection: Selection
) -> None:
    model, tokens = tiny(), make_tokens(20, rows=2)
    plain = decode(model, tokens, policy, selection=selection, fast=False)
    on_engine()
    assert_same_run(decode(model, tokens, policy, selection=selection), plain)


@pytest.mark.parametrize(
    "how",
    [
        {"family": "qwen3"},
        {"family": "qwen2", "kv_heads": 1},
        {"family": "llama", "kv_heads": 4, "attention_bias": True, "mlp_bias": True},
        {"family": "mistral", "sliding_window": None},
    ],
    ids=str,
)
def test_all_covered_families_decode_alike(
    make_model: Make, tiny: Make, make_tokens: Make, on_engine: Make, how: dict[str, Any]
) -> None:
    model, tokens = tiny(**how), make_tokens(20, rows=2)
    plain = decode(model, tokens, FixedStride(2), 6, fast=False)
    on_engine()
    assert_same_run(decode(model, tokens, FixedStride(2), 6), plain)


def test_always_full_gives_the_tokens_of_stock_generate(tiny: Make, make_tokens: Make, on_engine: Make) -> None:
    model, tokens = tiny(), make_tokens(20, rows=2)
    tokens = tokens.to(model.device)
    how = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": 12, "do_sample": False}
    stock = model.generate(tokens, **how)
    on_engine()
    with recycled(model, AlwaysFull(), SELECTION) as session:
        assert model.generate(tokens, **how).tolist() == stock.tolist()
    assert session.receipt().engine == "cuda"
    assert session.receipt().full_share == 1


def test_a_set_as_large_as_the_context_is_full_attention(tiny: Make, make_tokens: Make, on_engine: Make) -> None:
    model, tokens = tiny(), make_tokens(20, rows=2)
    full = decode(model, tokens, AlwaysFull(), fast=False)
    on_engine()
    recycled_run = decode(model, tokens, NeverFull(), selection=Selection(40))
    assert recycled_run.receipt.full_share == 0
    assert recycled_run.tokens == full.tokens
    torch.testing.assert_close(recycled_run.logits, full.logits, rtol=0, atol=ATOL)


def test_a_batch_is_its_rows_alone(tiny: Make, make_tokens: Make, on_engine: Make) -> None:
    on_engine()
    model, tokens, forced = tiny(), make_tokens(20, rows=2), make_tokens(N_STEPS, rows=2, seed=1)
    together = decode(model, tokens, LOGISTIC, forced=forced)
    alone = decode(model, tokens[:1], LOGISTIC, forced=forced[:1])
    torch.testing.assert_close(together.logits[:, :1], alone.logits, rtol=0, atol=ATOL)
    both = alone.receipt.full_steps + 0
    # The second row has padding, so alone it is a shorter prompt.
    other = tokens[1:, PADDING[1] :]
    shorter = decode(model, other, LOGISTIC, forced=forced[1:])
    torch.testing.assert_close(together.logits[:, 1:], shorter.logits, rtol=0, atol=ATOL)
    both += shorter.receipt.full_steps
    np.testing.assert_array_equal(together.receipt.full_steps, both)


@pytest.mark.parametrize("policy", [FixedStride(2, ((0, 1), (1, 0))), MIXED], ids=lambda policy: policy.kind)
def test_buffers_grow_and_nothing_is_lost(
    tiny: Make, make_tokens: Make, on_engine: Make, policy: StepPolicy, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The cache grows every 3 tokens, and with 9 and 18 more than the kernels have room for.
    monkeypatch.setattr("recycler.decode.cache._LEAST_ROOM_TOKENS", 3)
    model, tokens = tiny(), make_tokens(14)
    plain = decode(model, tokens, policy, 20, fast=False)
    on_engine(chunk_tokens=4)
    assert_same_run(decode(model, tokens, policy, 20), plain)


def test_how_the_work_is_shared_changes_nothing_but_rounding(tiny: Make, make_tokens: Make, on_engine: Make) -> None:
    model, tokens = tiny(), make_tokens(20, rows=2)
    runs = []
    for how in ({"n_programs": 1, "tile_bytes": 4096, "chunk_tokens": 64}, {"n_programs": 9, "chunk_tokens": 8}):
        on_engine(**how)
        runs.append(decode(model, tokens, LOGISTIC, 6))
    assert runs[0].tokens == runs[1].tokens
    assert_same_receipt(runs[0].receipt, runs[1].receipt)
    torch.testing.assert_close(runs[0].logits, runs[1].logits, rtol=0, atol=ATOL)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_in_half_precision_the_engine_is_as_close_to_exact_as_the_plain_path(
    tiny: Make, make_tokens: Make, on_engine: Make, dtype: torch.dtype
) -> None:
    model, tokens, forced = tiny(dtype=dtype), make_tokens(20, rows=2), make_tokens(8, 2, seed=1)
    exact = decode(copy.deepcopy(model).double(), tokens, FixedStride(3), 8, fast=False, forced=forced).logits
    plain = decode(model, tokens, FixedStride(3), 8, fast=False, forced=forced)
    on_engine()
    engine = decode(model, tokens, FixedStride(3), 8, forced=forced)
    assert (engine.receipt.engine, engine.logits.dtype) == ("cuda", dtype)
    np.testing.assert_array_equal(engine.receipt.tokens_read, plain.receipt.tokens_read)
    error, plain_error = ((run.logits.double() - exact)[1:].abs().mean() for run in (engine, plain))
    assert 0 < error <= 1.2 * plain_error


def test_rows_with_policies_of_their_own_do_what_they_do_alone(
    tiny: Make, make_tokens: Make, on_engine: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    on_engine()
    model, tokens = tiny(), make_tokens(20)[0].tolist()
    policies: tuple[StepPolicy, ...] = (
        AlwaysFull(),
        BUDGET,
        RefreshKeys(FixedStride(2)),
        # Of one form with the one before, and with tables of its own.
        RefreshKeys(FixedStride(3)),
        FixedStride(((2, 3), (4, 1)), 1),
        FixedStride(((1, 2), (3, 5)), 1),
    )
    done: dict[bool, list[Any]] = {}
    for fast in (True, False):
        prompt = read_prompt(model, torch.tensor(tokens, device=model.device), 5)
        rows = decode_rows(model, prompt, policies, SELECTION, fast=fast)
        done[fast] = [rows.step(torch.full((6,), token, device=model.device)) for token in (5, 9, 17, 3, 8)]
    for engine, plain in zip(done[True], done[False], strict=True):
        torch.testing.assert_close(engine.logits.cpu(), plain.logits.cpu(), rtol=0, atol=ATOL)
        np.testing.assert_array_equal(engine.tokens_read, plain.tokens_read)


@dataclass(frozen=True)
class AsksForTheLayer(StepPolicy):
    """No program: what it does depends on the layer."""

    reads_query: bool
    kind: ClassVar[str] = "asks_for_the_layer"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"query_similarity"}) if self.reads_query else frozenset()

    def decide(self, signals: StepSignals) -> Any:
        full = signals.age >= (2 if signals.layer == 0 else 3)
        return full & (signals.query_similarity < 0.99) if self.reads_query else full


@pytest.mark.parametrize(
    ("reads_query", "when"), [(False, "between steps"), (True, "in the middle of every layer")], ids=str
)
def test_a_policy_that_is_no_program_is_called_on_the_host_and_says_so(
    tiny: Make, make_tokens: Make, on_engine: Make, reads_query: bool, when: str
) -> None:
    model, tokens = tiny(), make_tokens(20, rows=2)
    policy = BudgetConstrained(AsksForTheLayer(reads_query), 0.4)
    plain = decode(model, tokens, policy, 8, fast=False)
    on_engine()
    with pytest.warns(UserWarning, match=f"^the policy budget_constrained is called on the host {when}, and the GPU"):
        engine = decode(model, tokens, policy, 8)
    assert 0 < engine.receipt.full_share < 1
    assert engine.receipt.reasons["budget"].any()
    assert_same_run(engine, plain)


def test_a_run_that_has_ended_keeps_no_cache_alive(tiny: Make, make_tokens: Make, on_engine: Make) -> None:
    model, tokens = tiny(), make_tokens(20)
    on_engine()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad(), recycled(model, FixedStride(2), SELECTION) as session:
            cache = model(tokens.to(model.device), use_cache=True).past_key_values
            model(tokens[:, :1].to(model.device), past_key_values=cache)
        kept = weakref.ref(cache.layers[0])
        del cache
        # No cycles: counting references is enough.
        assert kept() is None
    finally:
        gc.enable()
    assert session.receipt().n_steps == 1


@pytest.mark.parametrize(
    "policy",
    [FixedStride(((1.1, 2.5), (3, 4)), 0.5), BUDGET, LOGISTIC, RefreshKeys(LOGISTIC)],
    ids=lambda one: one.kind,
)
def test_replay_decides_as_the_engine_does(tiny: Make, make_tokens: Make, on_engine: Make, policy: StepPolicy) -> None:
    # A machine that is lent for its GPU has no optuna.
    pytest.importorskip("optuna")
    from tuning import replay_policy

    # Sets that hold everything keep the decoder on the recorded path.
    model, tokens, everything = tiny(), make_tokens(30, seed=2), Selection(40)
    prompt = Prompt("drawn", "random", tokens[0].numpy(), 20, "drawn", "CC0-1.0")
    replayed = replay_policy(record_trace(model, prompt, everything, max_age=10), policy).full[:, 0]
    on_engine()
    decided, tokens = [], tokens.to(model.device)
    with torch.no_grad(), recycled(model, policy, everything) as session:
        cache = model(tokens[:, :20], use_cache=True).past_key_values
        for token in tokens[:, 20:].split(1, dim=1):
            model(token, past_key_values=cache)
            decided.append(session._run.decoding.full[0])  # type: ignore[union-attr]
    assert 0 < replayed.mean() < 1
    np.testing.assert_array_equal(np.stack(decided), replayed)
