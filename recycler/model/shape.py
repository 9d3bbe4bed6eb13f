"""What the toolkit needs to know of a model, and which models it can run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from policies import ModelShape

_FULL, _WINDOW = "full_attention", "sliding_attention"
# Layers whose state is bounded and lies apart from all others': they run as they are, and are no units.
_PASSED_THROUGH = {_WINDOW, "chunked_attention", "window_attention", "linear_attention", "conv", "moe"}


def recycled_layers(model: PreTrainedModel) -> Mapping[int, int]:
    """The layers that are recycled: from their index in the model to their place among each other.

    These are the layers that attend to the whole context. Layers with a window, chunks or a recurrence read a bounded
    part of it whatever its length, and pass through untouched. Where every layer has a window, all are recycled, as
    long as the context lies within it (`refuse_full_window`).

    Raises:
        ValueError: If a layer is of a kind that cannot be recycled and does not pass through, or none is recycled.
    """
    types = _layer_types(model)
    kinds = set(types)
    recycled = _FULL if _FULL in kinds or kinds != {_WINDOW} else _WINDOW
    if others := kinds - {recycled} - _PASSED_THROUGH:
        raise ValueError(
            f"{_name(model)} has layers of type {', '.join(sorted(others))}, which are neither attention to the whole "
            "context nor apart from it: it cannot be recycled."
        )
    indices = [index for index, kind in enumerate(types) if kind == recycled]
    if not indices:
        raise ValueError(f"no layer of {_name(model)} attends to the whole context: there is nothing to recycle.")
    return {index: place for place, index in enumerate(indices)}


def n_layers(model: PreTrainedModel) -> int:
    """Layers of the decoder, recycled or not."""
    return len(_layer_types(model))


def window_of_recycled_layers(model: PreTrainedModel) -> int | None:
    """Tokens that recycled layers see, None for all of them."""
    return _text_config(model).sliding_window if set(_layer_types(model)) == {_WINDOW} else None


def model_shape(model: PreTrainedModel, model_id: str | None = None) -> ModelShape:
    """Layers, heads and head size of a decoder; the layers are those that are recycled.

    Args:
        model: A causal language model.
        model_id: What to call it; None takes the model's own name or path.

    Raises:
        ValueError: As `recycled_layers`.
    """
    layers = recycled_layers(model)
    config = _layer_config(model, next(iter(layers)))
    query_heads = int(config.num_attention_heads)
    return ModelShape(
        id=model_id or _name(model),
        layers=len(layers),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or query_heads),
        query_heads=query_heads,
        head_dim=int(
            # Where keys are wider than what rotary embedding turns, as in DeepSeek-V3.
            getattr(config, "qk_head_dim", None)
            or getattr(config, "head_dim", None)
            or config.hidden_size // query_heads
        ),
    )


def max_positions(model: PreTrainedModel) -> int:
    """Tokens, prompt and continuation together, that the model has positions for."""
    return int(_text_config(model).max_position_embeddings)


def changing_rope_type(model: PreTrainedModel) -> str:
    """The type of a rotary embedding that turns all tokens of a call by its largest position; empty if it does not."""
    parameters = getattr(_text_config(model), "rope_parameters", None) or {}
    # One for all layers, or one for each type of them.
    each = [parameters, *(one for one in parameters.values() if isinstance(one, dict))]
    types = {str(one.get("rope_type", "")) for one in each}
    return next((kind for kind in ("dynamic", "longrope") if kind in types), "")


def most_tokens(model: PreTrainedModel) -> int:
    """Tokens, prompt and continuation together, that the model can read and its recycled layers see as a whole."""
    window = window_of_recycled_layers(model)
    return max_positions(model) if window is None else min(max_positions(model), window - 1)


def check_positions(model: PreTrainedModel, n_prompt_tokens: int, n_new_tokens: int) -> None:
    """Refuse a text that the model has no positions for.

    Raises:
        ValueError: With the three numbers.
    """
    if n_prompt_tokens + n_new_tokens > max_positions(model):
        raise ValueError(
            f"the prompt has {n_prompt_tokens} tokens and {n_new_tokens} more are asked for, but the model has only "
            f"{max_positions(model)} positions: shorten the prompt."
        )


def _layer_types(model: PreTrainedModel) -> Sequence[str]:
    config = _text_config(model)
    if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "num_attention_heads"):
        raise ValueError(f"{_name(model)} is no decoder of attention layers: it cannot be recycled.")
    types: Sequence[str] | None = getattr(config, "layer_types", None)
    if types is None:
        types = [_FULL if getattr(config, "sliding_window", None) is None else _WINDOW] * config.num_hidden_layers
    return types


def _layer_config(model: PreTrainedModel, layer: int) -> Any:
    """The configuration of one layer: in some models layers differ, as in Gemma 4."""
    of_layers = getattr(_text_config(model), "per_layer_config", None)
    return of_layers[layer] if of_layers else _text_config(model)


def _text_config(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _name(model: PreTrainedModel) -> str:
    return model.name_or_path or type(model).__name__
