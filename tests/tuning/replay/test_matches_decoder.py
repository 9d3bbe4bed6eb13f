"""Replay decides as the decoder decides, wherever both see the same path.

A recycled step moves the decoder away from the recorded path, so the path is held fixed in two ways: a set that holds
every token, so that recycled attention is full attention; or a session in the shadow of a model that runs full, whose
sets are chosen, aged and re-ranked as ever while its output is thrown away.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from policies import (
    FEATURES,
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    MaxAge,
    NeverFull,
    PerUnit,
    RandomRefresh,
    Ranking,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
    StepSignals,
)
from policies.registry import BUILT_IN
from recycler import Prompt, record_trace, recycled
from recycler.decode.session import Session
from recycler.measure.closed_loop import run_closed_loop
from recycler.model.attention_hook import attention_replaced
from traces import Trace
from tuning import replay_policy

N_PROMPT, N_STEPS, VOCABULARY = 60, 30, 61
UNITS = (3, 2)
EVERYTHING = Selection(k=N_PROMPT + N_STEPS, sinks=2, window=4)
RANKINGS = (Ranking.LAST_FULL, Ranking.UPDATED, Ranking.DECAYED)
RANKED = {ranking: Selection(k=16, sinks=2, window=4, ranking=ranking) for ranking in RANKINGS}


def table(low: float, high: float, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).uniform(low, high, UNITS).tolist()


COSINE = CosineThreshold(table(-0.1, 0.6))
LOGISTIC = LearnedLogistic(("sqrt_age", "query_drift", "step_drift"), (0.3, 2.0, -0.4), table(-3.5, -2))
REFRESH = LearnedLogistic(("refresh_loss", "refresh_churn", "inverse_age"), (6.1, 3.3, -2.7), table(-4.5, -3.5))
EVERY_FEATURE = LearnedLogistic(tuple(FEATURES), (0.1, 0.2, -1.3, 1.1, -0.7, 4.3, 2.9), table(-5, -3.5), 0.45)
POLICIES: dict[str, StepPolicy] = {
    "always full": AlwaysFull(),
    "never full": NeverFull(),
    "stride": FixedStride(4),
    "stride per unit": FixedStride(table(1, 9), table(0, 8, seed=1)),
    "cosine": CosineThreshold(0.2),
    "cosine now and then": CosineThreshold(0.5, check_every=3),
    "cosine per unit": COSINE,
    "ends of sentences": SentenceBoundary(tuple(range(0, VOCABULARY, 9)), max_age=7),
    "random": RandomRefresh.drawn(0.3, UNITS, seed=2),
    "max age": MaxAge(NeverFull(), 7),
    "max age of cosine": MaxAge(COSINE, table(2, 9)),
    "logistic": LOGISTIC,
    "budget": BudgetConstrained(COSINE, table(0, 0.5), burst=1),
    "budget of max age of logistic": BudgetConstrained(MaxAge(LOGISTIC, 4), 0.27),
    # What follows depends on which tokens are in the sets.
    "mass and overlap of the refresh": REFRESH,
    "every feature": EVERY_FEATURE,
    "keys only": RefreshKeys(CosineThreshold(0.3)),
    "keys only for some, after what the refresh measured": BudgetConstrained(
        RefreshKeys(REFRESH, ((1, 0), (0, 1), (1, 1))), 0.6
    ),
    "budget of every feature": BudgetConstrained(MaxAge(EVERY_FEATURE, 11), table(0.1, 0.9)),
}


@lru_cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=UNITS[0],
        num_attention_heads=4,
        num_key_value_heads=UNITS[1],
        max_position_embeddings=256,
        # Large enough for attention with peaks, and so for sets that change.
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).double().eval()


@lru_cache
def recorded(selection: Selection, max_age: int = N_STEPS) -> Trace:
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, N_PROMPT + N_STEPS)
    prompt = Prompt("drawn", "random", tokens, N_PROMPT, "drawn", "CC0-1.0")
    return record_trace(model(), prompt, selection, max_age=max_age)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True)
class Noting(StepPolicy):
    """Does what another policy does; notes decisions per layer, `(rows, kv_heads)` each."""

    policy: StepPolicy
    full: dict[int, list[np.ndarray]] = field(default_factory=dict)
    kind: ClassVar[str] = "noting"

    @property
    def needs(self) -> frozenset[str]:
        return self.policy.needs

    @property
    def keys_only(self) -> PerUnit:
        return self.policy.keys_only

    def decide(self, signals: StepSignals) -> Any:
        full = self.policy.decide(signals)
        noted = full.numpy().copy() if isinstance(full, torch.Tensor) else full.copy()
        # An engine may ask for all layers at once.
        layers = {signals.layer: noted} if signals.layer is not None else dict(enumerate(np.moveaxis(noted, 1, 0)))
        for layer, of_layer in layers.items():
            self.full.setdefault(layer, []).append(of_layer)
        return full

    @property
    def table(self) -> np.ndarray:
        """`(steps, layers, kv_heads)` of the only row."""
        return np.stack([np.concatenate(self.full[layer]) for layer in sorted(self.full)], axis=1)


def decode(trace: Trace) -> None:
    """Feed a trace's tokens, the prompt at once and then one by one."""
    tokens = torch.from_numpy(trace.tokens.astype(np.int64))[None]
    cache = DynamicCache(config=model().config)
    with torch.inference_mode():
        for part in (tokens[:, :N_PROMPT], *tokens[:, N_PROMPT:].split(1, dim=1)):
            model()(part, past_key_values=cache, use_cache=True)


