"""What is compared: a name, where it comes from, and how it decodes."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from policies import Selection, StepPolicy, policy_to_json
from recycler.decode.read_prompt import ReadPrompt
from recycler.decode.rows import DecodeRows, decode_rows
from recycler.evaluate.selecting_rows import SelectingRows
from recycler.evaluate.token_selector import TokenSelector


@dataclass(frozen=True)
class Method(ABC):
    """A way to decode after a prompt that was read with full attention.

    Attributes:
        name: What tables call it; unique in a comparison.
        source: The paper that it comes from, and what is different here.
    """

    name: str
    source: str

    @property
    @abstractmethod
    def prompt_queries(self) -> int | None:
        """What it needs of the prompt; see `Selection.prompt_queries`."""

    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """All that its outcome depends on, as JSON values."""


@dataclass(frozen=True)
class Scheduled(Method):
    """Recycled attention: a policy and a selection.

    Attributes:
        policy: When units run full.
        selection: How sets are chosen.
    """

    policy: StepPolicy
    selection: Selection

    @property
    def prompt_queries(self) -> int | None:
        return self.selection.prompt_queries

    def settings(self) -> dict[str, Any]:
        return {"policy": policy_to_json(self.policy), "selection": self.selection.to_json()}


@dataclass(frozen=True)
class EveryStep(Method):
    """A choice at every step.

    Attributes:
        selector: How.
    """

    selector: TokenSelector

    @property
    def prompt_queries(self) -> int | None:
        return 1

    def settings(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self.selector)  # type: ignore[call-overload]
        return {"selector": type(self.selector).__name__, **fields}


def begin(
    model: PreTrainedModel, prompt: ReadPrompt, methods: Sequence[Method], *, fast: bool = True
) -> list[tuple[list[int], DecodeRows]]:
    """Begin to decode by several methods, as many in one batch as can share one.

    Args:
        model: The model that read the prompt.
        prompt: Where decoding begins.
        methods: What to run.
        fast: False keeps to the plain path.

    Returns:
        Batches, each with the places in `methods` of its rows.
    """
    batches: dict[Selection | None, list[int]] = {}
    for place, method in enumerate(methods):
        batches.setdefault(method.selection if isinstance(method, Scheduled) else None, []).append(place)
    begun: list[tuple[list[int], DecodeRows]] = []
    for selection, places in batches.items():
        chosen = [methods[place] for place in places]
        rows: DecodeRows
        if selection is None:
            rows = SelectingRows(model, prompt, [one.selector for one in chosen if isinstance(one, EveryStep)])
        else:
            policies = [one.policy for one in chosen if isinstance(one, Scheduled)]
            rows = decode_rows(model, prompt, policies, selection, fast=fast)
        begun.append((places, rows))
    return begun
