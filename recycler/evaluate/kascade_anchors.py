"""Which layers Kascade's anchors are, and whom the heads between them follow."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from recycler.evaluate.kascade import Kascade
from recycler.model.loading import LoadedModel
from recycler.model.shape import model_shape, recycled_layers
from recycler.prompts import Prompt
from recycler.record.step_attention import StepAttention, watch_steps


def kascade_for(loaded: LoadedModel, prompts: Sequence[Prompt], name: str, k: int, n_anchors: int) -> Kascade:
    """Choose anchors and whom heads follow on the decode steps of some prompts, by the authors' formulas.

    How well a KV head follows another is the attention it has on the other's k tokens, as a share of that on its own,
    at the step where that is least, mean over prompts; a layer is worth the mean over its KV heads of the best each
    finds in the anchor, times what its attention turns the residual stream: 1 - cosine of before and after.

    Deviations: the authors look at all tiles of 32 queries of a prompt, and count what a tile has on itself on both
    sides; here it is the steps of the continuation, which is where Kascade decodes here. They choose anchors at a k of
    32 and run at others; here it is one k. What they look at is computed with sparse attention already, here with full.

    Args:
        loaded: The model.
        prompts: To learn from; the authors take a thousand questions of MuSiQue.
        name: Of the method.
        k: Tokens that a KV head attends to.
        n_anchors: How many layers look, the first included; the authors take 5 of 32 for Llama 3.1 8B.

    Raises:
        ValueError: If some layers pass through, if attention's output is not added to the residual stream as it is, or
            if there are fewer layers than anchors.
    """
    found = [_similarity(loaded, prompt, k) for prompt in prompts]
    similarity = np.mean([one for one, _ in found], axis=0)
    importance = np.mean([one for _, one in found], axis=0)
    by_layer = similarity.max(1).mean(-1) * importance
    anchors = best_anchors(by_layer, n_anchors)
    anchor_of = [max(anchor for anchor in anchors if anchor <= layer) for layer in range(len(by_layer))]
    n_heads = similarity.shape[-1]
    heads = [
        tuple(range(n_heads)) if anchor == layer else tuple(similarity[anchor, :, layer].argmax(0).tolist())
        for layer, anchor in enumerate(anchor_of)
    ]
    return Kascade(name, "arXiv 2512.16391", k, anchors, tuple(heads))


def best_anchors(worth: np.ndarray, n_anchors: int) -> tuple[int, ...]:
    """The anchors, the first layer among them, that serve all layers best.

    Args:
        worth: float64 `(anchors, layers)`: of what an anchor finds, to a layer from it on.
        n_anchors: How many.

    Raises:
        ValueError: If there are fewer layers.
    """
    n_layers = len(worth)
    if not 1 <= n_anchors <= n_layers:
        raise ValueError(f"a model of {n_layers} layers has 1 to {n_layers} anchors, not {n_anchors}.")
    to_layer = np.cumsum(worth, axis=1)

    @functools.cache
    def best_from(anchor: int, n_left: int) -> tuple[float, tuple[int, ...]]:
        before = to_layer[anchor, anchor - 1] if anchor else 0.0
        if n_left == 1:
            return float(to_layer[anchor, -1] - before), (anchor,)
        tried = []
        for following in range(anchor + 1, n_layers - n_left + 2):
            gain, rest = best_from(following, n_left - 1)
            tried.append((float(to_layer[anchor, following - 1] - before) + gain, (anchor, *rest)))
        return max(tried)

    return best_from(0, n_anchors)[1]


def _similarity(loaded: LoadedModel, prompt: Prompt, k: int) -> tuple[np.ndarray, np.ndarray]:
    """How well heads follow others `(anchors, their heads, layers, heads)`, and importance `(layers,)`."""
    weights: list[Tensor] = []

    def watch(layer: int, heads: slice, attention: StepAttention) -> None:
        weights.append(attention.weights[:, :, 1:].sum(1))

    with _Turning(loaded.model) as turning:
        watch_steps(
            loaded.model, prompt, watch, n_voters=1, n_heads=model_shape(loaded.model).kv_heads, chunk_tokens=None
        )
    layers, kv_heads = model_shape(loaded.model).units
    # `(layers x heads, steps, tokens)`, and the tokens of most attention.
    attention = torch.cat(weights)
    held = attention.topk(min(k, attention.shape[-1])).indices
    own = attention.gather(-1, held).sum(-1)
    table = torch.stack([(attention.gather(-1, of.expand_as(held)).sum(-1) / own).amin(-1) for of in held])
    return table.reshape(layers, kv_heads, layers, kv_heads).double().cpu().numpy(), turning.shares()


class _Turning:
    """Watches how far attention turns the residual stream of each decoder layer."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._layers: nn.ModuleList = model.base_model.layers  # type: ignore[assignment]
        altered = any(hasattr(self._layers[0], name) for name in ("pre_feedforward_layernorm", "residual_multiplier"))
        if altered or len(recycled_layers(model)) < len(self._layers):
            raise ValueError(
                f"anchors are chosen for models whose layers all attend to everything and add attention's output as it "
                f"is to what they read, not for {type(model).__name__}."
            )
        self._before: dict[int, Tensor] = {}
        self._turned: dict[int, float] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> _Turning:
        for index, layer in enumerate(self._layers):
            self._handles += [
                layer.register_forward_pre_hook(functools.partial(self._note, index)),
                layer.self_attn.register_forward_hook(functools.partial(self._compare, index)),  # type: ignore[union-attr]
            ]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def shares(self) -> np.ndarray:
        """1 - cosine, mean over the tokens of the last forward, by layer."""
        return np.array([self._turned[index] for index in range(len(self._layers))])

    def _note(self, index: int, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._before[index] = arguments[0]

    def _compare(self, index: int, _: nn.Module, __: Any, output: tuple[Any, ...]) -> None:
        before = self._before.pop(index)
        cosine = torch.nn.functional.cosine_similarity(before, before + output[0], dim=-1)
        self._turned[index] = 1 - float(cosine.mean())
