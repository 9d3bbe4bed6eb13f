"""A tuning result such as the default run gives, but invented; and random traces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policies import (
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LearnedLogistic,
    ModelShape,
    Selection,
    StepPolicy,
)
from traces import Trace, TraceHeader
from tuning.certify.certificate import KlLimit
from tuning.certify.ladder import fixed_sequence
from tuning.confirm.results import FamilyResult, Measured, TuningResult
from tuning.report.files import write_report, write_results

# KL per kind of text at a fixed stride of 10.
_REPORT_KINDS = {
    "prose": 0.16,
    "technical": 0.21,
    "code": 0.27,
    "copying": 1.72,
    "needles": 0.24,
    "key_values": 0.55,
}
# Parameters, and KL as a share of the baseline's.
_REPORT_FAMILIES: Mapping[str, tuple[dict[str, Any], float]] = {
    "logistic_profile": (
        {
            "refresh_churn": True,
            "positive_share": 0.1134091,
            "regularisation": 0.0341278,
            "sharpness": 0.7312,
            "asked": 1.3371,
        },
        0.41,
    ),
    "cosine_profile": ({"sharpness": 0.8123, "asked": 1.1214}, 0.44),
    "stride_profile": ({"sharpness": 0.6913}, 0.47),
    "learned_logistic": (
        {"refresh_churn": False, "positive_share": 0.2213, "regularisation": 1.8213, "asked": 0.9127},
        0.71,
    ),
    "cosine_threshold": ({"asked": 1.0233, "check_every": 2}, 0.83),
    "fixed_stride": ({"phase_between_units": 7}, 0.78),
}


class _ReportMaker:
    """Invents what a run on `n_per_kind` prompts of each kind would measure."""

    def __init__(self, model: ModelShape, kinds: Mapping[str, float], n_per_kind: int, budget: float) -> None:
        self.model, self.budget = model, budget
        self.rng = np.random.default_rng(3)
        self.kinds = [kind for kind in kinds for _ in range(n_per_kind)]
        prompt = self.rng.lognormal(0, 0.25, len(self.kinds))
        self.baseline_kl = np.array([kinds[kind] for kind in self.kinds]) * prompt
        # Few units matter, and profiles give those much of the budget.
        worth = self.rng.lognormal(0, 2, model.units)
        self.rates = np.clip(worth / worth.sum() * budget * worth.size, 1 / 64, 1)

    def measured(self, label: str, policy: StepPolicy, ratio: float, share: float, even: bool = True) -> Measured:
        n = len(self.kinds)
        kl = self.baseline_kl * ratio * self.rng.lognormal(0, 0.15, n)
        rates = np.full(self.model.units, share) if even else self.rates * share / self.rates.mean()
        return Measured(
            label=label,
            policy=policy,
            replay_full_share=share * 0.99,
            recovered_mass=1 - 0.09 * (0.5 + 0.5 * min(ratio, 2)),
            prompt_kl=kl,
            prompt_agreement=np.exp(-0.28 * kl),
            prompt_accuracy=0.6 * np.exp(-0.28 * kl),
            prompt_full_share=np.clip(share * self.rng.normal(1, 0.01, n), 0, 1),
            unit_full_share=np.clip(rates, 0, 1),
        )

    def family(self, name: str, n_trials: int) -> FamilyResult:
        parameters, ratio = _REPORT_FAMILIES[name]
        policy: StepPolicy = {
            "stride": FixedStride((1 / self.rates).tolist()),
            "cosine": CosineThreshold(0.71),
            "logistic": LearnedLogistic(("sqrt_age", "query_drift"), (0.4, 3.1), -4.0),
        }[next(word for word in ("stride", "cosine", "logistic") if word in name)]
        loss = 0.019 + 0.03 * ratio + self.rng.exponential(0.006, n_trials)
        share = self.budget * (1 - self.rng.exponential(0.02, n_trials))
        return FamilyResult(
            family=name,
            parameters=parameters,
            measured=self.measured(
                name, BudgetConstrained(policy, self.budget), ratio, 0.985 * self.budget, "profile" not in name
            ),
            tune_kl=float(self.baseline_kl.mean() * ratio * 0.97),
            trials=np.stack([share, loss], 1),
        )


def _make_report_result(
    *,
    model_id: str = "SmolLM2-135M-Instruct",
    units: tuple[int, int] = (30, 3),
    kinds: Mapping[str, float] = _REPORT_KINDS,
    n_per_kind: int = 2,
    n_trials: int = 40,
    families: tuple[str, ...] = tuple(_REPORT_FAMILIES),
    budget: float = 0.1,
) -> TuningResult:
    model = ModelShape(model_id, *units, query_heads=3 * units[1], head_dim=64)
    maker = _ReportMaker(model, kinds, n_per_kind, budget)
    stride, best = 1 / budget, families[0]
    references = [
        maker.measured(label, policy, ratio * factor**-0.7, factor * budget)
        for factor in (0.5, 2)
        for label, policy, ratio in (
            (f"fixed stride {stride / factor:g}", FixedStride(stride / factor), 1.0),
            (f"{best} at {factor * budget:g}", FixedStride(stride / factor, 1), _REPORT_FAMILIES[best][1]),
        )
    ]
    return TuningResult(
        model=model,
        selection=Selection(128),
        budget=budget,
        families=[maker.family(name, n_trials) for name in families],
        baseline=maker.measured(f"fixed stride {stride:g}", FixedStride(stride), 1.0, budget),
        references=references,
        prompt_kinds=maker.kinds,
        prompt_names=[f"{kind}-{number:03d}" for number, kind in enumerate(maker.kinds, 100)],
        tune_names=[f"{kind}-{number:03d}" for number, kind in enumerate(maker.kinds)],
        n_steps=64,
        context_tokens=math.pi * 1000,
        versions={"recycled-attention": "0.1.0", "torch": "2.13.0", "numpy": np.__version__},
    )


@pytest.fixture(scope="session")
def make_report_result() -> Callable[..., TuningResult]:
    """Makes a tuning result as the default run gives it, or of another model, other kinds, fewer families."""
    return _make_report_result


def _make_ladder_result(result: TuningResult, budgets: tuple[float, ...], asked: KlLimit) -> TuningResult:
    """What a run with a limit would give: the best family and a fixed stride at each budget, the cheapest exported."""

    def at(budget: float, label: str, measured: Measured, policy: StepPolicy) -> Measured:
        return replace(
            measured,
            label=label,
            policy=policy,
            prompt_kl=measured.prompt_kl * (budget / result.budget) ** -0.8,
            prompt_full_share=np.clip(measured.prompt_full_share * budget / result.budget, 0, 1),
        )

    best, stride = result.best, result.baseline
    name = best.family
    rungs = [at(budget, f"{name} at {budget:g}", best.measured, best.measured.policy) for budget in budgets]
    strides = [at(budget, f"fixed stride {1 / budget:.4g}", stride, FixedStride(1 / budget)) for budget in budgets]
    ladder = fixed_sequence(asked, budgets, [rung.label for rung in rungs], [rung.prompt_kl for rung in rungs])
    chosen = [rung is ladder.chosen for rung in ladder.rungs].index(True)
    return replace(
        result,
        budget=budgets[chosen],
        families=[replace(best, measured=rungs[chosen], tune_kl=None)],
        baseline=strides[chosen],
        references=[one for n, pair in enumerate(zip(rungs, strides, strict=True)) if n != chosen for one in pair],
        ladder=ladder,
    )


@pytest.fixture(scope="session")
def ladder_result() -> TuningResult:
    """A tuning result whose budget was chosen by its certificate: 30%, the second of four."""
    result = _make_report_result(n_per_kind=6)
    return _make_ladder_result(result, (0.5, 0.3, 0.1, 0.05), KlLimit.of(0.2))


@pytest.fixture(scope="session")
def report_result() -> TuningResult:
    """The tuning result that `report_folder` is about."""
    return _make_report_result()


@pytest.fixture(scope="session")
def report_folder(report_result: TuningResult, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the report and the numbers of `report_result`, written once."""
    folder = tmp_path_factory.mktemp("report")
    write_report(report_result, folder)
    write_results(report_result, folder)
    return folder


