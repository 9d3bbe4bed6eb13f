"""Recording traces: one pass of full attention, every age of every set."""

from __future__ import annotations

import dataclasses
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from policies import GroupPooling, Ranking, Selection, check_fits
from recycler.aged_sets import band, evictions, mass_by_age
from recycler.attention import probabilities
from recycler.hook import AttentionFunction, attention_replaced, refuse_full_window
from recycler.model_shape import check_positions, model_shape
from recycler.prefill import prefill
from recycler.prompts import Prompt
from recycler.recycled_set import select, token_scores, unit_sizes
from traces import Trace, TraceHeader

# Arrays of (rows, tokens) floats alive at once per KV head, beside two per query head: mean attention, pooled scores,
# ranks (twice as wide) and their copy, set masks.
_ARRAYS_PER_HEAD = 9

# Most memory of a block on CPU: beyond it every temporary is mapped and cleared by the system anew.
_CPU_BLOCK_MIB = 256


def record_trace(
    model: PreTrainedModel,
    prompt: Prompt,
    selection: Selection,
    *,
    max_age: int,
    model_id: str | None = None,
    memory_mib: int = 1024,
    chunk_tokens: int = 4096,
) -> Trace:
    """Record what every schedule would meet on one prompt.

    The prompt runs through the model once, with full attention throughout. Its last `n_steps` tokens are the decode
    steps, fed as they are (teacher-forced).

    Args:
        model: A causal language model.
        prompt: The text.
        selection: How sets are chosen.
        max_age: Oldest set to record, in steps, at least 1.
        model_id: Name of the model in the header; None takes its own.
        memory_mib: Most memory that recording may take beside the model, its cache and its activations, in MiB. KV
            heads are recorded together as far as it reaches.
        chunk_tokens: Prompt tokens per forward.

    Raises:
        ValueError: If the text is longer than the model's positions or reaches a sliding window, or one KV head does
            not fit into `memory_mib`.
    """
    header = trace_header(model, prompt, selection, max_age=max_age, model_id=model_id)
    shape = model_shape(model, model_id)
    n_heads = heads_at_once(model, prompt, selection, memory_mib)
    n_voters = _n_voters(prompt, selection)
    first = prompt.n_prompt_tokens - n_voters
    n_steps = prompt.n_steps
    arrays = {
        name: np.empty((n_steps, max_age, *shape.units), dtype=np.float32)
        for name in ("recovered_mass", "query_similarity", "overlap")
    }
    fresh_mass = np.empty((n_steps + 1, *shape.units), dtype=np.float32)

    def recording(stock: AttentionFunction) -> AttentionFunction:
        def attend(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **kwargs: Any
        ) -> tuple[Tensor, Tensor | None]:
            layer = int(module.layer_idx)  # type: ignore[arg-type]
            grouped = query[0].unflatten(0, (shape.kv_heads, -1))
            refuse_full_window(layer, key.shape[2], kwargs.get("sliding_window"))
            sizes = unit_sizes(selection, layer, key.device)
            for begin in range(0, shape.kv_heads, n_heads):
                heads = slice(begin, begin + n_heads)
                record = _record_heads(
                    grouped[heads],
                    key[0, heads],
                    first,
                    n_voters,
                    selection,
                    max_age,
                    kwargs["scaling"],
                    None if sizes is None else sizes[heads, None],
                )
                for name, values in record.items():
                    by_step = values.movedim(0, -1).float().cpu().numpy()
                    if name == "fresh_mass":
                        fresh_mass[:, layer, heads] = by_step
                    else:
                        arrays[name][:, :, layer, heads] = by_step[1:]
            return stock(module, query, key, value, mask, **kwargs)

        return attend

    tokens = torch.as_tensor(prompt.tokens.astype(np.int64), device=model.device)[None]
    cache = prefill(model, tokens[:, :first], chunk_tokens) if first else None
    with torch.inference_mode(), attention_replaced(model, recording):
        logits = model(tokens[:, first:], past_key_values=cache, use_cache=True).logits[0, n_voters:]
    return Trace(
        header=header,
        tokens=prompt.tokens,
        fresh_mass=fresh_mass,
        token_log_prob=_token_log_prob(logits, tokens[0, prompt.n_prompt_tokens :]),
        **arrays,
    )


def trace_header(
    model: PreTrainedModel, prompt: Prompt, selection: Selection, *, max_age: int, model_id: str | None = None
) -> TraceHeader:
    """The header that `record_trace` gives to a trace, known before anything is computed.

    Args:
        model: A causal language model.
        prompt: The text.
        selection: How sets are chosen.
        max_age: Oldest set to record, in steps, at least 1.
        model_id: Name of the model in the header; None takes its own.

    Raises:
        ValueError: If `max_age` is below 1, the model has layers without a KV cache of tokens, the selection is for
            another model shape, or sets do not follow from the step that chooses them alone.
    """
    _refuse_what_ages_do_not_share(selection)
    if max_age < 1:
        raise ValueError(f"max_age must be at least 1 step, not {max_age}.")
    shape = model_shape(model, model_id)
    check_fits(selection, shape)
    return TraceHeader(
        model=dataclasses.asdict(shape) | {"dtype": str(model.dtype).removeprefix("torch.")},
        selection=selection.to_json(),
        prompt={
            "name": prompt.name,
            "kind": prompt.kind,
            "source": prompt.source,
            "licence": prompt.licence,
            "n_prompt_tokens": prompt.n_prompt_tokens,
        },
        n_steps=prompt.n_steps,
        max_age=max_age,
        versions=versions(),
    )


