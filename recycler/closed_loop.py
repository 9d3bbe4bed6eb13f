"""Closed loop: what policies do to a model's predictions when their errors feed on each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from policies import AlwaysFull, Selection, StepPolicy, check_fits
from recycler.attention import attend_by_mask, probabilities
from recycler.hook import AttentionFunction, attention_replaced, refuse_full_window
from recycler.model_shape import check_positions, model_shape
from recycler.per_row import PerRow
from recycler.prefill import prefill
from recycler.units import LayerUnits


@dataclass(frozen=True)
class ClosedLoop:
    """What some policies did on one prompt, teacher-forced: every step is fed the text's own token.

    Attributes:
        kl: float64 `(policies, steps)`, nats: divergence of the next-token distribution from that of full attention,
            KL(full || policy).
        agreement: bool `(policies, steps)`: whether both find the same token most likely.
        accuracy: bool `(policies, steps)`: whether the token found most likely is the text's own next token; False at
            the last step, whose next token is not in the text.
        full: bool `(policies, steps, layers, kv_heads)`: decisions.
    """

    kl: np.ndarray
    agreement: np.ndarray
    accuracy: np.ndarray
    full: np.ndarray

    @property
    def full_share(self) -> np.ndarray:
        """Full share `(policies,)`."""
        share: np.ndarray = self.full.mean((1, 2, 3))
        return share


@dataclass
class _LayerCache:
    """The prompt's keys and values, one row for all policies, and the rows' own since."""

    units: LayerUnits
    prompt_key: Tensor
    prompt_value: Tensor
    new_key: Tensor
    new_value: Tensor
    n_new: int = 0

    def append(self, key: Tensor, value: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        self.new_key[:, :, self.n_new] = key[:, :, 0]
        self.new_value[:, :, self.n_new] = value[:, :, 0]
        self.n_new += 1
        keys = self.prompt_key, self.new_key[:, :, : self.n_new]
        return keys, (self.prompt_value, self.new_value[:, :, : self.n_new])


@dataclass
class _Loop:
    policy: PerRow
    selection: Selection
    n_steps: int
    kv_heads: int
    layers: dict[int, _LayerCache] = field(default_factory=dict)
    full: dict[int, Tensor] = field(default_factory=dict)

    def last_of_prompt(self, stock: AttentionFunction) -> AttentionFunction:
        """Attention of the prompt's last token: remembers the cache and chooses the first sets."""
        rows = len(self.policy.rows)

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            refuse_full_window(layer, key.shape[2] + self.n_steps, kwargs.get("sliding_window"))
            grouped = query[:, :, 0].unflatten(1, (self.kv_heads, -1))
            weights = probabilities(grouped @ key.transpose(-1, -2) * kwargs["scaling"], None)
            everywhere = (rows, -1, -1, -1)
            units = LayerUnits(
                layer,
                self.selection,
                self.policy.needs,
                grouped.expand(everywhere),
                weights.expand(everywhere),
                0,
                key.shape[2],
            )
            room = key.new_empty((rows, self.kv_heads, self.n_steps, key.shape[-1]))
            self.layers[layer] = _LayerCache(units, key, value, room, torch.empty_like(room))
            return stock(module, query, key, value, mask, **kwargs)

        return attend

    def step(self, stock: AttentionFunction) -> AttentionFunction:
        """Attention of a decode step over the rows' own caches; the model is called without one."""

        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            cache = self.layers[layer]
            units = cache.units
            keys, values = cache.append(key, value)
            grouped = query[:, :, 0].unflatten(1, (self.kv_heads, -1))
            full = units.decide(self.policy, grouped)
            attended = attend_by_mask(grouped, keys, values, full, units.recycled, kwargs["scaling"])
            units.settle(full, attended)
            self.full[layer] = full
            return attended.output.flatten(1, 2)[:, None], None

        return attend


def run_closed_loop(
    model: PreTrainedModel,
    tokens: np.ndarray,
    n_prompt_tokens: int,
    policies: Sequence[StepPolicy],
    selection: Selection,
    *,
    chunk_tokens: int = 4096,
) -> ClosedLoop:
    """Decode a text under several policies at once, one row each, and compare with full attention.

    Rows share the prompt's cache and the reading of the weights. Full attention runs as one more row, so that the
    comparison is with the same arithmetic.

    Args:
        model: A causal language model.
        tokens: int `(n_prompt_tokens + steps,)`.
        n_prompt_tokens: Where decoding begins, at least 1.
        policies: Policies to compare.
        selection: How sets are chosen, by all of them.
        chunk_tokens: Prompt tokens per forward.

    Raises:
        ValueError: If a policy is for another model shape, or the text is longer than the model's positions or reaches
            a sliding window.
    """
    shape = model_shape(model)
    for policy in policies:
        check_fits(policy, shape)
    n_steps = len(tokens) - n_prompt_tokens
    check_positions(model, n_prompt_tokens, n_steps)
    rows = (AlwaysFull(), *policies)
    loop = _Loop(PerRow(rows), selection, n_steps, shape.kv_heads)
    text = torch.as_tensor(np.asarray(tokens, dtype=np.int64), device=model.device)
    full = np.empty((len(rows), n_steps, *shape.units), dtype=bool)
    kl = np.empty((len(rows), n_steps))
    predicted = np.empty((len(rows), n_steps), dtype=np.int64)

    with torch.inference_mode():
        prompt = text[None, : n_prompt_tokens - 1]
        cache = prefill(model, prompt, chunk_tokens) if prompt.numel() else None
        with attention_replaced(model, loop.last_of_prompt):
            model(text[None, n_prompt_tokens - 1 : n_prompt_tokens], past_key_values=cache, use_cache=True)
        del cache
        with attention_replaced(model, loop.step):
            for step in range(n_steps):
                place = torch.full((len(rows), 1), n_prompt_tokens + step, device=model.device)
                fed = text[n_prompt_tokens + step].expand(len(rows), 1)
                logits = model(fed, position_ids=place, use_cache=False).logits[:, -1]
                log_p = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(-1)
                kl[:, step] = (log_p[0].exp() * (log_p[0] - log_p)).sum(-1).double().cpu().numpy()
                predicted[:, step] = log_p.argmax(-1).cpu().numpy()
                for layer, decision in loop.full.items():
                    full[:, step, layer] = decision.cpu().numpy()
    right = np.zeros_like(predicted, dtype=bool)
    right[:, :-1] = predicted[:, :-1] == np.asarray(tokens[n_prompt_tokens + 1 :])
    return ClosedLoop(kl=kl[1:].clip(min=0), agreement=predicted[1:] == predicted[0], accuracy=right[1:], full=full[1:])
