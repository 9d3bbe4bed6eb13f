"""Recording traces: one pass of full attention, every age of every set."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel

from policies import GroupPooling, Selection, check_fits
from recycler.model.shape import check_positions, model_shape
from recycler.model.versions import versions
from recycler.prompts import Prompt
from recycler.record.step_attention import StepAttention, watch_steps
from recycler.sets.recycled_set import unit_sizes
from traces import Trace, TraceFile, TraceHeader
from traces.ages import recorded_ages
from traces.trace import BY_AGE

# Arrays of (rows, tokens) floats alive at once per KV head, beside two per query head: mean attention, pooled scores,
# ranks (twice as wide) and their copy, set masks.
_ARRAYS_PER_HEAD = 9

# Most memory of a block on CPU: beyond it every temporary is mapped and cleared by the system anew.
_CPU_BLOCK_MIB = 256
_CPU_CHUNK_TOKENS = 4096


def record_trace(
    model: PreTrainedModel,
    prompt: Prompt,
    selection: Selection,
    *,
    max_age: int,
    model_id: str | None = None,
    memory_mib: int = 1024,
    chunk_tokens: int | None = None,
    into: Trace | None = None,
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
        chunk_tokens: Prompt tokens per forward; None for 4,096, and on a GPU for what `prefill` takes.
        into: A trace with the header that `trace_header` gives, to be filled in; None makes one in memory.

    Raises:
        ValueError: If the text is longer than the model's positions or reaches a sliding window, or one KV head does
            not fit into `memory_mib`.
    """
    header = trace_header(model, prompt, selection, max_age=max_age, model_id=model_id)
    trace = Trace.empty(header) if into is None else into
    if chunk_tokens is None and model.device.type == "cpu":
        chunk_tokens = _CPU_CHUNK_TOKENS
    # On the model's device until all is done, where that is no CPU: to fetch each layer's would let a GPU wait.
    measured = {name: torch.from_numpy(getattr(trace, name)) for name in (*BY_AGE, "fresh_mass")}
    arrays = measured
    if model.device.type != "cpu":
        arrays = {name: torch.empty_like(array, device=model.device) for name, array in measured.items()}

    def watch(layer: int, heads: slice, attention: StepAttention) -> None:
        sizes = unit_sizes(selection, layer, attention.query.device)
        aged, fresh = attention.sets(selection, header.ages, None if sizes is None else sizes[heads, None])
        unit_query = attention.query.mean(1, dtype=fresh.dtype)
        arrays["recovered_mass"][:, :, layer, heads] = _by_step(aged.recovered_mass)[1:]
        arrays["query_similarity"][:, :, layer, heads] = _by_step(_similarity(unit_query, header.ages))[1:]
        arrays["overlap"][:, :, layer, heads] = _by_step(aged.overlap)[1:]
        arrays["fresh_mass"][:, layer, heads] = _by_step(fresh)

    logits = watch_steps(
        model,
        prompt,
        watch,
        n_voters=n_voters(prompt, selection),
        n_heads=heads_at_once(model, prompt, selection, memory_mib),
        chunk_tokens=chunk_tokens,
    )
    step_tokens = torch.as_tensor(prompt.tokens[prompt.n_prompt_tokens :].astype(np.int64), device=logits.device)
    if arrays is not measured:
        for name, array in arrays.items():
            measured[name].copy_(array)
    trace.tokens[:] = prompt.tokens
    trace.token_log_prob[:] = _token_log_prob(logits, step_tokens)
    return trace


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
        ages=recorded_ages(max_age),
        versions=versions(),
    )


def traced_prompt(file: TraceFile) -> Prompt:
    """The prompt that a trace was recorded on.

    Raises:
        ValueError: If the file is no whole trace.
    """
    said = file.header.prompt
    return Prompt(
        name=said["name"],
        kind=said["kind"],
        tokens=file.array("tokens"),
        n_prompt_tokens=int(said["n_prompt_tokens"]),
        source=said["source"],
        licence=said["licence"],
    )


def _refuse_what_ages_do_not_share(selection: Selection) -> None:
    """A trace holds every age of the set of every step, so each set must follow from its own step and unit."""
    if selection.group == GroupPooling.LAYER_MEAN:
        raise ValueError(
            f"traces are recorded for selections with group 'max' or 'mean', not {selection.group.value!r}."
        )
    if selection.prompt_queries is None:
        raise ValueError("traces are recorded for selections with a number of prompt_queries, not with all of them.")


def n_voters(prompt: Prompt, selection: Selection) -> int:
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
    n_rows = prompt.n_steps + n_voters(prompt, selection)
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


def _similarity(query: Tensor, ages: Sequence[int]) -> Tensor:
    """Cosines of queries `(heads, rows, head_dim)` with earlier ones, `(heads, rows, ages)` as in `AgedSets`."""
    heads, rows, _ = query.shape
    unit_query = normalize(query, dim=-1)
    found, row = query.new_full((heads, rows, len(ages)), float("nan")), torch.arange(rows, device=query.device)
    for column, (age, before) in enumerate(zip(ages, (0, *ages), strict=False)):
        of = slice(before + 1, None)
        # Where rows are too young for this age, and old enough for the one before, the first row's query stands.
        earlier = unit_query[:, (row[of] - age).clamp(min=0)]
        found[:, of, column] = (unit_query[:, of] * earlier).sum(-1)
    return found


def _by_step(values: Tensor) -> Tensor:
    """`(heads, rows, ...)` to `(rows, ..., heads)`."""
    return values.movedim(0, -1)


def _token_log_prob(logits: Tensor, step_tokens: Tensor) -> np.ndarray:
    """Log-probability of each next token; `(steps, vocabulary)` and `(steps,)` to `(steps,)`."""
    result = np.full(len(step_tokens), np.nan, dtype=np.float32)
    chosen = logits[:-1].float().log_softmax(-1).gather(-1, step_tokens[1:, None])
    result[:-1] = chosen[:, 0].cpu().numpy()
    return result
