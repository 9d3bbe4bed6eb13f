"""The policy JSON: what the tuner hands to the decoder."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import uuid
import warnings
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from policies.base import StepPolicy
from policies.schema import FORMATS, policy_file_problem
from policies.selection import Selection
from policies.serialize import policy_from_json, policy_to_json, stop_from_json, stop_to_json
from policies.shown import sentence, shown
from policies.stops.base import StopRule
from policies.strict_json import json_problem, read_json
from policies.version import written_by

FORMAT = FORMATS[-1]
# Layers, heads, or numbers per head: generous, and a table of them still fits into memory.
_MOST_OF_A_MODEL = 65_536


@dataclass(frozen=True)
class ModelShape:
    """The model that a policy or a trace belongs to.

    Attributes:
        id: Hugging Face id, folder, or name of the embedded default.
        layers: Attention layers.
        kv_heads: KV heads per layer.
        query_heads: Query heads per layer, a multiple of `kv_heads`.
        head_dim: Numbers per head.
    """

    id: str
    layers: int
    kv_heads: int
    query_heads: int
    head_dim: int

    def __post_init__(self) -> None:
        counts = (self.layers, self.kv_heads, self.query_heads, self.head_dim)
        whole = all(isinstance(count, int) and 1 <= count <= _MOST_OF_A_MODEL for count in counts)
        if not whole or self.query_heads % self.kv_heads:
            raise ValueError(
                f"no model has the shape {sentence(self)}: KV heads must divide query heads, and all must be whole "
                f"numbers from 1 to {_MOST_OF_A_MODEL:,}."
            )

    @property
    def units(self) -> tuple[int, int]:
        """`(layers, kv_heads)`."""
        return self.layers, self.kv_heads

    def __str__(self) -> str:
        heads = f"{self.kv_heads} KV heads, {self.query_heads} query heads"
        return f"{self.id} ({self.layers} layers x {heads} of {self.head_dim})"


@dataclass(frozen=True)
class PolicyFile:
    """A policy with what it needs to run and where it came from.

    Attributes:
        policy: What to do at a step.
        selection: How sets are chosen; a policy tuned for one selection says little about another.
        model: The model that it was tuned on.
        provenance: Free JSON values: digests of traces and weights, budget, results, versions.
        written_by: This project and its version, or those of a file that was read; None if the file does not say, as
            before 0.2. It lies with the provenance in the file.
        horizon_steps: Decode steps of the outputs that it was tuned and confirmed on: what it does beyond is not known.
            None if the file does not say; format 1, of 0.1, says it among the results in its provenance.
        stop: When a round of exact decoding ends; None if that was not tuned.
    """

    policy: StepPolicy
    selection: Selection
    model: ModelShape
    provenance: Mapping[str, Any] = field(default_factory=dict)
    written_by: str | None = field(default_factory=written_by, compare=False)
    horizon_steps: int | None = None
    stop: StopRule | None = None

    def __post_init__(self) -> None:
        check_fits(self.policy, self.model)
        check_fits(self.selection, self.model)
        if self.horizon_steps is not None and self.horizon_steps < 1:
            raise ValueError(f"horizon_steps must be at least 1 step, not {shown(self.horizon_steps)}.")

    def apply(self, target: Any, **how: Any) -> AbstractContextManager[Any]:
        """Decode with this policy inside a `with`: `recycler.recycled(target, self, **how)`.

        Args:
            target: A model, a pipeline, or what else `recycled` takes.
            how: Its options, `exact=True` for one.
        """
        # By name: what only reads policies needs no torch.
        applied: AbstractContextManager[Any] = import_module("recycler").recycled(target, self, **how)
        return applied

    def at_k(self, k: int) -> PolicyFile:
        """The same policy with sets of another size, those of units in proportion; see `Selection.at_k`.

        Raises:
            ValueError: If k has no room for sinks and window.
        """
        return dataclasses.replace(self, selection=self.selection.at_k(k))

    def check_model(self, model: ModelShape) -> None:
        """Refuse to run on a model of another shape than the one that the policy was tuned on.

        Raises:
            ValueError: With both shapes.
        """
        if dataclasses.replace(model, id=self.model.id) != self.model:
            raise ValueError(f"the policy was tuned on {self.model}, but {model} is of another shape.")

    @property
    def weights(self) -> str | None:
        """Digest of the weights that it was tuned on, `precision:hash`; None if the provenance does not say."""
        weights = self.provenance.get("weights")
        return weights if isinstance(weights, str) else None

    def note_on_weights(self, weights: str | None, model_id: str) -> str:
        """A sentence if a model has other weights than those that the policy was tuned on, or may have; else empty.

        Args:
            weights: Their digest; None if they cannot be read. Digests of two precisions tell nothing of each other.
            model_id: What to call the model.
        """
        if self.weights is None or weights == self.weights:
            return ""
        if weights is None:
            return (
                f"the weights of {model_id} are packed, and could not be compared with those that the policy was tuned "
                "on: only the shape was."
            )
        if weights.partition(":")[0] != self.weights.partition(":")[0]:
            return ""
        return (
            f"the policy was tuned on other weights than those of {model_id}, so how far it is from full attention "
            "here was not measured: tune on these weights to know."
        )

    def to_json(self) -> dict[str, Any]:
        """The values that `write` puts into the file, beside their digest."""
        by = {} if self.written_by is None else {"written_by": self.written_by}
        return {
            "format": FORMAT,
            "policy": policy_to_json(self.policy),
            "selection": self.selection.to_json(),
            "model": dataclasses.asdict(self.model),
            "horizon_steps": self.horizon_steps,
            **({} if self.stop is None else {"stop": stop_to_json(self.stop)}),
            "provenance": {**self.provenance, **by},
        }

    @classmethod
    def from_json(cls, values: Any) -> PolicyFile:
        """Read what `to_json` made, or what `write` wrote: values that do not match their digest are warned of.

        Raises:
            ValueError: With one sentence on what is wrong, of at most 300 characters.
        """
        try:
            return cls._from_json(values)
        except ValueError as error:
            raise ValueError(sentence(error)) from error

    @classmethod
    def _from_json(cls, values: Any) -> PolicyFile:
        problem = json_problem(values)
        if problem is not None:
            raise ValueError(f"not a policy file: {problem}.")
        problem = policy_file_problem(values)
        if problem is not None:
            raise ValueError(problem)
        if values.get("digest", digest := digest_of(values)) != digest:
            warnings.warn(
                "this policy file was edited since it was written: its values do not match its digest. If that was "
                'meant, remove "digest" from it.',
                stacklevel=4,
            )
        provenance = dict(values.get("provenance", {}))
        by = provenance.pop("written_by", None)
        return cls(
            policy=policy_from_json(values["policy"]),
            selection=Selection(**values["selection"]),
            model=ModelShape(**values["model"]),
            horizon_steps=values.get(
                "horizon_steps", _horizon_of_format_1(provenance) if values["format"] < 2 else None
            ),
            stop=None if values.get("stop") is None else stop_from_json(values["stop"]),
            provenance=provenance,
            written_by=by,
        )

    def write(self, path: Path | str) -> None:
        """Write the file beside its place, then rename it there; after an error nothing is left beside it."""
        path, values = Path(path), self.to_json()
        # Of the values as they will be read: keys are texts, tuples lists.
        digest = digest_of(json.loads(json.dumps(values)))
        text = json.dumps(values | {"digest": digest}, indent=1, allow_nan=False) + "\n"
        partial = path.with_name(f"{uuid.uuid4().hex[:12]}.{path.name}.partial")
        try:
            partial.write_text(text, encoding="utf-8")
            os.replace(partial, path)
        except BaseException as error:
            partial.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno is not None and error.filename is None:
                # A full disk names no file.
                error.filename = str(path)
            raise

    @classmethod
    def read(cls, path: Path | str) -> PolicyFile:
        """Read a policy file.

        Raises:
            ValueError: If there is no such file, it is no ordinary one or no JSON, or its contents are not a policy;
                the path is named, in at most 300 characters.
        """
        try:
            values = read_json(path)
        except OSError as error:
            raise ValueError(sentence(f"cannot read the policy {path}: {error.strerror}.")) from error
        except ValueError as error:
            raise ValueError(sentence(error)) from error
        try:
            return cls.from_json(values)
        except ValueError as error:
            raise ValueError(sentence(f"{path}: {error}")) from error


def digest_of(values: Mapping[str, Any]) -> str:
    """Digest of the values of a policy file, whatever their order and layout; it tells slips, and is no signature."""
    told = {name: value for name, value in values.items() if name != "digest"}
    return "sha256:" + hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()


def _horizon_of_format_1(provenance: Mapping[str, Any]) -> int | None:
    closed_loop = provenance.get("closed_loop")
    steps = closed_loop.get("steps") if isinstance(closed_loop, Mapping) else None
    return steps if isinstance(steps, int) and steps > 0 else None


def check_fits(part: StepPolicy | Selection, model: ModelShape) -> None:
    """Refuse a policy or a selection whose per-unit parameters have another shape than the model.

    Raises:
        ValueError: With both shapes.
    """
    name = "selection" if isinstance(part, Selection) else "policy"
    for layers, kv_heads in part.unit_shapes():
        if (layers, kv_heads) != model.units:
            raise ValueError(
                f"the {name} is for {layers} layers x {kv_heads} KV heads, but {model.id} has "
                f"{model.layers} layers x {model.kv_heads} KV heads."
            )
