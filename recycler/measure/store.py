"""Closed-loop runs kept on disk, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from policies import Selection, StepPolicy, policy_to_json
from recycler.measure.closed_loop import ClosedLoop, run_closed_loop
from recycler.model.loading import LoadedModel
from recycler.model.versions import versions
from traces import TraceFile


@dataclasses.dataclass(frozen=True)
class ClosedLoopStore:
    """A folder of results, one file per prompt and list of policies.

    Attributes:
        folder: Made when the first result is kept. Deleting it only costs time.
    """

    folder: Path

    def run(
        self,
        loaded: LoadedModel,
        trace: TraceFile,
        policies: Sequence[StepPolicy],
        selection: Selection | None = None,
    ) -> ClosedLoop:
        """Run policies on the prompt of a trace, or read the result of an equal run.

        Runs are equal if model, precision, tokens, selection, policies and package versions are.

        Args:
            loaded: The model of the trace.
            trace: Its prompt and continuation are used.
            policies: Rows of the batch.
            selection: How sets are chosen; None for as in the trace.
        """
        selection = selection or Selection(**trace.header.selection)
        tokens = trace.array("tokens")
        n_prompt_tokens = int(trace.header.prompt["n_prompt_tokens"])
        identity = {
            "model": loaded.id,
            "dtype": str(loaded.model.dtype),
            "tokens": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
            "n_prompt_tokens": n_prompt_tokens,
            "selection": dataclasses.asdict(selection),
            "policies": [policy_to_json(policy) for policy in policies],
            "versions": versions(),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{trace.header.prompt['name']}-{digest[:16]}.npz"
        if path.exists():
            with np.load(path) as arrays:
                return ClosedLoop(**arrays)
        result = run_closed_loop(loaded.model, tokens, n_prompt_tokens, policies, selection)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        with partial.open("wb") as file:
            np.savez_compressed(file, **dataclasses.asdict(result))
        os.replace(partial, path)
        return result
