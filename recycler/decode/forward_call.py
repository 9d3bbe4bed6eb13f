"""The arguments of one call of a model's forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from recycler.model.decoder_parts import NotCovered

# Arguments that an engine understands, or that change nothing at a decode step of one token. `generate` hands its
# tokenizer on to every forward: stop strings need one, and `transformers serve` always gives it.
_UNDERSTOOD = {
    *("attention_mask", "position_ids", "past_key_values", "use_cache", "logits_to_keep", "cache_position"),
    "tokenizer",
}


class ForwardCall:
    """The arguments of one call of a model's forward."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.arguments = dict(kwargs)
        self._more_positional = len(args) > 1
        if args:
            self.arguments["input_ids"] = args[0]

    @property
    def tokens(self) -> Tensor:
        """int64 `(rows, 1)`."""
        tokens: Tensor = self.arguments["input_ids"]
        return tokens

    @property
    def known_tokens(self) -> Tensor | None:
        """The same, or None if the call brings embeddings."""
        tokens: Tensor | None = self.arguments.get("input_ids")
        return tokens

    @property
    def is_one_token(self) -> bool:
        """Whether the call brings one token per row."""
        given = self.arguments.get("input_ids")
        if given is None:
            given = self.arguments.get("inputs_embeds")
        return given is not None and given.shape[1] == 1

    def check(self) -> None:
        """Refuse what engines do not do.

        Raises:
            NotCovered: With the argument.
        """
        if self._more_positional:
            raise NotCovered("the model was called with several arguments without names")
        for name, value in self.arguments.items():
            asks = value is not None and value is not False
            if name == "input_ids" or name in _UNDERSTOOD or (name == "return_dict" and value is not False):
                continue
            if asks or name == "return_dict":
                raise NotCovered(f"the call passes {name}")
        if self.arguments.get("input_ids") is None:
            raise NotCovered("the call passes no input_ids")
        if self.arguments.get("use_cache") is False:
            raise NotCovered("the call passes use_cache=False")
        mask = self.arguments.get("attention_mask")
        if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
            raise NotCovered("the attention mask is not one number per row and token")
