"""Outcomes kept on disk, so that an interrupted comparison goes on where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from recycler.evaluate.answers import measure
from recycler.evaluate.method import Method
from recycler.evaluate.outcome import PromptOutcome
from recycler.model.loading import LoadedModel
from recycler.model.versions import versions
from recycler.tasks import TaskPrompt


@dataclasses.dataclass(frozen=True)
class FidelityStore:
    """A folder of outcomes, one JSON file per prompt and list of methods.

    Attributes:
        folder: Made when the first outcome is kept. Deleting it only costs time.
    """

    folder: Path

    def measure(self, loaded: LoadedModel, task: TaskPrompt, methods: Sequence[Method]) -> PromptOutcome:
        """Run methods on a prompt, or read the outcome of an equal run.

        Runs are equal if model, precision, tokens, lengths, methods and package versions are.
        """
        identity = {
            "model": loaded.id,
            "dtype": str(loaded.model.dtype),
            "tokens": hashlib.sha256(np.ascontiguousarray(task.prompt.tokens).tobytes()).hexdigest(),
            "n_prompt_tokens": task.prompt.n_prompt_tokens,
            "n_new_tokens": task.n_new_tokens,
            "methods": {method.name: method.settings() for method in methods},
            "versions": versions(),
        }
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        path = self.folder / f"{task.prompt.name}-{digest[:16]}.json"
        if path.exists():
            return PromptOutcome.from_json(json.loads(path.read_text(encoding="utf-8")))
        outcome = measure(loaded, task, methods)
        self.folder.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(outcome.to_json()), encoding="utf-8")
        os.replace(partial, path)
        return outcome
