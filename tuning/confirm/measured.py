"""Putting closed-loop runs and replay of a policy together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from policies import StepPolicy
from tuning.confirm.results import Measured
from tuning.replay.run import replay_policy
from tuning.replay.trace_batch import TraceBatch


class ClosedLoopArrays(Protocol):
    """What is read of a closed-loop run; see `recycler.measure.closed_loop.ClosedLoop`."""

    @property
    def kl(self) -> np.ndarray: ...

    @property
    def agreement(self) -> np.ndarray: ...

    @property
    def accuracy(self) -> np.ndarray: ...

    @property
    def full(self) -> np.ndarray: ...


def measured(
    labels: Sequence[str],
    policies: Sequence[StepPolicy],
    traces: TraceBatch,
    runs: Sequence[ClosedLoopArrays],
    *,
    traced_set: bool = True,
) -> list[Measured]:
    """Summarise policies over prompts, and say what replay has them do.

    Args:
        labels: One per policy.
        policies: The rows of each run.
        traces: Of the tuning prompts, to replay on.
        runs: One closed-loop run per held-out prompt.
        traced_set: False if they ran with another selection than the traces': then nothing is known of recovered mass.
    """
    results = []
    for row, (label, policy) in enumerate(zip(labels, policies, strict=True)):
        replay = replay_policy(traces, policy)
        results.append(
            Measured(
                label=label,
                policy=policy,
                replay_full_share=replay.full_share,
                recovered_mass=replay.recovered_mass if traced_set else float("nan"),
                prompt_kl=np.array([run.kl[row].mean() for run in runs]),
                prompt_agreement=np.array([run.agreement[row].mean() for run in runs]),
                # The last step has no next token in the text.
                prompt_accuracy=np.array([run.accuracy[row][:-1].mean() for run in runs]),
                prompt_full_share=np.array([run.full[row].mean() for run in runs]),
                unit_full_share=np.mean([run.full[row].mean(0) for run in runs], axis=0),
            )
        )
    return results
