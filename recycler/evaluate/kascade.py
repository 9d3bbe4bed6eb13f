"""Kascade: a few layers look at all keys at every step, and the others take over what they found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from recycler.decode.read_prompt import ReadPrompt
from recycler.decode.rows import Rows
from recycler.evaluate.chosen import Chosen, begin_choosing
from recycler.evaluate.method import Method
from recycler.model.shape import model_shape


@dataclass(frozen=True)
class Kascade(Method):
    """Tokens of an anchor layer's highest attention, which the layers up to the next anchor attend to as well.

    Source: Kascade (arXiv 2512.16391) and its authors' code: the first layer attends to everything; an anchor computes
    the attention of all keys at every step, sums it over the query heads of a KV head, and attends to the k highest. In
    a layer between anchors each KV head attends to the tokens that one KV head of the anchor before has found; which
    one that is was learned from other texts. The authors' k is a tenth of the context and at least 128; here it is a
    number. Theirs also reads prompts so, in tiles of 32 queries; here prompts are read with full attention, as by every
    method.

    Attributes:
        k: Tokens that a KV head attends to.
        anchors: Layers that look, rising from 0.
        heads: By layer, the KV head of the anchor before that each KV head follows; an anchor's follow themselves.
    """

    k: int
    anchors: tuple[int, ...]
    heads: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if self.k < 1:
            raise ValueError(f"Kascade attends to at least one token, not k = {self.k}.")
        if not self.anchors or self.anchors[0] or list(self.anchors) != sorted(set(self.anchors)):
            raise ValueError(f"anchors are layers that rise from 0, not {list(self.anchors)}.")
        if self.anchors[-1] >= len(self.heads):
            raise ValueError(f"there is no layer {self.anchors[-1]} of {len(self.heads)} to be an anchor.")

    @property
    def prompt_queries(self) -> int | None:
        return 1

    def settings(self) -> dict[str, Any]:
        return {"kascade": {"k": self.k, "anchors": list(self.anchors), "heads": [list(of) for of in self.heads]}}

    def begin(self, model: PreTrainedModel, prompt: ReadPrompt, *, fast: bool = True) -> Rows:
        units = model_shape(model).units
        if (len(self.heads), *{len(of) for of in self.heads}) != units:
            raise ValueError(
                f"{self.name} is for {len(self.heads)} layers of {len(self.heads[0])} KV heads, and the model has "
                f"{units[0]} of {units[1]}."
            )
        return begin_choosing(model, prompt, _Following(self).choose)


class _Following:
    """What the last anchor found, at one step after another."""

    def __init__(self, kascade: Kascade) -> None:
        self._kascade, self._found = kascade, torch.empty(0)

    def choose(self, layer: int, query: Tensor, key: Tensor, logits: Tensor) -> Chosen:
        kascade, n_tokens = self._kascade, key.shape[-2]
        looks = layer in kascade.anchors
        if looks:
            self._found = highest(logits.softmax(-1), kascade.k)
            held = self._found
        else:
            held = self._found[:, list(kascade.heads[layer])]
        allowed = torch.zeros_like(logits[..., 0, :], dtype=torch.bool).scatter_(-1, held, True)
        if layer == 0:
            allowed.fill_(True)
        n_held = allowed.sum(-1).double()
        read = (n_tokens + n_held) / 2 if looks else n_held
        return Chosen(allowed[..., None, :].expand_as(logits), read, keys_only=looks and layer > 0)


def highest(weights: Tensor, k: int) -> Tensor:
    """The k tokens of most attention, summed over a group: `(..., group, tokens)` to int64 `(..., k)`."""
    return weights.sum(-2).topk(min(k, weights.shape[-1])).indices
