"""Notices that a model is no longer the one that an engine took apart."""

from __future__ import annotations

from itertools import chain, repeat
from typing import Any

from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers import PreTrainedModel

# Of all modules of a process.
GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)


class ModelWatch:
    """What is in a model: its modules, weights and where they lie, and hooks; as it was when this was made.

    What stands around the model's own forward is left out: it stands around an engine's steps too. So are numbers that
    are written into a weight in place.

    Args:
        model: The model.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        modules = list(model.modules())
        self._model = model
        # Of hundreds of modules, at every step: loops run inside of built-in functions.
        parts: list[dict[str, Any]] = [part for module in modules for part in (module._modules, module._parameters)]
        self._parts = [part for part in parts if part]
        self._attributes = [module.__dict__ for module in modules[1:]]
        self._hooks = [*GLOBAL_HOOKS]
        for module in modules[1:]:
            self._hooks += (module._forward_hooks, module._forward_pre_hooks)
        # Kept, because what takes the place of something that is gone may get its identity.
        self._kept = [*chain.from_iterable(map(dict.values, self._parts))]
        self._weights = [*model.parameters()]
        self._then = self._look()

    @property
    def has_changed(self) -> bool:
        """Whether any of it is another."""
        return self._look() != self._then

    def _look(self) -> tuple[Any, ...]:
        return (
            [*map(id, chain.from_iterable(map(dict.values, self._parts)))],
            [*map(Tensor.data_ptr, self._weights)],
            sum(map(len, self._hooks)),
            any(map(dict.__contains__, self._attributes, repeat("forward"))),
            self._model.training,
        )
