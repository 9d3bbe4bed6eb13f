"""What will run, and what it will read, before the first token."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from policies import PolicyFile, Selection, StepPolicy
from recycler.decode.asked import Asked, model_of
from recycler.decode.engines import engine_for
from recycler.model.attention_hook import refuse_full_window
from recycler.model.decoder_parts import NotCovered
from recycler.model.memory import read_gb_per_s, weight_bytes
from recycler.model.shape import model_shape, window_of_recycled_layers


@dataclass(frozen=True)
class Explanation:
    """What `recycled` would do with a model and a policy.

    Attributes:
        engine: What runs decode steps: "plain", or the name of an engine. What only shows at the first step, as a cache
            that it does not run, may still lead to the plain path; the receipt says so.
        why_plain: Why the plain path is taken, as a clause; empty if it is not.
        full_share: Share of unit-steps that runs full at most, a keys-only refresh counted half; bursts come on top.
        read_share: Tokens read of the cache at most, as a share of what full attention reads, at `context_tokens`.
        cache_mb: The KV cache at `context_tokens`, in 10^6 bytes.
        sets_mb: What the recycled sets take beside it.
        weights_mb: The weights that a step reads; None if their types hide how they are packed.
        memory_ms: What reading them and that share of the cache takes, at the rate at which the device was just seen to
            read: about what a step takes where memory is what it waits for. None where `weights_mb` is.
        memory_full_ms: The same with every unit full.
        context_tokens: Tokens in the cache.
        batch_size: Rows.
        horizon_steps: Decode steps of the outputs that the policy was tuned on; None if that is not known.
        notes: Sentences on how the model differs from the one that the policy was tuned on.
    """

    engine: str
    why_plain: str
    full_share: float
    read_share: float
    cache_mb: float
    sets_mb: float
    weights_mb: float | None
    memory_ms: float | None
    memory_full_ms: float | None
    context_tokens: int
    batch_size: int
    horizon_steps: int | None
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Its fields as plain JSON values."""
        return asdict(self) | {"why_plain": self.why_plain or None, "notes": list(self.notes)}

    def print(self, console: Console) -> None:
        """Print it as sentences."""
        because = f" because {self.why_plain}" if self.why_plain else ""
        console.print(f"decode steps run on engine {self.engine}{because}")
        console.print(
            f"at most {self.full_share:.1%} of unit-steps run full, which reads at most {self.read_share:.1%} of what "
            f"full attention reads at {self.context_tokens:,} tokens"
        )
        console.print(
            f"the KV cache of {self.batch_size} rows takes {self.cache_mb:,.1f} MB, their sets {self.sets_mb:,.1f} MB"
        )
        if self.weights_mb is not None and self.memory_ms is not None:
            cache_mb, per_second = self.read_share * self.cache_mb, 1000 * self.batch_size / self.memory_ms
            console.print(
                f"a step reads {self.weights_mb:,.0f} MB of weights and at most {cache_mb:,.1f} MB of cache, which "
                f"takes this machine {self.memory_ms:,.1f} ms ({self.memory_full_ms:,.1f} with every unit full): "
                f"{per_second:,.0f} tokens per second, if nothing else takes time"
            )
        if self.horizon_steps is not None:
            console.print(f"the policy was tuned for outputs of {self.horizon_steps} steps, and holds to twice of that")
        for note in self.notes:
            console.print(note)


def explain(
    target: Any,
    policy: StepPolicy | PolicyFile | str | Path,
    selection: Selection | None = None,
    *,
    context_tokens: int,
    batch_size: int = 1,
    fast: bool = True,
) -> Explanation:
    """Say what `recycled` would do, without decoding.

    Args:
        target: As in `recycled`, like what follows.
        policy: As there.
        selection: As there.
        context_tokens: Tokens in the cache, at least 1.
        batch_size: Rows, at least 1.
        fast: As there.

    Raises:
        ValueError: As `recycled` does, or if a number is below 1.
    """
    for name, value in (("context_tokens", context_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}.")
    model = model_of(target)
    shape = model_shape(model)
    asked = Asked.of(policy, selection, None, model)
    refuse_full_window(0, context_tokens, window_of_recycled_layers(model))
    engine, why_plain = "plain", "" if fast else "fast is False"
    if fast:
        try:
            found = engine_for(model)
            engine, why_plain = found.name, found.why_modules
        except NotCovered as reason:
            why_plain = str(reason)
    sizes = np.broadcast_to(
        asked.selection.k if asked.selection.unit_k is None else asked.selection.unit_k, shape.units
    ).clip(max=context_tokens)
    token_mb = 2 * shape.head_dim * model.dtype.itemsize * batch_size / 1e6
    rates, cost = (
        np.broadcast_to(np.asarray(of_policy, dtype=np.float64), shape.units)
        for of_policy in (asked.policy.highest_rate, asked.policy.full_cost)
    )
    # A keys-only refresh reads all keys, and the values of its set.
    of_refresh = np.where(cost < 1, (context_tokens + sizes) / 2, context_tokens)
    read_share = float((rates * of_refresh + (1 - rates) * sizes).mean() / context_tokens)
    cache_mb = shape.layers * shape.kv_heads * context_tokens * token_mb
    weights = weight_bytes(model)
    weights_mb = memory_ms = memory_full_ms = None
    if weights is not None:
        weights_mb, mb_per_ms = weights / 1e6, read_gb_per_s(model.device)
        memory_ms, memory_full_ms = ((weights_mb + share * cache_mb) / mb_per_ms for share in (read_share, 1))
    return Explanation(
        engine=engine,
        why_plain=why_plain,
        full_share=float((rates * cost).mean()),
        read_share=read_share,
        cache_mb=cache_mb,
        sets_mb=float(sizes.sum()) * token_mb,
        weights_mb=weights_mb,
        memory_ms=memory_ms,
        memory_full_ms=memory_full_ms,
        context_tokens=context_tokens,
        batch_size=batch_size,
        horizon_steps=asked.horizon_steps,
        notes=asked.notes,
    )