def _refuse_what_ages_do_not_share(selection: Selection) -> None:
    """A trace holds every age of the set of every step, so each set must follow from its own step and unit."""
    for name, value, supported in (
        ("ranking", selection.ranking, (Ranking.LAST_FULL, Ranking.UPDATED)),
        ("group", selection.group, (GroupPooling.MAX, GroupPooling.MEAN)),
    ):
        if value not in supported:
            allowed = " or ".join(repr(one.value) for one in supported)
            raise ValueError(f"traces are recorded for selections with {name} {allowed}, not {value.value!r}.")
    if selection.prompt_queries is None:
        raise ValueError("traces are recorded for selections with a number of prompt_queries, not with all of them.")


def _n_voters(prompt: Prompt, selection: Selection) -> int:
    """Queries of the prompt that choose the first set, its last one included."""
    return min(selection.prompt_queries or 1, prompt.n_prompt_tokens)


def heads_at_once(model: PreTrainedModel, prompt: Prompt, selection: Selection, memory_mib: int) -> int:
    """How many KV heads of a layer can be recorded together, at least 1.

    Raises:
        ValueError: If the text is longer than the model's positions, or one KV head does not fit into `memory_mib`.
    """
    check_positions(model, prompt.n_prompt_tokens, prompt.n_steps)
    shape = model_shape(model)
    group = shape.query_heads // shape.kv_heads
    number_bytes = torch.promote_types(model.dtype, torch.float32).itemsize
    n_rows = prompt.n_steps + _n_voters(prompt, selection)
    head_bytes = (2 * group + _ARRAYS_PER_HEAD) * n_rows * len(prompt.tokens) * number_bytes
    if head_bytes > memory_mib * 2**20:
        raise ValueError(
            f"recording {prompt.n_steps} steps of {len(prompt.tokens)} tokens needs {head_bytes / 2**20:.0f} MiB "
            f"for one KV head, more than the {memory_mib} MiB allowed: raise --memory-mib or record fewer steps."
        )
    if model.device.type == "cpu":
        # Larger blocks fit, and are slower: 1.8 against 1.5 times the prefill at 512 steps of 4,608 tokens.
        memory_mib = min(memory_mib, _CPU_BLOCK_MIB)
    return int(max(1, min(shape.kv_heads, memory_mib * 2**20 // head_bytes)))


def versions() -> dict[str, str]:
    """Versions of the packages that shape the numbers."""

    def of(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    return {package: of(package) for package in ("recycled-attention", "torch", "transformers")}


def _record_heads(
    query: Tensor,
    key: Tensor,
    first: int,
    n_voters: int,
    selection: Selection,
    max_age: int,
    scaling: float,
    sizes: Tensor | None,
) -> dict[str, Tensor]:
    """All arrays of some KV heads of a layer.

    Args:
        query: `(heads, group, n_voters - 1 + rows, head_dim)`, those of consecutive places. Row 0 is the prompt's last.
        key: `(heads, tokens, head_dim)`.
        first: Place of the first query.
        n_voters: Queries that choose the set of row 0 together; each other row chooses its own.
        selection: How sets are chosen.
        max_age: Oldest age.
        scaling: Factor on query x key.
        sizes: int64 `(heads, 1, 1)`: most tokens of each head's sets; None for the selection's k.

    Returns:
        Arrays by age `(heads, rows, max_age)`, and `fresh_mass` `(heads, rows)`.
    """
    tokens = key.shape[1]
    ends = first + 1 + torch.arange(query.shape[2], device=query.device)[:, None]
    logits = (query @ key[:, None].transpose(-1, -2)).mul_(scaling)
    # What comes before the first query is visible to all.
    logits[..., first:].masked_fill_(torch.arange(first, tokens, device=query.device) >= ends, float("-inf"))
    weights = probabilities(logits, None)
    del logits
    first += n_voters - 1
    row_end, query = ends[n_voters - 1 :], query[:, :, n_voters - 1 :]
    votes = weights[:, :, :n_voters].sum(2)
    weights = weights[:, :, n_voters - 1 :]
    choosing = weights.transpose(1, 2)
    if n_voters > 1:
        choosing = torch.cat([votes[:, None], choosing[:, 1:]], dim=1)
    chosen = select(token_scores(choosing, selection), selection, 0, row_end, sizes)
    left = evictions(chosen, weights, first, max_age)
    mean_weights = weights.mean(1)
    del weights
    members = chosen.holds(tokens).to(mean_weights.dtype)
    unit_query = normalize(query.mean(1, dtype=mean_weights.dtype), dim=-1)
    recovered = mass_by_age(mean_weights, members, left, first)
    fresh = (mean_weights * members).sum(-1)
    return {
        # Sums of parts of a distribution: rounding may leave [0, 1] by an ulp.
        "recovered_mass": recovered.clamp_(0, 1),
        "query_similarity": band(unit_query, unit_query, max_age),
        "overlap": mass_by_age(members, members, left, first) / members.sum(-1, keepdim=True),
        "fresh_mass": fresh.clamp_(0, 1),
    }


def _token_log_prob(logits: Tensor, step_tokens: Tensor) -> np.ndarray:
    """Log-probability of each next token; `(steps, vocabulary)` and `(steps,)` to `(steps,)`."""
    result = np.full(len(step_tokens), np.nan, dtype=np.float32)
    chosen = logits[:-1].float().log_softmax(-1).gather(-1, step_tokens[1:, None])
    result[:-1] = chosen[:, 0].cpu().numpy()
    return result