def _make_trace(
    name: str = "one",
    kind: str = "prose",
    *,
    n_steps: int = 6,
    max_age: int = 4,
    ages: Sequence[int] | None = None,
    units: tuple[int, int] = (2, 3),
    seed: int = 0,
    **arrays: Any,
) -> Trace:
    ages = range(1, max_age + 1) if ages is None else ages
    rng = np.random.default_rng(seed)
    layers, kv_heads = units
    by_age = (n_steps, len(ages), *units)
    drawn = {
        "recovered_mass": rng.uniform(0, 1, by_age),
        "query_similarity": rng.uniform(-1, 1, by_age),
        "overlap": rng.uniform(0, 1, by_age),
        "fresh_mass": rng.uniform(0, 1, (n_steps + 1, *units)),
    }
    given = {name: np.broadcast_to(arrays.get(name, values), values.shape) for name, values in drawn.items()}
    there_is_no_set = np.array([0, *ages[:-1]]) >= np.arange(n_steps)[:, None] + 1
    for name_, values in given.items():
        if values.shape == by_age:
            given[name_] = np.where(there_is_no_set[:, :, None, None], np.nan, values)
    shape = {"layers": layers, "kv_heads": kv_heads, "query_heads": 2 * kv_heads, "head_dim": 8}
    return Trace(
        header=TraceHeader(
            model={"id": "tiny", "dtype": "float32"} | shape,
            selection={"k": 64},
            prompt={"name": name, "kind": kind, "source": "drawn", "licence": "CC0-1.0", "n_prompt_tokens": 5},
            n_steps=n_steps,
            ages=ages,
            versions={"numpy": np.__version__},
        ),
        tokens=rng.integers(0, 1000, 5 + n_steps, dtype=np.int32),
        token_log_prob=np.zeros(n_steps, dtype=np.float32),
        **{name: values.astype(np.float32) for name, values in given.items()},
    )


@pytest.fixture(scope="session")
def make_trace() -> Callable[..., Trace]:
    """Makes a random trace, NaN where no set of that age exists; arrays that are given instead are broadcast."""
    return _make_trace
