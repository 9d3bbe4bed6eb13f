"""What `benchmarks/long_outputs.py` compares: policies, strides, exact decoding, methods of others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tuned_rules import tuned_rules

from policies import (
    AlwaysFull,
    FixedStride,
    LearnedLogistic,
    PolicyFile,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from policies.stops import StopRule
from recycler.evaluate.baselines import streaming_llm_set
from recycler.evaluate.kascade import Kascade
from recycler.evaluate.kascade_anchors import kascade_for
from recycler.evaluate.method import Method, Scheduled
from recycler.evaluate.sentence_ends import sentence_end_tokens
from recycler.measure.ablation import measure_prompt_sensitivity
from recycler.measure.closed_loop import ClosedLoopStore
from recycler.model.loading import LoadedModel
from recycler.prompts import Prompt, default_prompts

FULL = "full attention"
ANEW = "new sets at every step"
_TUNING_TOKENS = 1536
_RULES = Path(__file__).parents[1] / "docs/results/exact-tuned.json"


@dataclass(frozen=True)
class ExactDrafts:
    """Exact decoding: who drafts, and when a round ends."""

    policy: StepPolicy
    selection: Selection
    stop: StopRule


Contender = Method | ExactDrafts
# By name; what makes one may have to measure something.
Makers = dict[str, Callable[[], Contender]]


def _scheduled(policy: StepPolicy, selection: Selection) -> Callable[[], Contender]:
    return lambda: Scheduled("", "", policy, selection)


def policies_and_strides(files: Mapping[str, PolicyFile]) -> Makers:
    """Policies that were tuned, stride 10 with every set that one of them has, pooled and not, and what sets allow.

    That is every unit looking at all keys at every step, and reading the values of its set alone: what is left then no
    schedule of such sets takes away.
    """
    first = next(iter(files.values()))
    found: list[tuple[str, StepPolicy, Selection]] = [(FULL, AlwaysFull(), first.selection)]
    found += [(f"tuned on {file.horizon_steps} steps", file.policy, file.selection) for file in files.values()]
    sets: dict[Selection, str] = {}
    for file in files.values():
        sets.setdefault(file.selection.pooled(), f"stride 10, pooled {file.selection.ranking} sets")
        sets.setdefault(file.selection, f"stride 10, unpooled {file.selection.ranking} sets")
    found += [(name, FixedStride(10), selection) for selection, name in sets.items()]
    longest = max(files.values(), key=lambda file: file.horizon_steps or 0)
    found += [(ANEW, RefreshKeys(AlwaysFull()), longest.selection)]
    names = [name for name, _, _ in found]
    if len(set(names)) < len(names):
        raise ValueError(f"these policy files make contenders of one name: {', '.join(names)}.")
    return {name: _scheduled(policy, selection) for name, policy, selection in found}


def exact_drafts(files: Mapping[str, PolicyFile]) -> Makers:
    """What was tuned on the longest outputs drafts, until the rule that was learned for a CPU verifies."""
    drafts = max(files.values(), key=lambda file: file.horizon_steps or 0)
    stop = tuned_rules(_RULES)[0].rule
    name = f"exact, drafts tuned on {drafts.horizon_steps} steps"
    return {name: lambda: ExactDrafts(drafts.policy, drafts.selection, stop)}


def methods_of_others(loaded: LoadedModel, out: Path, k: int, n_tokens: int) -> Makers:
    """Methods of others near a tenth of unit-steps, with settings of ours where a source gives none.

    A cache has `n_tokens` in the mean.

    - SFI (arXiv 2603.12038): full where a sentence ends, with its authors' least gap of 16 steps and 32 at most; and as
      often as a tenth allows, gaps of 8 to 12 steps being ours.
    - DuoAttention (arXiv 2410.10819), in kind: a tenth of the KV heads are always full, those that alone do most damage
      when they see sinks and window only, and the others see those only. It trains gates where this ablates.
    - FreeKV (arXiv 2505.13109), in kind: a KV head looks when the cosine of its query with that of the step before is
      below a threshold, one for all. The authors have one for each model, and choose pages for every next step off the
      critical path, which counts as nothing there and would be reading here; ours is the threshold that gives a tenth.
    - Kascade (arXiv 2512.16391): at the k of all, with 5 anchors, as its authors have for 32 layers, which reads as
      much of 30 as a tenth full does; and at the k of its authors, a tenth of the context and at least 128, with 4,
      which reads a little more. Anchors and whom heads follow are chosen on tuning prompts.
    """
    paper = Selection(k, prompt_queries=1)
    ends, tenth = sentence_end_tokens(loaded.tokenizer), max(128, round(n_tokens / 10))
    return {
        "SFI, gap 16 to 32": _scheduled(SentenceBoundary(ends, 32, 16), paper),
        "SFI, gap 8 to 12": _scheduled(SentenceBoundary(ends, 12, 8), paper),
        "DuoAttention-like": lambda: _duo(loaded, out, streaming_llm_set(k)),
        "FreeKV-like": lambda: Scheduled("", "", _at_a_tenth(loaded, ClosedLoopStore(out), paper), paper),
        f"Kascade, 5 anchors, k = {k}": lambda: _kascade(loaded, k, 5),
        f"Kascade, 4 anchors, k = {tenth}": lambda: _kascade(loaded, tenth, 4),
    }


def _kascade(loaded: LoadedModel, k: int, n_anchors: int) -> Kascade:
    return kascade_for(loaded, _tuning_prompts(loaded, 2, 64), "Kascade", k, n_anchors)


def _tuning_prompts(loaded: LoadedModel, per_kind: int, n_steps: int) -> list[Prompt]:
    return default_prompts(loaded.tokenizer, n_per_kind=per_kind, context_tokens=_TUNING_TOKENS, n_steps=n_steps)


def _duo(loaded: LoadedModel, out: Path, streaming: Selection) -> Scheduled:
    """A tenth of heads always full, those that do most damage with sinks and window alone."""
    damage = measure_prompt_sensitivity(loaded, out / "streaming", _tuning_prompts(loaded, 1, 24), streaming)
    table = np.sum([np.sqrt(np.maximum(kl, 0)) for kl in damage.kl.values()], axis=0)
    least = np.sort(table, axis=None)[-round(table.size / 10)]
    return Scheduled("", "", FixedStride(np.where(table >= least, 1, 1e9).tolist()), streaming)


def _at_a_tenth(loaded: LoadedModel, store: ClosedLoopStore, selection: Selection) -> LearnedLogistic:
    """Looks where a query turns from the one before by more than what gives a tenth of full steps on tuning prompts."""

    def looking_beyond(drift: float) -> LearnedLogistic:
        return LearnedLogistic(("step_drift",), (1.0,), -drift)

    prompts = _tuning_prompts(loaded, 1, 128)
    drifts = np.geomspace(0.02, 1.0, 15)
    loops = store.run_all(
        loaded,
        prompts,
        [looking_beyond(float(drift)) for drift in drifts],
        selection,
        desc="calibrating FreeKV-like",
    )
    share = np.mean([loop.full_share for loop in loops], axis=0)
    # Falls as the drift that is tolerated grows.
    return looking_beyond(float(np.exp(np.interp(-0.1, -share, np.log(drifts)))))
