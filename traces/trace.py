"""A trace: what one prompt's decode steps would have seen at every age."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from policies import Selection
from policies.shown import shown
from policies.strict_json import json_problem, parse_json
from traces.ages import check_ages
from traces.plain_name import check_plain_name

FORMAT = "recycled-attention-trace/2"
# Of 0.1: every age up to `max_age`.
_FORMAT_1 = "recycled-attention-trace/1"

# Sums of shares, in the precision of a model.
_ROUNDING = 0.01
# Tokens, steps, ages, layers or heads; with more, the arrays of a trace are in no memory.
_MOST = 2**24
# Of what is printed: names, kinds, sources.
_MOST_CHARACTERS = 1000
_MODEL = {"id": str, "layers": int, "kv_heads": int}
_PROMPT = {"name": str, "kind": str, "source": str, "licence": str, "n_prompt_tokens": int}

# Arrays over (steps, ages, layers, kv_heads).
BY_AGE = ("recovered_mass", "query_similarity", "overlap")


@dataclass(frozen=True)
class TraceHeader:
    """Where a trace comes from; plain JSON values, readable without loading an array.

    Attributes:
        model: `id`, `layers`, `kv_heads`, `query_heads`, `head_dim`, `dtype`.
        selection: The fields of `policies.Selection`.
        prompt: `name`, `kind`, `source`, `licence`, `n_prompt_tokens`.
        n_steps: Decode steps recorded.
        ages: Ages of sets that are recorded, in steps, rising from 1; see `traces.ages`.
        versions: Version of every package that shaped the numbers.
    """

    model: Mapping[str, Any]
    selection: Mapping[str, Any]
    prompt: Mapping[str, Any]
    n_steps: int
    ages: Sequence[int]
    versions: Mapping[str, str]

    def __post_init__(self) -> None:
        object.__setattr__(self, "ages", tuple(self.ages))
        check_ages(self.ages)
        for name, kinds in (("model", _MODEL), ("prompt", _PROMPT)):
            _check_values(name, getattr(self, name), kinds)
        check_plain_name(self.prompt["name"])
        Selection.from_json(self.selection)
        _check_count("n_steps", self.n_steps, least=0)
        if not isinstance(self.versions, Mapping):
            raise ValueError(f"versions must be those of packages, not {shown(self.versions)}")

    @property
    def max_age(self) -> int:
        """Oldest set recorded, in steps."""
        return self.ages[-1]

    @property
    def units(self) -> tuple[int, int]:
        """`(layers, kv_heads)`."""
        return self.model["layers"], self.model["kv_heads"]

    def layout(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of each array of the trace, by its name."""
        by_age = ("<f4", (self.n_steps, len(self.ages), *self.units))
        return dict.fromkeys(BY_AGE, by_age) | {
            "tokens": ("<i4", (self.prompt["n_prompt_tokens"] + self.n_steps,)),
            "fresh_mass": ("<f4", (self.n_steps + 1, *self.units)),
            "token_log_prob": ("<f4", (self.n_steps,)),
        }

    def to_json(self) -> str:
        """One line of JSON, the format included, with sorted keys, so that equal headers are equal text."""
        return json.dumps({"format": FORMAT} | dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> TraceHeader:
        """Read what `to_json` wrote.

        Raises:
            ValueError: If it is another format, or fields are missing or unknown.
        """
        values = parse_json(text)
        problem = json_problem(values)
        if problem is not None:
            raise ValueError(problem)
        written = values.pop("format", None) if isinstance(values, dict) else None
        if written not in (FORMAT, _FORMAT_1):
            raise ValueError(f"the header is not of format {FORMAT!r}")
        try:
            if written == _FORMAT_1:
                max_age = values.pop("max_age")
                _check_count("max_age", max_age)
                values["ages"] = range(1, max_age + 1)
            return cls(**values)
        except (TypeError, KeyError) as error:
            raise ValueError(f"the header has other fields than format {written}: {error}") from error


def _check_values(name: str, values: Any, kinds: Mapping[str, type]) -> None:
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be an object, not {shown(values)}")
    for field, kind in kinds.items():
        value = values.get(field)
        if kind is int:
            _check_count(f"{name}/{field}", value)
        elif not isinstance(value, str) or len(value) > _MOST_CHARACTERS or not value.isprintable():
            raise ValueError(
                f"{name}/{field} must be at most {_MOST_CHARACTERS} characters that can be printed, not {shown(value)}"
            )


def _check_count(name: str, value: Any, least: int = 1) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST:
        raise ValueError(f"{name} must be a whole number from {least} to {_MOST:,}, not {shown(value)}")


@dataclass(frozen=True)
class Trace:
    """Everything that a schedule could have met on one prompt, along the path of full attention.

    Index `[t, i]` of the arrays by age is decode step t with a set chosen `header.ages[i]` steps before. The set that
    prefill chose counts as chosen at step -1, so it is t + 1 steps old at step t: the first entry of a greater age is
    that of this set, and entries beyond are NaN.

    Attributes:
        header: Where the trace comes from.
        tokens: int32 `(n_prompt_tokens + n_steps,)`: the prompt, then the tokens fed at each step.
        recovered_mass: float32 `(n_steps, ages, layers, kv_heads)` in [0, 1]: share of the unit's attention, mean
            over its query heads, on the set as it has become at that age.
        query_similarity: The same shape, in [-1, 1]: cosine of the unit's query (mean over its query heads, after
            rotary embedding) at t with that at t - a.
        overlap: The same shape, in [0, 1]: share of the set that step t would choose which the aged set holds.
        fresh_mass: float32 `(n_steps + 1, layers, kv_heads)`: recovered mass at age 0. Index 0 is the last token of
            the prompt, index t + 1 step t.
        token_log_prob: float32 `(n_steps,)`: natural log-probability that full attention gives, after step t, to the
            token of step t + 1; NaN at the last step, whose next token is not in the trace.
    """

    header: TraceHeader
    tokens: np.ndarray
    recovered_mass: np.ndarray
    query_similarity: np.ndarray
    overlap: np.ndarray
    fresh_mass: np.ndarray
    token_log_prob: np.ndarray

    def __post_init__(self) -> None:
        for name, (_, shape) in self.header.layout().items():
            if getattr(self, name).shape != shape:
                raise ValueError(f"{name} must have shape {shape}, not {shown(getattr(self, name).shape)}.")

    @classmethod
    def empty(cls, header: TraceHeader) -> Trace:
        """A trace in memory, to be filled in."""
        return cls(header, **{name: np.empty(shape, dtype) for name, (dtype, shape) in header.layout().items()})

    @property
    def name(self) -> str:
        """Name of the prompt, and of the file without its ending."""
        return str(self.header.prompt["name"])

    @property
    def kind(self) -> str:
        """Kind of text."""
        return str(self.header.prompt["kind"])

    def check_values(
        self, names: Sequence[str] = ("recovered_mass", "query_similarity", "overlap", "fresh_mass")
    ) -> None:
        """Refuse token ids below 0, and numbers outside of what is said above; NaN is none.

        Args:
            names: Arrays to look at, besides the tokens.

        Raises:
            ValueError: With the array and the number.
        """
        if self.tokens.size and self.tokens.min() < 0:
            raise ValueError(f"tokens must be token ids, 0 or more, not {self.tokens.min()}.")
        for name in names:
            low = -1 if name == "query_similarity" else 0
            # Step by step: it may be larger than memory.
            for of_step in getattr(self, name):
                wrong = of_step[(of_step < low - _ROUNDING) | (of_step > 1 + _ROUNDING)]
                if wrong.size:
                    raise ValueError(f"{name} must lie in [{low}, 1], and {wrong[0]:g} does not.")

    def arrays(self) -> dict[str, np.ndarray]:
        """Name to array, in the order of the fields."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "header"}