def in_session(trace: Trace, policy: StepPolicy, selection: Selection) -> np.ndarray:
    noting = Noting(policy)
    with recycled(model(), noting, selection):
        decode(trace)
    return noting.table


def in_the_shadow(trace: Trace, policy: StepPolicy, selection: Selection) -> np.ndarray:
    noting = Noting(policy)
    session = Session(model(), noting, selection)

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        attend = session.attention(stock)

        def both(*arguments: Any, **options: Any) -> Any:
            attend(*arguments, **options)
            return stock(*arguments, **options)

        return both

    with attention_replaced(model(), make), pytest.MonkeyPatch.context() as patch:
        # The model's forward tells the session which token is fed.
        patch.setattr(model(), "forward", session.forward(model().forward))
        decode(trace)
    return noting.table


def replayed(trace: Trace, policy: StepPolicy) -> np.ndarray:
    replay = replay_policy(trace, policy)
    assert replay.beyond_max_age == 0
    return replay.full[:, 0]


def test_the_policies_are_of_every_kind() -> None:
    replayable = {policy.kind for policy in BUILT_IN} - {"layer_cosine"}
    assert {policy.kind for policy in POLICIES.values()} == replayable


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", POLICIES)
def test_replay_decides_as_a_session_whose_sets_hold_everything(name: str, ranking: Ranking) -> None:
    selection = dataclasses.replace(EVERYTHING, ranking=ranking)
    trace = recorded(selection)
    np.testing.assert_array_equal(
        in_session(trace, POLICIES[name], selection), replayed(trace, POLICIES[name]), strict=True
    )


@pytest.mark.parametrize("ranking", RANKINGS)
def test_replay_decides_as_closed_loop_whose_sets_hold_everything(ranking: Ranking) -> None:
    selection = dataclasses.replace(EVERYTHING, ranking=ranking)
    trace = recorded(selection)
    loop = run_closed_loop(model(), trace.tokens, N_PROMPT, list(POLICIES.values()), selection)
    for row, (name, policy) in enumerate(POLICIES.items()):
        cost = np.broadcast_to(policy.full_cost, UNITS)
        np.testing.assert_array_equal(loop.full[row], replayed(trace, policy) * cost, err_msg=name)
    np.testing.assert_allclose(loop.kl, 0, atol=1e-12)


@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("name", POLICIES)
def test_replay_decides_as_a_session_in_the_shadow_of_full_attention(name: str, ranking: Ranking) -> None:
    trace = recorded(RANKED[ranking])
    np.testing.assert_array_equal(
        in_the_shadow(trace, POLICIES[name], RANKED[ranking]), replayed(trace, POLICIES[name]), strict=True
    )


@pytest.mark.parametrize("ranking", RANKINGS)
def test_ages_beyond_the_recorded_do_not_matter_to_a_policy_that_never_meets_them(ranking: Ranking) -> None:
    policy = MaxAge(EVERY_FEATURE, 6)
    trace = recorded(RANKED[ranking], max_age=6)
    np.testing.assert_array_equal(in_the_shadow(trace, policy, RANKED[ranking]), replayed(trace, policy))


@pytest.mark.parametrize("name", ["cosine per unit", "logistic", "mass and overlap of the refresh", "every feature"])
def test_the_policies_tell_units_and_steps_apart(name: str) -> None:
    full = replayed(recorded(RANKED[Ranking.UPDATED]), POLICIES[name])
    assert 0.1 < full.mean() < 0.9
    assert len({tuple(unit) for unit in full.reshape(N_STEPS, -1).T.tolist()}) > 3


def test_what_the_refresh_measured_depends_on_the_ranking() -> None:
    tables = [replayed(recorded(selection), POLICIES["every feature"]) for selection in RANKED.values()]
    assert (tables[0] != tables[1]).any()
    assert (tables[1] != tables[2]).any()
