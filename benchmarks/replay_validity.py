"""Does replay predict the truth? Replayed loss against closed-loop KL over policies of all families."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from optuna.trial import FixedTrial
from scipy import stats
from tqdm import tqdm

from policies import CosineThreshold, FixedStride, MaxAge, NeverFull, RandomRefresh, SentenceBoundary, StepPolicy
from recycler.measure.closed_loop import ClosedLoopStore
from recycler.model.loading import LoadedModel
from traces import TraceFile
from traces.reporting import picture_style as style
from tuning.divide.tuning_data import TuningData
from tuning.families import FAMILIES
from tuning.replay.run import replay_policy
from tuning.replay.trace_batch import TraceBatch

BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.3)
# A point in the middle of each search space.
_PARAMETERS: Mapping[str, dict[str, Any]] = {
    "fixed_stride": {"phase_between_units": 1},
    "cosine_threshold": {"asked": 1.0, "check_every": 1},
    "learned_logistic": {"refresh_churn": False, "positive_share": 0.1, "regularisation": 0.1, "asked": 1.0},
    "stride_profile": {"sharpness": 1.2, "keys_only": False},
    "cosine_profile": {"sharpness": 1.2, "keys_only": False, "asked": 1.2},
    "logistic_profile": {
        "refresh_churn": False,
        "positive_share": 0.1,
        "regularisation": 0.1,
        "sharpness": 1.2,
        "keys_only": False,
        "asked": 1.2,
    },
}


def spread_of_policies(data: TuningData, sentence_ends: Sequence[int]) -> dict[str, StepPolicy]:
    """Some fifty policies, good and bad: every family at several budgets, and what one writes by hand.

    Args:
        data: What the families are tuned on; its budget does not matter.
        sentence_ends: Tokens that end a sentence.
    """
    found: dict[str, StepPolicy] = {}
    for budget in BUDGETS:
        at_budget = dataclasses.replace(data, budget=budget)
        for name, family in FAMILIES.items():
            found[f"{name} {budget:g}"] = family.suggest(FixedTrial(_PARAMETERS[name]), at_budget)
    for budget in BUDGETS[1:4]:
        even = dataclasses.replace(data, budget=budget, unit_cost=np.ones_like(data.unit_cost))
        by_mass = FAMILIES["stride_profile"].suggest(FixedTrial({"sharpness": 1.0, "keys_only": False}), even)
        found[f"stride by mass {budget:g}"] = by_mass
    found |= {f"stride {stride}": FixedStride(stride) for stride in (2, 3, 5, 7, 10, 15, 20, 30)}
    found |= {f"cosine {threshold:g}": CosineThreshold(threshold) for threshold in (0.5, 0.6, 0.7, 0.8)}
    found |= {f"random {share:g}": RandomRefresh.drawn(share, data.traces.units, 0) for share in (0.05, 0.1, 0.2)}
    found["sentences"] = SentenceBoundary(tuple(sentence_ends))
    found["age 8, cosine 0.5"] = MaxAge(CosineThreshold(0.5), 8)
    found["never"] = NeverFull()
    return found


@dataclasses.dataclass(frozen=True)
class Validity:
    """Replay and closed loop side by side.

    Attributes:
        labels: Names of the policies.
        kinds: Kind of text of each prompt.
        kl: float64 `(prompts, policies)`: closed loop, nats per step.
        losses: By name of the replay loss, float64 `(prompts, policies)`.
    """

    labels: Sequence[str]
    kinds: Sequence[str]
    kl: np.ndarray
    losses: Mapping[str, np.ndarray]

    def correlations(self, loss: str) -> dict[str, float]:
        """Spearman's rank correlation over policies of the means over prompts, for each kind of text and for all."""
        found = {}
        for kind in [*dict.fromkeys(self.kinds), "all"]:
            chosen = np.array([kind in (one, "all") for one in self.kinds])
            found[kind] = float(stats.spearmanr(self.losses[loss][chosen].mean(0), self.kl[chosen].mean(0)).statistic)
        return found


def measure_validity(
    loaded: LoadedModel,
    files: Sequence[TraceFile],
    policies: Mapping[str, StepPolicy],
    losses: Mapping[str, Any],
    store: ClosedLoopStore,
) -> Validity:
    """Run policies in replay and in closed loop on the same prompts.

    Args:
        loaded: The model of the traces.
        files: Traces of prompts that no policy was tuned on.
        policies: Whom to run, by name.
        losses: By name, functions of `(trace batch of one prompt, Replay)` to the loss.
        store: Keeps closed-loop runs.
    """
    kl, found = [], {name: np.empty((len(files), len(policies))) for name in losses}
    for place, file in enumerate(tqdm(files, desc="replay against closed loop", unit="prompt")):
        kl.append(store.run(loaded, file, list(policies.values())).kl.mean(1))
        batch = TraceBatch([file])
        for column, policy in enumerate(policies.values()):
            replay = replay_policy(batch, policy)
            for name, loss in losses.items():
                found[name][place, column] = loss(batch, replay)
    kinds = [str(file.header.prompt["kind"]) for file in files]
    return Validity(list(policies), kinds, np.array(kl), found)


def draw_validity(validity: Validity, loss: str, caption: str) -> Figure:
    """Draw closed-loop KL against replayed loss, a panel for each kind of text, a point for each policy."""
    kinds = list(dict.fromkeys(validity.kinds))
    correlation = validity.correlations(loss)
    n_lines = -(-len(kinds) // 3)
    title = f"Does replay predict closed loop?  Spearman over all kinds {correlation['all']:.2f}"
    figure = style.new_figure(title, caption, (13.5, 1.2 + 3.6 * n_lines))
    axes = figure.subplots(n_lines, min(3, len(kinds)), squeeze=False)
    groups = [_group(label) for label in validity.labels]
    names = list(dict.fromkeys(groups))
    for place, panel in enumerate(axes.flat):
        if place >= len(kinds):
            panel.set_visible(False)
            continue
        chosen = np.array([kind == kinds[place] for kind in validity.kinds])
        x, y = validity.losses[loss][chosen].mean(0), validity.kl[chosen].mean(0)
        for name, (colour, _), marker in zip(names, style.looks(len(names)), "osD^vP*Xh<>p", strict=False):
            of_group = [at for at, group in enumerate(groups) if group == name]
            panel.plot(x[of_group], y[of_group], marker, color=colour, label=name, markersize=6, alpha=0.85)
        panel.set_xscale("log")
        panel.set_yscale("log")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_minor_formatter(NullFormatter())
        y_label = "closed loop: KL (nats per step)" if place % 3 == 0 else ""
        style.style_axes(panel, f"{kinds[place]}: {correlation[kinds[place]]:.2f}", f"replay: {loss} loss", y_label)
    handles = axes.flat[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside right upper", frameon=False, fontsize=10.5)
    return figure


def _group(label: str) -> str:
    """A policy's family, without its budget; what is written by hand is one group."""
    family = label.rpartition(" ")[0]
    return family if family in FAMILIES or family in ("stride by mass", "random") else "by hand"
