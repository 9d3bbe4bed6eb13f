"""Policy files that are damaged or absurd: read, and where they are read, decoded with."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from pathlib import Path
from typing import Any, ClassVar

import torch

from benchmarks.attack.damage import damaged_text
from benchmarks.attack.guarded import guarded
from benchmarks.attack.row import Row
from benchmarks.attack.tiny import tiny_model
from policies import (
    AlwaysFull,
    BudgetConstrained,
    CosineThreshold,
    FixedStride,
    LayerCosine,
    LearnedLogistic,
    MaxAge,
    PolicyFile,
    RandomRefresh,
    RefreshKeys,
    Selection,
    SentenceBoundary,
    StepPolicy,
)
from policies.policy_file import digest_of
from recycler.decode.recycled import recycled
from recycler.model.shape import model_shape

_TABLE = ((2.0, 3.5), (10.0, 5.0))
_SHARES = ((0.1, 0.5), (1 / 3, 1.0))
_POLICIES: tuple[StepPolicy, ...] = (
    AlwaysFull(),
    FixedStride(_TABLE, 3),
    MaxAge(CosineThreshold(0.85), 30),
    BudgetConstrained(MaxAge(CosineThreshold(_SHARES, 2), 30), 0.1, burst=1),
    RefreshKeys(LayerCosine(0.7), ((1, 0), (0, 1))),
    BudgetConstrained(LearnedLogistic(("sqrt_age", "query_drift"), (0.4, _TABLE), -4.0, 0.3), _SHARES),
    RandomRefresh(_SHARES, 0.3, 0.1),
    SentenceBoundary((3, 5, 9), 8, 2),
)
_SELECTIONS = (Selection(40), Selection.unpooled(48), Selection(40, 2, 8, 3, 3, unit_k=((16, 30), (40, 60))))


class Policies(Row):
    """Mutants of valid files, in their bytes, their structure and their numbers."""

    name: ClassVar[str] = "damaged or absurd policies: read, then 8 steps decoded"
    n: ClassVar[int] = 20_000

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._model = tiny_model()
        self._prompt = torch.randint(1, 200, (1, 50), generator=torch.Generator().manual_seed(1))
        shape = model_shape(self._model, "tiny")
        provenance = {"traces": ["sha256:abc"], "budget": 0.1, "closed_loop": {"steps": 64, "kl": 0.02}}
        self._files = []
        for i, policy in enumerate(_POLICIES):
            path = folder / "whole.json"
            PolicyFile(policy, _SELECTIONS[i % 3], shape, provenance, horizon_steps=None if i % 2 else 512).write(path)
            self._files.append(json.loads(path.read_text()))
        self._decode(PolicyFile.from_json(self._files[0]), True)

    def case(self, rng: random.Random) -> str | None:
        path = self.folder / "policy.json"
        content = damaged_text(rng.choice(self._files), rng)
        path.write_bytes(content)
        read, wrong = guarded(lambda: _read(path))
        if wrong is None and read is not None:
            file, is_warned = read
            # Read in the way of any other program.
            held = json.loads(content)
            if is_warned != ("digest" in held and held["digest"] != digest_of(held)):
                wrong = f"it was {'' if is_warned else 'not '}said that the digest does not match"
            wrong = wrong or _difference(held, json.loads(json.dumps(file.to_json())))
            fast = rng.random() < 0.5
            wrong = wrong or guarded(lambda: self._decode(file, fast))[1]
        return wrong and f"{wrong} | {content[:200]!r}"

    def _decode(self, file: PolicyFile, fast: bool) -> None:
        with recycled(self._model, file, fast=fast):
            self._model.generate(self._prompt, max_new_tokens=9, do_sample=False)  # type: ignore[operator]


def _read(path: Path) -> tuple[PolicyFile, bool]:
    """The file, and whether it was said that its digest does not match."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        warnings.simplefilter("error", RuntimeWarning)
        file = PolicyFile.read(path)
    return file, any("digest" in str(one.message) for one in said)


def _difference(held: Any, written: Any) -> str | None:
    """Where a file holds another value than what was written back after reading it."""
    defaults = dataclasses.asdict(Selection(held["selection"]["k"], window=0, sinks=0)) | {"sinks": 4, "window": 32}
    held["selection"] = {**json.loads(json.dumps(defaults)), **held["selection"]}
    held.pop("digest", None)
    for values in (held, written):
        # What is written is of the newest format, which says where the steps came from.
        values.pop("format")
    for place, value in _leaves(held):
        found = written
        for key in place:
            try:
                found = found[key]
            except (KeyError, IndexError, TypeError):
                return f"/{'/'.join(map(str, place))} is {value!r:.40} and was not written back"
        if place[-2:-1] == ("tokens",) or isinstance(value, (dict, list)):
            continue
        if found != value or isinstance(found, bool) != isinstance(value, bool):
            return f"/{'/'.join(map(str, place))} is {value!r:.40} and was written back as {found!r:.40}"
    return None


def _leaves(values: Any, place: tuple[Any, ...] = ()) -> Any:
    items = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else ()
    # Ids that end a sentence are kept sorted, each once.
    if place[-1:] == ("tokens",):
        return
    for key, value in items:
        yield (*place, key), value
        yield from _leaves(value, (*place, key))
