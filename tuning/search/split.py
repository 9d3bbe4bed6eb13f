"""Who is tuned on and who is measured on: whole prompts, never steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar


class Named(Protocol):
    """A prompt or its trace."""

    @property
    def name(self) -> str: ...

    @property
    def kind(self) -> str: ...


PromptT = TypeVar("PromptT", bound=Named)


@dataclass(frozen=True)
class Split(Generic[PromptT]):
    """Prompts by the part that they play; every kind of text is in every part as far as it has prompts.

    Attributes:
        tune: Replayed in the search.
        ablate: Of these, on whom unit costs are measured: one of each kind.
        validate: Of these, on whom candidates are compared in closed loop: others than `ablate` where there are any.
        held_out: Seen by nobody until the winners are confirmed.
    """

    tune: tuple[PromptT, ...]
    ablate: tuple[PromptT, ...]
    validate: tuple[PromptT, ...]
    held_out: tuple[PromptT, ...]


def split_by_prompt(prompts: Sequence[PromptT]) -> Split[PromptT]:
    """Hold out the later half of each kind, by name.

    Args:
        prompts: Prompts or traces, with different names; the order does not matter.

    Raises:
        ValueError: If no kind has two prompts, so that none can be held out.
    """
    by_kind: dict[str, list[PromptT]] = {}
    for prompt in sorted(prompts, key=lambda prompt: prompt.name):
        by_kind.setdefault(prompt.kind, []).append(prompt)
    tune, ablate, validate, held_out = [], [], [], []
    for of_kind in by_kind.values():
        n_tune = (len(of_kind) + 1) // 2
        tune += of_kind[:n_tune]
        ablate.append(of_kind[0])
        validate.append(of_kind[n_tune - 1])
        held_out += of_kind[n_tune:]
    if not held_out:
        raise ValueError(
            f"{len(prompts)} prompts of {len(by_kind)} kinds are too few to hold any out: "
            "record at least two prompts of one kind."
        )
    return Split(tuple(tune), tuple(ablate), tuple(validate), tuple(held_out))
