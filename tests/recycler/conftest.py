"""Tiny models, and a decoder written token by token in plain Python that the real one must agree with."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from policies import MEASURED_SIGNALS, PerUnit, Selection, StepPolicy, StepSignals

VOCABULARY = 61


@lru_cache
def _make_model(
    family: str = "llama",
    dtype: torch.dtype = torch.float64,
    attention: str = "sdpa",
    layers: int = 2,
    query_heads: int = 4,
    kv_heads: int = 2,
    **more: Any,
) -> PreTrainedModel:
    config = AutoConfig.for_model(
        family,
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        initializer_range=0.3,  # Attention has peaks, and tokens vary.
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        **more,
    )
    torch.manual_seed(sum(family.encode()))
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=torch.float32).to(dtype)
    # The padding token gets an embedding too: a model may write it, and without one its queries have no direction.
    embeddings = model.get_input_embeddings().weight.data
    embeddings[0] = -embeddings[1]
    return model.eval()


@pytest.fixture(scope="session")
def make_model() -> Callable[..., PreTrainedModel]:
    """Makes a tiny random model; the same object for the same arguments."""
    return _make_model


def _save_byte_model(folder: Path, positions: int) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.chat_template = "{% for turn in messages %}<{{ turn.role }}>{{ turn.content }}{% endfor %}<assistant>"
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


@pytest.fixture(scope="session")
def save_byte_model() -> Callable[..., None]:
    """Saves a random model of 2 layers and 2 KV heads with one token per byte."""
    return _save_byte_model


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def _make_tokens(n_tokens: int, rows: int = 1, seed: int = 0) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (rows, n_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="session")
def make_tokens() -> Callable[..., torch.Tensor]:
    """Makes random tokens `(rows, n_tokens)`, none of them the padding."""
    return _make_tokens


def _selection_of_unit(selection: Selection, layer: int, head: int) -> Selection:
    if selection.unit_k is None:
        return selection
    return dataclasses.replace(selection, k=selection.unit_k[layer][head], unit_k=None)


@pytest.fixture(scope="session")
def selection_of_unit() -> Callable[[Selection, int, int], Selection]:
    """The selection of a lone unit, with its own size as k."""
    return _selection_of_unit


class PlainSet:
    """The recycled set of one unit as a dictionary from place to score.

    `weights` are `(group, end)`, the attention of the query heads to the cache, whose first token is at `start`.
    """

    def __init__(self, weights: np.ndarray, selection: Selection, start: int = 0) -> None:
        self.selection, self.start = selection, start
        end = weights.shape[1]
        pooled = weights.max(0) if selection.group == "max" else weights.mean(0)
        scores = {}
        for place in range(start, end):
            near = range(max(start, place - selection.pool_forward), min(end, place + selection.pool_backward + 1))
            scores[place] = np.float32(max(pooled[other] for other in near))
        stays = [place for place in scores if place < start + selection.sinks or place >= end - selection.window]
        rest = sorted(set(scores) - set(stays), key=lambda place: (scores[place], place), reverse=True)
        self.scores = {place: scores[place] for place in stays + rest[: selection.k - len(stays)]}

    @property
    def places(self) -> list[int]:
        return sorted(self.scores)

    def admit(self, place: int) -> int:
        """Take in a token; the place of the one that leaves, or -1."""
        left = -1
        if len(self.scores) == self.selection.k:
            may_leave = [
                other
                for other in self.scores
                if other >= self.start + self.selection.sinks and other <= place - self.selection.window
            ]
            left = min(may_leave, key=lambda other: (self.scores[other], other))
            del self.scores[left]
        self.scores[place] = np.float32(np.inf)
        return left

    def rescore(self, weights: np.ndarray) -> None:
        """Rank by `(group, len(set))`, attention over the set in order of place."""
        if self.selection.ranking == "updated":
            pooled = weights.max(0) if self.selection.group == "max" else weights.mean(0)
            self.scores = dict(zip(self.places, pooled.astype(np.float32), strict=True))


@pytest.fixture(scope="session")
def plain_set() -> type[PlainSet]:
    return PlainSet


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / np.sqrt((a @ a) * (b @ b)))


class _PlainUnit:
    """One KV head of one row: what `StepSignals` says of it, and its attention."""

    def __init__(self, query: np.ndarray, key: np.ndarray, selection: Selection, start: int, scaling: float) -> None:
        self.selection, self.start, self.scaling = selection, start, scaling
        self.step, self.age, self.n_full = 0, 1, 0
        weights = self._weights(query, key)
        self.set = PlainSet(weights, selection, start)
        self.full_query = self.last_query = query.mean(0)
        self.refresh_mass = weights.mean(0)[self.set.places].sum()
        self.refresh_overlap = float("nan")

    def _weights(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        weights = np.zeros((len(query), len(key)))
        weights[:, self.start :] = softmax(query @ key[self.start :].T * self.scaling)
        return weights

    def signals(self, query: np.ndarray, end: int) -> dict[str, float]:
        self.set.admit(end - 1)
        mean_query = query.mean(0)
        return {
            "step": self.step,
            "age": self.age,
            "n_full": self.n_full,
            "query_similarity": _cosine(mean_query, self.full_query),
            "step_similarity": _cosine(mean_query, self.last_query),
            "refresh_mass": self.refresh_mass,
            "refresh_overlap": self.refresh_overlap,
        }

    def attend(self, query: np.ndarray, key: np.ndarray, value: np.ndarray, full: bool, keys_only: bool) -> np.ndarray:
        self.last_query = query.mean(0)
        self.step += 1
        self.age += 1
        if not full:
            weights = self._weights_on_set(query, key)
            output = weights @ value[self.set.places]
            self.set.rescore(weights)
            return output
        self.age = 1
        self.n_full += 1
        self.full_query = self.last_query
        weights = self._weights(query, key)
        old, self.set = self.set, PlainSet(weights, self.selection, self.start)
        self.refresh_mass = weights.mean(0)[self.set.places].sum()
        self.refresh_overlap = len(set(old.places) & set(self.set.places)) / len(self.set.places)
        return self._weights_on_set(query, key) @ value[self.set.places] if keys_only else weights @ value

    def _weights_on_set(self, query: np.ndarray, key: np.ndarray) -> np.ndarray:
        return softmax(query @ key[self.set.places].T * self.scaling)


class PlainDecoder:
    """Recycled attention, unit by unit, over a cache without empty places.

    Give `attention` to `attention_replaced`. `seen[layer]` has, per step, the signals of the units `(rows, kv_heads)`,
    the decisions as `"full"`, and the sets as `"places"`.
    """

    def __init__(self, policy: StepPolicy, selection: Selection, starts: list[int]) -> None:
        self.policy, self.selection, self.starts = policy, selection, starts
        self.units: dict[int, list[list[_PlainUnit]]] = {}
        self.seen: dict[int, list[dict[str, Any]]] = {}

    def attention(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            layer = module.layer_idx
            queries = query[:, :, -1].unflatten(1, (key.shape[1], -1)).numpy()
            keys, values = key.numpy(), value.numpy()
            if query.shape[2] > 1:
                self.seen[layer] = []
                self.units[layer] = [
                    [
                        _PlainUnit(q, k, _selection_of_unit(self.selection, layer, head), start, kwargs["scaling"])
                        for head, (q, k) in enumerate(zip(*row, strict=True))
                    ]
                    for *row, start in zip(queries, keys, self.starts, strict=True)
                ]
                return stock(module, query, key, value, mask, **kwargs)
            units = self.units[layer]
            table = [
                [unit.signals(q, key.shape[2]) for unit, q in zip(*row, strict=True)]
                for row in zip(units, queries, strict=True)
            ]
            seen = {name: np.array([[float(unit[name]) for unit in row] for row in table]) for name in table[0][0]}
            for name, of_layer in self._of_layer(units, queries).items():
                seen[name] = np.broadcast_to(of_layer[:, None], seen["age"].shape)
            full = self.policy.decide(StepSignals(**seen, layer=layer))
            places = [[unit.set.places for unit in row] for row in units]
            self.seen[layer].append(seen | {"full": full, "places": places})
            modes = np.asarray(self.policy.keys_only)
            keys_only = np.broadcast_to((modes[layer] if modes.ndim else modes) == 1, full.shape[1:])
            output = [
                [unit.attend(*parts) for unit, *parts in zip(*row, keys_only, strict=True)]
                for row in zip(units, queries, keys, values, full, strict=True)
            ]
            return torch.from_numpy(np.array(output)).to(query).flatten(1, 2)[:, None], None

        return attend

    def _of_layer(self, units: list[list[_PlainUnit]], queries: np.ndarray) -> dict[str, np.ndarray]:
        """Signals that the units of a row share; the attention sees no tokens."""
        then = [np.mean([unit.full_query for unit in row], axis=0) for row in units]
        now = queries.reshape(len(queries), -1, queries.shape[-1]).mean(1)
        cosines = [_cosine(*pair) for pair in zip(now, then, strict=True)]
        return {"layer_similarity": np.array(cosines), "token": np.full(len(units), np.nan)}


@pytest.fixture(scope="session")
def plain_decoder() -> type[PlainDecoder]:
    return PlainDecoder


@dataclass(frozen=True)
class Spy(StepPolicy):
    """Notes per layer and step what another policy is shown, and what it decides as `"full"`."""

    policy: StepPolicy
    needs: frozenset[str] = MEASURED_SIGNALS
    seen: dict[int, list[dict[str, np.ndarray]]] = field(default_factory=dict)
    kind: ClassVar[str] = "spy"

    @property
    def keys_only(self) -> PerUnit:
        return self.policy.keys_only

    def decide(self, signals: StepSignals) -> Any:
        full = self.policy.decide(signals)
        shown = {name: values for name, values in vars(signals).items() if name not in ("layer", "reasons", "tables")}
        noted = {name: _as_numpy(values) for name, values in (shown | {"full": full}).items()}
        if signals.layer is not None:
            self.seen.setdefault(signals.layer, []).append(noted)
        else:
            # An engine may ask for all layers at once.
            for layer in range(noted["full"].shape[1]):
                self.seen.setdefault(layer, []).append({name: values[:, layer] for name, values in noted.items()})
        return full


def _as_numpy(values: Any) -> np.ndarray:
    copied: np.ndarray = values.numpy().copy() if isinstance(values, torch.Tensor) else values.copy()
    return copied


@pytest.fixture(scope="session")
def spy() -> type[Spy]:
    return Spy
