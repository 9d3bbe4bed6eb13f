"""What the toolkit needs to know of a model, and which models it can run."""

from __future__ import annotations

from transformers import PreTrainedModel

from policies import ModelShape

_RECYCLABLE_LAYERS = {"full_attention", "sliding_attention"}


def model_shape(model: PreTrainedModel, model_id: str | None = None) -> ModelShape:
    """Layers, heads and head size of a decoder.

    Args:
        model: A causal language model.
        model_id: What to call it; None takes the model's own name or path.

    Raises:
        ValueError: If the model has layers without a KV cache of tokens, such as linear attention.
    """
    config = model.config.get_text_config(decoder=True)
    name = model_id or model.name_or_path or type(model).__name__
    others = set(getattr(config, "layer_types", None) or ()) - _RECYCLABLE_LAYERS
    if others or not hasattr(config, "num_attention_heads"):
        raise ValueError(f"{name} has layers of type {', '.join(sorted(others)) or 'unknown'}, which keep no KV cache.")
    query_heads = int(config.num_attention_heads)
    return ModelShape(
        id=name,
        layers=int(config.num_hidden_layers),
        kv_heads=int(getattr(config, "num_key_value_heads", None) or query_heads),
        query_heads=query_heads,
        head_dim=int(getattr(config, "head_dim", None) or config.hidden_size // query_heads),
    )


def max_positions(model: PreTrainedModel) -> int:
    """Tokens, prompt and continuation together, that the model has positions for."""
    return int(model.config.get_text_config(decoder=True).max_position_embeddings)


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
