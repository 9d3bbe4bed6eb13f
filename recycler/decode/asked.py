"""What a session is asked to apply, and to which model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from policies import PolicyFile, Selection, StepPolicy, check_fits
from policies.stops import FixedDrafts, StopRule
from recycler.model.shape import model_shape
from recycler.model.weights_digest import weights_sample

# Drafts of a round, where nobody says: with as many the most time was gained of those that were tried.
_DRAFTS = 8


@dataclass(frozen=True)
class Asked:
    """A policy with all that it needs, checked against a model.

    Attributes:
        policy: Who decides.
        selection: How sets are chosen.
        horizon_steps: Decode steps of the outputs that the policy was tuned on; None if that is not known.
        notes: Sentences on how the model differs from the one that the policy was tuned on.
        stop: When a round of exact decoding ends, if a policy file says so.
    """

    policy: StepPolicy
    selection: Selection
    horizon_steps: int | None
    notes: tuple[str, ...]
    stop: StopRule | None = None

    @classmethod
    def of(
        cls,
        policy: StepPolicy | PolicyFile | str | Path,
        selection: Selection | None,
        horizon_steps: int | None,
        model: PreTrainedModel,
    ) -> Asked:
        """Make it of what `recycled` takes.

        Raises:
            ValueError: If a file cannot be read or is for another model shape, a bare policy comes without a selection,
                or policy or selection has the parameters of another model shape.
        """
        shape, note = model_shape(model), ""
        stop: StopRule | None = None
        if isinstance(policy, (str, Path)):
            policy = PolicyFile.read(policy)
        if isinstance(policy, PolicyFile):
            policy.check_model(shape)
            note = policy.note_on_weights(weights_sample(model), shape.id) if policy.weights else ""
            selection = policy.selection if selection is None else selection
            horizon_steps = policy.horizon_steps if horizon_steps is None else horizon_steps
            stop = policy.stop
            policy = policy.policy
        if not isinstance(policy, StepPolicy):
            raise ValueError(
                f"the policy must be a StepPolicy, a PolicyFile or the path of one, not {type(policy).__name__}."
            )
        if selection is None:
            raise ValueError(
                f"the policy {policy.kind!r} says nothing of how sets are chosen: give a selection with it, such as "
                "Selection.unpooled(128), or a policy file, which has one."
            )
        check_fits(policy, shape)
        check_fits(selection, shape)
        return cls(policy, selection, horizon_steps, (note,) if note else (), stop)

    def in_rounds(self, exact: bool | StopRule) -> Asked:
        """The same for exact decoding, with the rule that ends its rounds as `stop`; without any if `exact` is False.

        Raises:
            ValueError: If `exact` is neither a truth nor a rule.
        """
        if not isinstance(exact, (bool, StopRule)):
            raise ValueError(
                f"exact must be True, False or a rule of policies.stops such as FixedDrafts(8), not {exact!r}."
            )
        if exact is False:
            return dataclasses.replace(self, stop=None)
        stop = exact if isinstance(exact, StopRule) else self.stop or FixedDrafts(_DRAFTS)
        # How far a policy leads away from full attention, for how long and on which weights, says nothing here.
        return dataclasses.replace(self, horizon_steps=None, notes=(), stop=stop)


def model_of(target: Any) -> PreTrainedModel:
    """The model of what `recycled` is put around: a model itself, or a pipeline or a `LoadedModel` around one.

    So are a model that torch.compile made, which falls back to the replaced functions of the one inside, and a PEFT
    model whose adapters lie in its layers, which calls the one inside.

    Raises:
        ValueError: If it is anything else. Other wrappers that are modules are refused, because what is replaced in the
            model inside of them may not be what they call.
    """
    if isinstance(target, PreTrainedModel):
        return target
    what, is_module = type(target).__name__, isinstance(target, nn.Module)
    if not is_module and isinstance(getattr(target, "model", None), nn.Module):
        return model_of(target.model)
    if is_module and what == "OptimizedModule":
        return model_of(target._orig_mod)
    if is_module and hasattr(target, "peft_config") and hasattr(target, "get_base_model"):
        for name, config in target.peft_config.items():
            if config.is_prompt_learning:
                raise ValueError(
                    f"recycled covers adapters in a model's layers, such as LoRA, and {name!r} is a learned prompt "
                    f"({config.peft_type.value}), whose tokens are in no input."
                )
        return model_of(target.get_base_model())
    if is_module:
        raise ValueError(
            f"recycled takes a transformers model, not the wrapper {what} around one: give it the model inside, and "
            "call that one."
        )
    raise ValueError(f"recycled takes a transformers model or a pipeline, not {what}.")
