"""What is compared: a name, where it comes from, and how it decodes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from policies import Selection, StepPolicy, policy_to_json
from recycler.decode.read_prompt import ReadPrompt
from recycler.decode.rows import Rows, decode_rows


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

    @abstractmethod
    def begin(self, model: PreTrainedModel, prompt: ReadPrompt, *, fast: bool = True) -> Rows:
        """Begin to decode, with one row per prompt.

        Args:
            model: The model that read the prompts.
            prompt: Where decoding begins: one, or several side by side.
            fast: False keeps to the plain path.
        """


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

    def begin(self, model: PreTrainedModel, prompt: ReadPrompt, *, fast: bool = True) -> Rows:
        return decode_rows(model, prompt, [self.policy] * len(prompt.logits), self.selection, fast=fast)


def begin(
    model: PreTrainedModel, prompt: ReadPrompt, methods: Sequence[Method], *, fast: bool = True
) -> list[tuple[list[int], Rows]]:
    """Begin to decode by several methods, as many in one batch as can share one.

    Args:
        model: The model that read the prompt.
        prompt: Where decoding begins.
        methods: What to run.
        fast: False keeps to the plain path.

    Returns:
        Batches, each with the places in `methods` of its rows.
    """
    begun: list[tuple[list[int], Rows]] = []
    together: dict[Selection, list[int]] = {}
    for place, method in enumerate(methods):
        if isinstance(method, Scheduled):
            together.setdefault(method.selection, []).append(place)
        else:
            begun.append(([place], method.begin(model, prompt, fast=fast)))
    for selection, places in together.items():
        policies = [one.policy for place in places if isinstance(one := methods[place], Scheduled)]
        begun.append((places, decode_rows(model, prompt, policies, selection, fast=fast)))
    return begun
