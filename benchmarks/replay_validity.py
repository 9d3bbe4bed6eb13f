"""Does replay predict the truth? Replayed loss against closed-loop KL over policies of all families.

`python benchmarks/replay_validity.py --results results` asks it of an output folder of `python -m tuning.optimize`: on
prompts that it held out, over outputs as long as those that it tuned on. Writes `docs/results/replay-validity.json` and
its picture.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from machine import machine_name
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from optuna.trial import FixedTrial
from scipy import stats
from tqdm import tqdm

from policies import (
    CosineThreshold,
    FixedStride,
    MaxAge,
    NeverFull,
    RandomRefresh,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from recycler.evaluate.sentence_ends import sentence_end_tokens
from recycler.measure.closed_loop import ClosedLoopStore
from recycler.model.loading import LoadedModel, load_model
from recycler.prompts import default_prompts
from recycler.record.folder import record_prompts
from traces import TraceFile, TraceFolder
from traces.reporting import picture_style as style
from traces.reporting.command import run_command
from traces.reporting.whole_file import write_text
from traces.sensitivity import Sensitivity
from traces.size_losses import SizeLosses
from tuning.divide.set_sizes import size_sets
from tuning.divide.tuning_data import TuningData
from tuning.families import FAMILIES
from tuning.replay.run import replay_policy
from tuning.replay.trace_batch import TraceBatch

BUDGETS = (0.02, 0.05, 0.1, 0.2, 0.3)
# The replay loss that the tuner minimises.
TUNED_ON = "weighted"
_DOCS = Path(__file__).parents[1] / "docs"
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
    """Some sixty policies, good and bad: every family at several budgets, and what one writes by hand.

    Args:
        data: What the families are tuned on; its budget does not matter.
        sentence_ends: Tokens that end a sentence.
    """
    found: dict[str, StepPolicy] = {}
    for budget in BUDGETS:
        at_budget = dataclasses.replace(data, budget=budget)
        for name, family in FAMILIES.items():
            found[f"{name} {budget:g}"] = family.suggest(FixedTrial(_PARAMETERS[name]), at_budget)
    for name, budget in itertools.product(("stride_profile", "cosine_profile"), BUDGETS[:4]):
        by_keys = {**_PARAMETERS[name], "keys_only": True}
        policy = FAMILIES[name].suggest(FixedTrial(by_keys), dataclasses.replace(data, budget=budget))
        found[f"{name} by keys {budget:g}"] = policy
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


def validity_of(loaded: LoadedModel, results: Path, *, per_kind: int) -> Validity:
    """Ask it of an output folder of `tuning.optimize`, on default prompts that it held out.

    Args:
        loaded: The model.
        results: The folder; traces of the prompts are kept in it too.
        per_kind: Prompts.

    Raises:
        ValueError: If the folder has no traces, or no losses by size and sensitivities.
    """
    tuned_on = list(TraceFolder(results / "traces"))
    (measured_in,) = (results / "set_sizes").iterdir()
    sensitivity, losses_by_size = Sensitivity.read(measured_in), SizeLosses.read(measured_in)
    if sensitivity is None or losses_by_size is None:
        raise ValueError(f"{results / 'set_sizes'} lacks sensitivities or losses: it is no output of tuning.optimize.")
    cost = size_sets(Selection(**losses_by_size.selection), losses_by_size, sensitivity).unit_cost
    header = tuned_on[0].header
    kinds = list(dict.fromkeys(file.kind for file in tuned_on))
    prompts = default_prompts(
        loaded.tokenizer,
        n_per_kind=per_kind,
        context_tokens=int(header.prompt["n_prompt_tokens"]),
        n_steps=header.n_steps,
        kinds=kinds,
        first_index=len(tuned_on) // len(kinds),
    )
    selection = Selection(**header.selection)
    files = record_prompts(loaded, prompts, selection, results / "held_out", max_age=header.ages[-1])
    data = TuningData(TraceBatch(tuned_on), 0.1, cost)
    losses = {
        "mass": lambda batch, replay: 1 - replay.recovered_mass,
        TUNED_ON: lambda batch, replay: TuningData(batch, data.budget, cost).loss_of(replay),
    }
    policies = spread_of_policies(data, sentence_end_tokens(loaded.tokenizer))
    return measure_validity(loaded, files, policies, losses, ClosedLoopStore(results / "closed_loop"))


def main(
    results: Annotated[Path, typer.Option(help="Output folder of tuning.optimize.")] = Path("results"),
    per_kind: Annotated[int, typer.Option(help="Held-out prompts per kind.", min=1)] = 1,
) -> dict[str, Any]:
    """Run some sixty policies in replay and in closed loop."""
    loaded = load_model(None)
    validity = validity_of(loaded, results, per_kind=per_kind)
    correlations = {loss: validity.correlations(loss) for loss in validity.losses}
    values = {
        "model": loaded.id,
        "machine": machine_name(),
        "policies": list(validity.labels),
        "kinds": list(validity.kinds),
        "kl": validity.kl.round(6).tolist(),
        "losses": {name: loss.round(7).tolist() for name, loss in validity.losses.items()},
        "spearman": correlations,
    }
    write_text(_DOCS / "results" / "replay-validity.json", json.dumps(values))
    caption = f"{loaded.id}, {len(validity.labels)} policies, {len(validity.kinds)} prompts, {machine_name()}"
    draw_validity(validity, TUNED_ON, caption).savefig(_DOCS / "pictures" / "replay-validity.png", dpi=110)
    return {"policies": len(validity.labels), "spearman": correlations}


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


if __name__ == "__main__":
    run_command(main)
