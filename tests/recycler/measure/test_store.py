"""Results on disk: an equal computation is read back, whatever differs is computed."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from recycler.measure import store as module
from recycler.measure.store import Store
from recycler.model.loading import LoadedModel

Make = Callable[..., PreTrainedModel]


class Computed:
    """Counts computations, and can be told to break off."""

    def __init__(self) -> None:
        self.n = 0
        self.break_off = False

    def __call__(self) -> dict[str, np.ndarray]:
        self.n += 1
        if self.break_off:
            raise KeyboardInterrupt
        return {"numbers": np.arange(6).reshape(2, 3) / self.n, "text": np.array("as it was")}


@pytest.fixture
def compute() -> Computed:
    return Computed()


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "deep" / "store")


def load(model: PreTrainedModel, name: str = "tiny") -> LoadedModel:
    return LoadedModel(model, tokenizer=None, id=name)  # type: ignore[arg-type]


def files(store: Store) -> list[Path]:
    return sorted(store.folder.iterdir()) if store.folder.exists() else []


def test_an_equal_computation_is_read_back(store: Store, make_model: Make, compute: Computed) -> None:
    first = store.get(load(make_model()), {"text": "one", "k": 3}, compute)
    # A key's place is no difference.
    again = Store(store.folder).get(load(make_model()), {"k": 3, "text": "one"}, compute)
    assert compute.n == 1
    assert first.keys() == again.keys() == {"numbers", "text"}
    np.testing.assert_array_equal(first["numbers"], again["numbers"], strict=True)
    assert str(again["text"]) == "as it was"


@pytest.mark.parametrize("other", [{"text": "two", "k": 3}, {"text": "one", "k": 4}, {"text": "one"}], ids=str)
def test_whatever_it_depends_on_makes_another_result(
    store: Store, make_model: Make, compute: Computed, other: dict[str, Any]
) -> None:
    store.get(load(make_model()), {"text": "one", "k": 3}, compute)
    store.get(load(make_model()), other, compute)
    assert compute.n == len(files(store)) == 2


def test_name_precision_weights_and_packages_make_another_result(
    store: Store, make_model: Make, compute: Computed, monkeypatch: pytest.MonkeyPatch
) -> None:
    retrained = copy.deepcopy(make_model())
    with torch.no_grad():
        retrained.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
    for one in (
        load(make_model()),
        load(make_model(), "other"),
        load(make_model(dtype=torch.float32)),
        load(retrained),
    ):
        store.get(one, {}, compute)
    monkeypatch.setattr(module, "versions", lambda: {"torch": "0.1"})
    store.get(load(make_model()), {}, compute)
    assert compute.n == len(files(store)) == 5


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.write_bytes(path.read_bytes()[:-40]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"no archive of arrays"),
        lambda path: path.write_bytes(path.read_bytes()[:200] + b"????" + path.read_bytes()[204:]),
        lambda path: np.savez(path, numbers=np.zeros(3)),
        lambda path: np.savez(path, identity=np.array("{}"), numbers=np.zeros(3)),
        lambda path: path.unlink() or path.mkdir(),
    ],
    ids=["cut", "empty", "text", "bytes", "no identity", "another identity", "folder"],
)
def test_what_is_damaged_or_foreign_is_computed_anew_and_said(
    store: Store, make_model: Make, compute: Computed, spoil: Callable[[Path], None]
) -> None:
    store.get(load(make_model()), {}, compute)
    (path,) = files(store)
    spoil(path)
    if path.is_dir():
        with pytest.warns(UserWarning, match="is damaged or foreign"), pytest.raises(OSError, match="directory"):
            store.get(load(make_model()), {}, compute)
        return
    with pytest.warns(UserWarning, match=r"is damaged or foreign \(.*\): computing it anew\."):
        found = store.get(load(make_model()), {}, compute)
    assert compute.n == 2
    np.testing.assert_array_equal(store.get(load(make_model()), {}, compute)["numbers"], found["numbers"])
    assert compute.n == 2


def test_an_interrupted_computation_leaves_nothing(store: Store, make_model: Make, compute: Computed) -> None:
    compute.break_off = True
    with pytest.raises(KeyboardInterrupt):
        store.get(load(make_model()), {}, compute)
    assert files(store) == []


@pytest.mark.parametrize("where", ["writing", "renaming"])
def test_an_interrupted_write_leaves_nothing(
    store: Store, make_model: Make, compute: Computed, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    def half(file: Any, **arrays: np.ndarray) -> None:
        file.write(b"half")
        raise KeyboardInterrupt

    def unmoved(source: Path, target: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(*((np, "savez_compressed", half) if where == "writing" else (os, "replace", unmoved)))
        with pytest.raises(KeyboardInterrupt):
            store.get(load(make_model()), {}, compute)
    assert files(store) == []
    store.get(load(make_model()), {}, compute)
    assert (compute.n, len(files(store))) == (2, 1)
