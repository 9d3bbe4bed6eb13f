"""What a method made of a prompt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Outcome:
    """One method on one prompt.

    Attributes:
        kl: float64 `(steps,)`, nats: KL(full attention || method) of the next-token distribution, teacher-forced.
        agreement: bool `(steps,)`: whether both find the same token most likely.
        accuracy: bool `(steps - 1,)`: whether the token found most likely is the reference's next one.
        nll_change: float64 `(steps - 1,)`, nats: what the method adds to the negative log-likelihood of the
            reference's next token.
        full_share: Share of unit-steps that attended to the whole cache, teacher-forced, a keys-only refresh counted
            half; when there is no step, 0.
        read_share: Tokens read of the cache, as a share of what full attention reads.
        answer: What the model wrote by itself; None for a prompt that is only teacher-forced.
        score: What the answer earns, in [0, 1]; None without one.
        answer_full_share: The full share while it wrote; None without an answer.
        answer_read_share: Its share of dense reading; None without an answer.
    """

    kl: np.ndarray
    agreement: np.ndarray
    accuracy: np.ndarray
    nll_change: np.ndarray
    full_share: float
    read_share: float
    answer: str | None = None
    score: float | None = None
    answer_full_share: float | None = None
    answer_read_share: float | None = None


@dataclass(frozen=True)
class PromptOutcome:
    """All methods on one prompt.

    Attributes:
        name: Of the prompt.
        task: Its task.
        n_prompt_tokens: Its length.
        methods: Outcomes by name of the method.
    """

    name: str
    task: str
    n_prompt_tokens: int
    methods: Mapping[str, Outcome]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""

        def plain(outcome: Outcome) -> dict[str, Any]:
            values = {field.name: getattr(outcome, field.name) for field in dataclasses.fields(outcome)}
            return {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in values.items()}

        return {
            "name": self.name,
            "task": self.task,
            "n_prompt_tokens": self.n_prompt_tokens,
            "methods": {name: plain(outcome) for name, outcome in self.methods.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PromptOutcome:
        """Read what `to_json` wrote."""

        def outcome(plain: Mapping[str, Any]) -> Outcome:
            arrays = {
                "kl": np.array(plain["kl"], dtype=np.float64),
                "agreement": np.array(plain["agreement"], dtype=bool),
                "accuracy": np.array(plain["accuracy"], dtype=bool),
                "nll_change": np.array(plain["nll_change"], dtype=np.float64),
            }
            return Outcome(**{**plain, **arrays})

        methods = {name: outcome(plain) for name, plain in values["methods"].items()}
        return cls(values["name"], values["task"], int(values["n_prompt_tokens"]), methods)
